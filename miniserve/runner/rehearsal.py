"""Runs made-up steps before requests come, so that none waits for a kernel to be compiled or fetched: half a second to
one and a half for each, and steps with chunks meet half a dozen that decode graphs do not have.

Which kernel runs depends on how many tokens a step has, on how many rows decode, on how long chunks are, and on how
much is cached before either. So steps differ in these; one layer of each kind runs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from miniserve.attention.metadata import QueryRows, ReadTokens, StepBatch, chunk_rows, decode_rows, table_width
from miniserve.models.decoder import CausalLM
from miniserve.runner.device import to_device
from miniserve.runner.served import ServedModel

_FEW = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CHUNKS = 4  # of prompts that end or begin in one step
_MOST_READ, _MOST_SCORES = 1 << 20, 1 << 26  # cached tokens of decode rows, pairs of chunks' tokens: more takes long


@torch.inference_mode()
def rehearse(served: ServedModel, *, block_size: int, max_num_seqs: int, max_tokens: int, max_seq_len: int) -> None:
    """Run steps of up to `max_num_seqs` rows that decode, `max_tokens` tokens in all and `max_seq_len` in a row. Their
    keys are those of the pool's first block, which they overwrite."""
    vocab_size = served.model.config.vocab_size

    def run(batch: StepBatch, positions: torch.Tensor) -> None:
        hidden = served.hidden(positions % vocab_size, positions, batch)
        served.model.compute_logits(hidden[:max_num_seqs])

    steps = _Steps(served.model.options.device, block_size)
    contexts = [*_doubling(block_size, max_seq_len - 1, 4)]
    with _one_layer_of_each_kind(served.model):
        for rows in [*_sizes(max_num_seqs, 8)]:
            for context in [1, *contexts]:
                if rows * context <= _MOST_READ:
                    run(*steps.decode(rows, context))
        for tokens in _sizes(min(max_tokens, max_seq_len), 256):
            batch, positions = steps.chunks((tokens,), 0)
            run(batch, positions)
            run(replace(batch, read=steps.last(tokens)), positions)
        for tokens in _doubling(1, min(max_tokens, max_seq_len - 1), 2):
            for context in contexts:
                if tokens + context <= max_seq_len and tokens * context <= _MOST_SCORES:
                    run(*steps.chunks((tokens,), context))
                    if tokens * _CHUNKS <= max_tokens and max_num_seqs >= _CHUNKS:
                        run(*steps.chunks((tokens,) * _CHUNKS, context))
    if served.model.options.device.type == "cuda":
        torch.cuda.synchronize(served.model.options.device)


class _Steps:
    """Batches and positions of made-up steps. All their block tables name the pool's first block alone."""

    def __init__(self, device: torch.device, block_size: int) -> None:
        self._device, self._block_size = device, block_size

    def decode(self, rows: int, context: int) -> tuple[StepBatch, torch.Tensor]:
        """Rows with `context` cached tokens each."""
        positions = torch.full((rows,), context, device=self._device)
        return StepBatch(positions % self._block_size, self._rows(rows, context)), positions

    def chunks(self, query_lens: tuple[int, ...], context: int) -> tuple[StepBatch, torch.Tensor]:
        """Chunks behind `context` cached tokens each."""
        lens = np.array(query_lens)
        starts = np.concatenate([[0], lens.cumsum()]).astype(np.int32)
        group = chunk_rows(
            0,
            query_lens,
            (context,) * len(lens),
            to_device(starts, self._device),
            to_device((lens + context).astype(np.int32), self._device),
            self._tables(len(lens), context + int(lens.max())),
        )
        spans = [np.arange(context, context + length) for length in query_lens]
        positions = to_device(np.concatenate(spans), self._device)
        extend, prefill = (group, None) if context else (None, group)
        return StepBatch(positions % self._block_size, None, extend, prefill), positions

    def last(self, tokens: int) -> ReadTokens:
        """Of a batch of one chunk without context: its last token."""
        return ReadTokens(torch.full((1,), tokens - 1, device=self._device), self._rows(1, tokens - 1))

    def _rows(self, rows: int, context: int) -> QueryRows:
        lens = np.full(rows, context + 1)
        seq_lens = to_device(lens.astype(np.int32), self._device)
        return decode_rows(self._tables(rows, context + 1), seq_lens, context + 1, lens)

    def _tables(self, rows: int, longest: int) -> torch.Tensor:
        return torch.zeros(rows, table_width(longest, self._block_size), dtype=torch.int32, device=self._device)


@contextmanager
def _one_layer_of_each_kind(model: CausalLM) -> Iterator[None]:
    """Within this block the model has no others."""
    decoder, layers = model.model, model.model.layers
    kinds = {(spec, type(layer.mlp)): layer for spec, layer in zip(model.attention_specs, layers, strict=True)}
    decoder.layers = nn.ModuleList(kinds.values())
    try:
        yield
    finally:
        decoder.layers = layers


def _sizes(most: int, step: int) -> Iterator[int]:
    """A few small ones, then every `step`-th, and `most`."""
    found = {*_FEW, *range(step, most, step), most}
    return iter(sorted(size for size in found if size <= most))


def _doubling(first: int, most: int, factor: int) -> Iterator[int]:
    """Powers of `factor` times the first, and `most`."""
    size = first
    while size < most:
        yield size
        size *= factor
    if most >= first:
        yield most
