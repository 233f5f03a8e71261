"""Decode steps as device graphs: positions, slots, forward pass, the draw of the token, and passing it to the next
step.

A graph belongs to a bucket, a number of rows; a step runs in the smallest bucket that holds its rows, and the rest is
padding. Graphs read and write tensors at fixed addresses, so that the host only sends changes of the rows. A bucket has
two graphs: one takes each row's most likely token; the other draws, except for rows whose logits the sampler needs. A
third draws for those of them that need nothing but their masks, once the host has these. All graphs share one memory
pool, as only one of them runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from miniserve.attention.metadata import StepBatch, decode_rows
from miniserve.core import TokenMasks
from miniserve.kernels.sampling import WANTS_LOGITS, RowParams
from miniserve.kernels.step_tensors import RowState, StepTensors
from miniserve.kernels.triton.decode_step import advance, apply_changes, best_words, hand_over
from miniserve.kernels.triton.sampling import sample
from miniserve.parallel.group import gather_rows, parts_of_all
from miniserve.parallel.shard import Shard
from miniserve.runner.sampling_masks import MaskRoom
from miniserve.runner.served import ServedModel
from miniserve.runner.state import GraphInputs

Progress = Callable[[int, int], None]
_RING = 4


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Rows that graphs are captured for: powers of two up to 32, then steps that waste at most a third of a step."""
    steps = [1, 2, 4, 8, 16, *range(32, 128, 16), *range(128, 256, 32), *range(256, max_num_seqs + 64, 64)]
    return [size for size in steps if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """`state` and `params` are those of the runner's rows; `max_seq_len` in tokens bounds every row's length.
    `num_draft_tokens`: the most guesses that a step verifies behind a row's token. With guesses the host specifies what
    each entry of a step computes; without, each entry is a row that advances by its last token."""

    def __init__(
        self,
        served: ServedModel,
        state: RowState,
        params: RowParams,
        *,
        block_size: int,
        max_seq_len: int,
        buckets: Sequence[int],
        num_draft_tokens: int,
    ) -> None:
        self._served, self._state, self._params = served, state, params
        self._block_size, self._max_seq_len = block_size, max_seq_len
        self._explicit, self._fresh = num_draft_tokens > 0, num_draft_tokens + 1
        self._buckets = sorted(buckets)
        self._device = state.lens.device
        most = self._buckets[-1]
        self._step = StepTensors.allocate(most, state.tables.shape[1], self._device)
        self._tokens = torch.zeros(most, dtype=torch.int64, device=self._device)
        self._query_starts = torch.arange(most + 1, dtype=torch.int32, device=self._device)
        model = served.model
        self._group, self._vocab_size = model.options.group, model.config.vocab_size
        self._words = model.options.shard.part(self._vocab_size).held
        words = model.lm_head.out_features
        self._logits = torch.empty(most, words, dtype=model.options.dtype, device=self._device)
        self._greedy: dict[int, torch.cuda.CUDAGraph] = {}
        self._drawn: dict[int, torch.cuda.CUDAGraph] = {}
        self._masked: dict[int, torch.cuda.CUDAGraph] = {}
        self._masks = MaskRoom(most, self._vocab_size, self._device)
        self._rows: tuple[int, list[int]] = (0, [])
        # The device reads changes when it runs the step: at most two steps are in flight, and one is being staged.
        self._staging = [torch.empty(5 * most, dtype=torch.int32, pin_memory=True) for _ in range(_RING)]
        self._num_staged = 0

    @torch.inference_mode()
    def capture(self, progress: Progress = lambda done, total: None) -> None:
        """Record every bucket's graphs, the largest first, so that the smaller ones reuse its memory in the pool."""
        pool = torch.cuda.graph_pool_handle()
        for done, bucket in enumerate(reversed(self._buckets)):
            progress(done, len(self._buckets))
            logits = self._run(bucket)  # compiles and allocates, which a capture must not
            self._take_argmax(logits)
            self._draw(logits)
            if self._group.size == 1:  # ranks have the logits of their words alone
                self._draw_masked(bucket)
            del logits
            torch.cuda.synchronize(self._device)
            self._greedy[bucket] = _record(pool, lambda rows: self._take_argmax(self._run(rows)), bucket)
            self._drawn[bucket] = _record(pool, lambda rows: self._draw(self._run(rows)), bucket)
            if self._group.size == 1:
                self._masked[bucket] = _record(pool, self._draw_masked, bucket)
        progress(len(self._buckets), len(self._buckets))

    def bucket(self, num_rows: int) -> int | None:
        """See `StepGraphs.bucket`."""
        return next((bucket for bucket in self._buckets if num_rows <= bucket), None)

    def greedy(self, bucket: int, inputs: GraphInputs) -> torch.Tensor:
        """See `StepGraphs.greedy`."""
        self._stage(bucket, inputs)
        self._greedy[bucket].replay()
        return self._tokens[: len(inputs.rows)]

    def drawn(self, bucket: int, inputs: GraphInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """See `StepGraphs.drawn`. Rows draw by their `params`, which must be up to date."""
        self._stage(bucket, inputs)
        self._drawn[bucket].replay()
        return self._tokens[: len(inputs.rows)], self._logits[: len(inputs.rows)]

    def masked(self, masks: TokenMasks) -> torch.Tensor | None:
        """See `StepGraphs.masked`; None with ranks."""
        bucket, rows = self._rows
        if self._group.size > 1:
            return None
        self._masks.take(masks, bucket)
        self._masked[bucket].replay()
        return self._tokens[: len(rows)]

    def _stage(self, bucket: int, inputs: GraphInputs) -> None:
        rows, num_blocks = inputs.rows, len(inputs.places)
        known_bucket, known = self._rows
        num_rows = 0 if known is rows and known_bucket == bucket else bucket
        if not num_rows and not num_blocks:
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
        end = start + num_blocks
        host[start:end] = inputs.places
        host[end : end + num_blocks] = inputs.block_ids
        apply_changes(staged, num_rows, num_blocks, self._step, self._state.tables, explicit=self._explicit)

    def _take_argmax(self, logits: torch.Tensor) -> None:
        bucket, most_words = len(logits), Shard(0, self._group.size).part(self._vocab_size).size
        best = self._group.gather(best_words(logits, self._words.start, most_words))
        hand_over(best, self._step.rows[:bucket], self._state, self._tokens[:bucket])

    def _draw(self, logits: torch.Tensor) -> None:
        bucket = len(logits)
        rows, tokens, undrawn = self._step.rows[:bucket], self._tokens[:bucket], self._logits[:bucket]
        if self._group.size > 1:
            self._draw_together(logits)
        elif self._explicit:
            sample(logits, rows, self._params, tokens, num_outputs=self._num_outputs(bucket), undrawn=undrawn)
        else:
            sample(logits, rows, self._params, tokens, self._state, undrawn=undrawn)

    def _draw_masked(self, bucket: int) -> None:
        """From the logits that `_draw` left."""
        rows, tokens, logits = self._step.rows[:bucket], self._tokens[:bucket], self._logits[:bucket]
        num_outputs, state = (self._num_outputs(bucket), None) if self._explicit else (None, self._state)
        masks = self._masks.masks
        sample(logits, rows, self._params, tokens, state, num_outputs=num_outputs, left_only=True, masks=masks)

    def _num_outputs(self, bucket: int) -> torch.Tensor:
        """Output tokens before each entry of a step, int64 [bucket]."""
        rows = self._step.rows[:bucket].clamp(min=0)
        if self._explicit:
            return self._step.positions[:bucket] + 1 - self._params.prompt_lens[rows]
        return self._state.num_outputs[rows]

    def _draw_together(self, logits: torch.Tensor) -> None:
        """As `_draw`, of logits whose columns are shared out: each rank draws for its part of the rows."""
        bucket = len(logits)
        rows, parts = self._step.rows[:bucket], parts_of_all(self._group, bucket)
        own = parts[self._group.rank].held
        self._logits[:bucket] = logits
        whole = self._group.rows(logits, self._vocab_size)
        drawn = torch.zeros_like(rows[own])
        if len(drawn):
            sample(whole, rows[own], self._params, drawn, num_outputs=self._num_outputs(bucket)[own])
        drawn = gather_rows(self._group, drawn, [part.size for part in parts])
        self._tokens[:bucket] = drawn
        if not self._explicit:
            wanting = self._params.numbers[rows.clamp(min=0), WANTS_LOGITS] > 0
            best = torch.stack((torch.zeros_like(drawn), drawn)).int()[None, :, :, None]
            hand_over(best, rows.masked_fill(wanting, -1), self._state, self._tokens[:bucket])

    def _run(self, bucket: int) -> torch.Tensor:
        """The logits [bucket, words of this rank] to choose the next tokens from."""
        step = self._step.first(bucket)
        advance(self._state, step, self._block_size, explicit=self._explicit)
        # The look-up of embeddings, an ordinary kernel, lies between `advance` and those that are launched dependently.
        starts = self._query_starts[: bucket + 1]
        tables, lens = step.block_tables, step.seq_lens
        decode = decode_rows(tables, lens, self._max_seq_len, fresh=self._fresh, cu_query_lens=starts)
        return self._served.logits(step.input_ids, step.positions, StepBatch(step.slots, decode))


def _record(pool: Any, work: Callable[[int], None], bucket: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work(bucket)
    return graph
