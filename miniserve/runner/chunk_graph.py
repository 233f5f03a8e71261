"""The forward pass of steps with short chunks as device graphs: launching their kernels one by one takes the host
longer than the device takes to run them.

A graph has a fixed number of decode rows and of chunk tokens; a step runs in the smallest graph that holds it. The rest
is padding, which is written to no slot and attends to nothing. The inputs are copied to tensors at fixed addresses.
Sampling runs outside the graph, as in any other step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, product
from typing import Any

import numpy as np
import torch

from miniserve.attention.metadata import QueryRows, StepBatch, chunk_rows, decode_rows, table_width
from miniserve.runner.device import to_device
from miniserve.runner.served import ServedModel
from miniserve.runner.state import StepInputs

Progress = Callable[[int, int], None]
_ROWS = (16, 32, 64, 128, 256)
_TOKENS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_MANY_ROWS, _MANY_TOKENS = 64, 512  # beyond both at once the device takes longer than the host anyway


@dataclass(frozen=True, slots=True)
class _Graph:
    replay: Callable[[], None]
    hidden: torch.Tensor  # [rows + tokens, hidden_size]


class ChunkGraphs:
    """For steps of at most `max_num_seqs` rows, none of them longer than `max_seq_len` tokens."""

    def __init__(self, served: ServedModel, *, block_size: int, max_num_seqs: int, max_seq_len: int) -> None:
        self._served, self._max_seq_len = served, max_seq_len
        self._rows = sorted({min(rows, max_num_seqs) for rows in _ROWS})
        self._most_chunks = most = served.backend.chunks_in_graphs
        self._with_contexts = served.backend.contexts_in_graphs
        self._device = served.model.options.device
        tokens, width = self._rows[-1] + _TOKENS[-1], table_width(max_seq_len, block_size)

        def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self._device)

        self._input_ids, self._positions, self._slots = (integers(tokens, dtype=torch.int64) for _ in range(3))
        self._decode_lens, self._decode_tables = integers(self._rows[-1]), integers(self._rows[-1], width)
        self._decode_starts = torch.arange(self._rows[-1] + 1, dtype=torch.int32, device=self._device)
        self._chunk_lens, self._chunk_tables = integers(most), integers(most, width)
        self._chunk_starts = integers(most + 1)
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @torch.inference_mode()
    def capture(self, progress: Progress = lambda done, total: None) -> None:
        """Record all graphs, the largest first, so that the smaller ones reuse its memory in the pool."""
        pool = torch.cuda.graph_pool_handle()
        sizes = [
            (rows, tokens)
            for rows, tokens in product(reversed(self._rows), reversed(_TOKENS))
            if rows <= _MANY_ROWS or tokens <= _MANY_TOKENS
        ]
        self._slots.fill_(-1)
        for done, (rows, tokens) in enumerate(sizes):
            progress(done, len(sizes))
            work = partial(self._forward, rows, tokens)
            work()  # compiles and allocates, which a capture must not
            torch.cuda.synchronize(self._device)
            self._graphs[rows, tokens] = _record(work, pool)
        progress(len(sizes), len(sizes))

    def run(self, inputs: StepInputs) -> torch.Tensor | None:
        """The hidden states of a step's tokens, [num_tokens, hidden_size], which the next step may overwrite; None if
        no graph holds the step."""
        batch = inputs.batch
        chunks = batch.chunks
        lens = [length for group in chunks for length in group.query_lens]
        num_rows = 0 if batch.decode is None else batch.decode.end
        rows = next((rows for rows in self._rows if num_rows <= rows), None)
        tokens = next((tokens for tokens in _TOKENS if sum(lens) <= tokens), None)
        graph = None if rows is None or tokens is None else self._graphs.get((rows, tokens))
        if rows is None or graph is None or not 0 < len(lens) <= self._most_chunks:
            return None
        if batch.extend is not None and not self._with_contexts:
            return None
        self._fill_tokens(inputs, num_rows, rows)
        self._fill_decode(batch.decode, num_rows)
        self._fill_chunks(chunks, lens)
        graph.replay()
        end = rows + sum(lens)
        if num_rows == rows:
            return graph.hidden[:end]
        return torch.cat([graph.hidden[:num_rows], graph.hidden[rows:end]])

    def _fill_tokens(self, inputs: StepInputs, num_rows: int, rows: int) -> None:
        """Copy decode rows to the start and chunks to `rows` and on. Padding keeps ids and positions of an earlier
        step."""
        end = rows + len(inputs.input_ids) - num_rows
        self._slots.fill_(-1)
        for fixed, given in (
            (self._input_ids, inputs.input_ids),
            (self._positions, inputs.positions),
            (self._slots, inputs.batch.slot_mapping),
        ):
            fixed[:num_rows] = given[:num_rows]
            fixed[rows:end] = given[num_rows:]

    def _fill_decode(self, decode: QueryRows | None, num_rows: int) -> None:
        self._decode_lens.zero_()
        if decode is not None:
            self._decode_lens[:num_rows] = decode.seq_lens
            self._decode_tables[:num_rows, : decode.block_tables.shape[1]] = decode.block_tables

    def _fill_chunks(self, chunks: Sequence[QueryRows], lens: list[int]) -> None:
        """Copy each chunk's length, end and blocks; unused chunks have no token and no key."""
        ends = [*accumulate(lens, initial=0)]
        ends += ends[-1:] * (self._most_chunks - len(lens))
        self._chunk_starts.copy_(to_device(np.array(ends, dtype=np.int32), self._device))
        self._chunk_lens.zero_()
        at = 0
        for group in chunks:
            end = at + len(group.query_lens)
            self._chunk_lens[at:end] = group.seq_lens
            self._chunk_tables[at:end, : group.block_tables.shape[1]] = group.block_tables
            at = end

    def _forward(self, rows: int, tokens: int) -> torch.Tensor:
        starts = self._decode_starts[: rows + 1]
        tables, row_lens = self._decode_tables[:rows], self._decode_lens[:rows]
        decode = decode_rows(tables, row_lens, self._max_seq_len, cu_query_lens=starts)
        none = (0,) * (self._most_chunks - 1)  # upper bounds for the host: one chunk may have all tokens and keys
        lens, contexts = (tokens, *none), (self._max_seq_len - tokens if self._with_contexts else 0, *none)
        chunks = chunk_rows(rows, lens, contexts, self._chunk_starts, self._chunk_lens, self._chunk_tables)
        end = rows + tokens
        groups = (chunks, None) if self._with_contexts else (None, chunks)
        batch = StepBatch(self._slots[:end], decode, *groups)
        return self._served.hidden(self._input_ids[:end], self._positions[:end], batch)


def _record(work: Callable[[], torch.Tensor], pool: Any) -> _Graph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        hidden = work()
    return _Graph(graph.replay, hidden)
