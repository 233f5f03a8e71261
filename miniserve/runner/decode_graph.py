"""Decode steps as device graphs: positions, slots, forward and, for greedy rows, the token and its hand-over.

A graph belongs to a bucket, a number of rows; a step runs in the smallest bucket that holds its rows, the rest being
padding. Graphs read and write tensors that never move, so that a step needs from the host its rows, where they changed,
and nothing else. A bucket has two: one takes each row's most likely token, one leaves the logits to the sampler. All
graphs share one memory pool, as only one of them runs at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.context import PagedStepContext
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import DecodeRows, StepBatch
from miniserve.kernels.triton.decode_step import RowState, StepTensors, advance, apply_changes, greedy
from miniserve.models.decoder import CausalLM
from miniserve.runner.state import GraphInputs

Progress = Callable[[int, int], None]
_RING = 4


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Rows that graphs are captured for: powers of two up to 16, then steps that waste at most a third of a step."""
    steps = [1, 2, 4, 8, 16, *range(32, 128, 16), *range(128, 256, 32), *range(256, max_num_seqs + 64, 64)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """`state` is that of the runner's rows; `max_seq_len` in tokens bounds every row's length. `explicit`: the host
    says what each entry of a step computes, as for draft runs; else each is a row that advances by its last token."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend[Any],
        caches: Sequence[KVCache],
        state: RowState,
        *,
        block_size: int,
        max_seq_len: int,
        buckets: Sequence[int],
        explicit: bool,
    ) -> None:
        self._model, self._backend, self._caches, self._state = model, backend, caches, state
        self._block_size, self._max_seq_len, self._explicit = block_size, max_seq_len, explicit
        self._buckets = sorted(buckets)
        self._device = state.lens.device
        most = self._buckets[-1]

        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self._device)

        self._step = StepTensors(
            rows=integers(most) - 1,
            input_ids=integers(most),
            positions=integers(most),
            slots=integers(most),
            seq_lens=integers(most, dtype=torch.int32),
            block_tables=integers(most, state.tables.shape[1], dtype=torch.int32),
        )
        self._tokens = integers(most)
        self._logits = torch.empty(most, model.config.vocab_size, dtype=torch.float32, device=self._device)
        self._greedy: dict[int, torch.cuda.CUDAGraph] = {}
        self._sampled: dict[int, torch.cuda.CUDAGraph] = {}
        self._rows: tuple[int, list[int]] = (0, [])
        # The device reads changes when it gets there: two steps are in flight at most, and one is being staged.
        self._staging = [torch.empty(5 * most, dtype=torch.int32, pin_memory=True) for _ in range(_RING)]
        self._num_staged = 0

    def capture(self, progress: Progress | None = None) -> None:
        """Record every bucket's graphs, the largest first, so that the smaller ones find their memory in the pool."""
        pool = torch.cuda.graph_pool_handle()
        for done, bucket in enumerate(reversed(self._buckets)):
            if progress is not None:
                progress(done, len(self._buckets))
            self._take_argmax(bucket)  # what is compiled or allocated at the first run must be there before a capture
            torch.cuda.synchronize(self._device)
            self._greedy[bucket] = _record(functools.partial(self._take_argmax, bucket), pool)
            self._sampled[bucket] = _record(functools.partial(self._leave_logits, bucket), pool)
        if progress is not None:
            progress(len(self._buckets), len(self._buckets))

    def bucket(self, num_rows: int) -> int | None:
        """The bucket for a step of so many decode rows, None where no graph is that large."""
        return next((bucket for bucket in self._buckets if num_rows <= bucket), None)

    def greedy(self, bucket: int, inputs: GraphInputs) -> torch.Tensor:
        """Launch a step and hand each row's most likely token to the next one. Returns the tokens, int64 [entries]; the
        next launch overwrites them."""
        self._stage(bucket, inputs)
        self._greedy[bucket].replay()
        return self._tokens[: len(inputs.rows)]

    def logits(self, bucket: int, inputs: GraphInputs) -> torch.Tensor:
        """As `greedy`, but leaves the choice to the caller. Returns float32 [entries, vocab_size], which the next
        launch overwrites."""
        self._stage(bucket, inputs)
        self._sampled[bucket].replay()
        return self._logits[: len(inputs.rows)]

    def _stage(self, bucket: int, inputs: GraphInputs) -> None:
        rows, blocks = inputs.rows, inputs.blocks
        known_bucket, known = self._rows
        num_rows = 0 if known is rows and known_bucket == bucket else bucket
        if not num_rows and not len(blocks.places):
            return
        self._rows = (bucket, rows)
        staged = self._staging[self._num_staged % _RING]
        self._num_staged += 1
        host = staged.numpy()
        if num_rows:
            host[: len(rows)] = rows
            host[len(rows) : bucket] = -1
        start = num_rows
        if self._explicit:
            host[bucket : bucket + len(rows)] = inputs.positions
            host[2 * bucket : 2 * bucket + len(rows)] = inputs.token_ids
            start = 3 * bucket
        end = start + len(blocks.places)
        host[start:end] = blocks.places
        host[end : end + len(blocks.places)] = blocks.block_ids
        apply_changes(staged, num_rows, len(blocks.places), self._step, self._state.tables, explicit=self._explicit)

    def _take_argmax(self, bucket: int) -> None:
        logits = self._model.raw_logits(self._run(bucket))
        greedy(logits, self._step.rows[:bucket], self._state, self._tokens[:bucket])

    def _leave_logits(self, bucket: int) -> None:
        self._logits[:bucket].copy_(self._model.raw_logits(self._run(bucket)))

    def _run(self, bucket: int) -> torch.Tensor:
        """The hidden states [bucket, hidden_size] that the next tokens follow from."""
        step = StepTensors(
            self._step.rows[:bucket],
            self._step.input_ids[:bucket],
            self._step.positions[:bucket],
            self._step.slots[:bucket],
            self._step.seq_lens[:bucket],
            self._step.block_tables[:bucket],
        )
        advance(self._state, step, self._block_size, explicit=self._explicit)
        decode = DecodeRows(step.block_tables, step.seq_lens, self._max_seq_len, host_seq_lens=None)
        metadata = self._backend.build(StepBatch(step.slots, decode))
        context = PagedStepContext(self._backend, self._caches, metadata)
        hidden: torch.Tensor = self._model(step.input_ids, step.positions, context)
        return hidden


def _record(work: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph
