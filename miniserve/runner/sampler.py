"""From logits to tokens, for the whole batch at once.

The order for a row is vLLM's: the grammar's mask, allowed_token_ids, bad_words, logit_bias, min_tokens, repetition
penalty, frequency and presence penalty; then the draw (`kernels.sampling`). It takes the mask, too: what that forbids
stays so whatever an edit does to it. Graphs draw for rows that need nothing else, or nothing but a mask.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch

from miniserve.core import RowStart, TokenMasks
from miniserve.kernels import sampling
from miniserve.kernels.sampling import Draw, RowParams
from miniserve.parallel.group import Alone, Group, gather_rows, parts_of_all, shard_of
from miniserve.runner.logprobs import LogprobTensors, gather_logprobs, share_logprobs
from miniserve.runner.sampling_masks import masks_within, row_masks
from miniserve.runner.sampling_rows import Batch, RowTable


@dataclass(frozen=True, slots=True)
class SampleOutput:
    """token_ids: int64 [num_rows] on the device. `logprobs` has a row for each entry of `num_logprobs` that is not
    None, in order, and is None where all are; `to_token_logprobs` combines both once they are on the host."""

    token_ids: torch.Tensor
    logprobs: LogprobTensors | None
    num_logprobs: tuple[int | None, ...]


class Sampler:
    """Draws a token for each row of the runner's persistent state; keeps the state that this needs from step to step.

    `last_tokens` and `num_outputs` (int64 [max_num_seqs], on the device) hold each row's last sampled token and its
    number of output tokens; `params`, what its request asks for.

    A row's tokens are a function of its logits, its parameters and its stream of random numbers, which starts
    from the request's seed or, without one, from `seed` and the request's id. `draw`: the device's way to draw.

    Each rank of `group` has the logits of its words. Where all rows are greedy, ranks compare their best words; else
    each draws for its share of the rows, of which it gets the whole logits. All ranks record all tokens.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        eos_token_ids: Collection[int],
        seed: int = 0,
        draw: Draw = sampling.draw,
        group: Group | None = None,
    ) -> None:
        self._group = group or Alone()
        self._vocab_size = vocab_size
        self.last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self.num_outputs = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._draw = draw
        self._table = RowTable(max_num_seqs, vocab_size, device, eos_token_ids, seed)
        self._batches: list[tuple[list[int], Batch]] = []  # of the last step: all its rows, and this rank's of them

    @property
    def params(self) -> RowParams:
        """Up to date after `upload`."""
        return self._table.params

    def start_row(self, start: RowStart) -> None:
        """Add a request in a free row."""
        self._table.start_row(start)
        self._batches = []
        self.num_outputs[start.row].fill_(len(start.output_token_ids))  # item assignment would wait for the device

    def stop_row(self, row: int) -> None:
        """The row is free again."""
        self._table.stop_row(row)
        self._batches = []

    def upload(self) -> None:
        """Update `params`, before a graph draws."""
        self._table.upload()

    def sample(
        self,
        logits: torch.Tensor,
        rows: list[int],
        positions: list[int] | None = None,
        masks: TokenMasks | None = None,
    ) -> SampleOutput:
        """Draw the next token of each of `rows`, which are all taken.

        logits: contiguous [len(rows), this rank's words] of any float dtype, may be overwritten. On an asynchronous
        device nothing waits. A row may occur more than once, unless it is penalised or has bad words, if the host
        passes the `positions` that the logits follow from; `last_tokens` and `num_outputs` are then undefined until a
        request takes the row. `masks`: the tokens that grammars allow, by index into `rows`.
        """
        self.upload()
        choose = self._choose if self._group.size == 1 else self._choose_together
        sampled = choose(logits, rows, positions, masks)
        batch = self._prepare(rows)
        self.last_tokens.index_copy_(0, batch.rows, sampled.token_ids)
        self.num_outputs.index_add_(0, batch.rows, batch.ones)
        for edit in batch.edits:
            if edit.record is not None:
                edit.record(sampled.token_ids)
        return sampled

    def _choose(
        self, logits: torch.Tensor, rows: list[int], positions: list[int] | None, masks: TokenMasks | None
    ) -> SampleOutput:
        """The next tokens of rows whose logits are here, [len(rows), vocab_size]; they are not yet recorded."""
        batch = self._prepare(rows)
        if positions is None:
            num_outputs = self.num_outputs.index_select(0, batch.rows)
        else:
            num_outputs = self._table.num_outputs(rows, positions)
        raw = None
        if batch.logprobs is not None:
            raw = logits[batch.logprobs.entries]
            in_place = masks is not None or (batch.edits and logits.dtype == torch.float32)
            if in_place and isinstance(batch.logprobs.entries, slice):
                raw = raw.clone()
        if batch.edits:
            logits = logits.float()
            for edit in batch.edits:
                edit.apply(logits, num_outputs)
        allowed = None if masks is None else row_masks(masks, len(rows), logits.device)
        tokens = self._draw(logits, batch.rows, self.params, num_outputs, allowed)
        if raw is None or batch.logprobs is None:
            return SampleOutput(tokens, None, batch.num_logprobs)
        asked = batch.logprobs
        logprobs = gather_logprobs(raw, tokens[asked.entries], asked.most, asked.asked_ids)
        return SampleOutput(tokens, logprobs, batch.num_logprobs)

    def _choose_together(
        self, logits: torch.Tensor, rows: list[int], positions: list[int] | None, masks: TokenMasks | None
    ) -> SampleOutput:
        """As `_choose`, of logits whose columns are shared out: each rank chooses for its part of the rows."""
        group, num_logprobs = self._group, self._prepare(rows).num_logprobs
        if self._table.take_argmax(rows):
            return SampleOutput(best_of_ranks(group, logits, self._vocab_size), None, num_logprobs)
        logits = group.rows(logits, self._vocab_size)
        parts = [part.held for part in parts_of_all(group, len(rows))]
        own = parts[group.rank]
        chosen = SampleOutput(torch.zeros(0, dtype=torch.int64, device=logits.device), None, ())
        if rows[own]:
            known = None if positions is None else positions[own]
            chosen = self._choose(logits, rows[own], known, None if masks is None else masks_within(masks, own))
        tokens = gather_rows(group, chosen.token_ids, [len(rows[part]) for part in parts])
        asked = [count for count in num_logprobs if count is not None]
        if not asked:
            return SampleOutput(tokens, None, num_logprobs)
        counts = [sum(count is not None for count in num_logprobs[part]) for part in parts]
        logprobs = share_logprobs(group, chosen.logprobs, counts, min(max(asked), self._vocab_size), logits.device)
        return SampleOutput(tokens, logprobs, num_logprobs)

    def wants_masks_alone(self, rows: list[int]) -> bool:
        """Whether no row needs more of the sampler than its mask."""
        return self._table.want_masks_alone(rows)

    def takes_argmax(self, rows: list[int]) -> bool:
        """Whether `sample` would return each row's most likely token and nothing else."""
        return self._table.take_argmax(rows)

    def complete(
        self,
        tokens: torch.Tensor,
        logits: torch.Tensor,
        rows: list[int],
        positions: list[int] | None = None,
        masks: TokenMasks | None = None,
    ) -> SampleOutput:
        """Finish a step in which a graph drew `tokens`, int64 [len(rows)], except for rows that need their logits: do
        for these what `sample` does. Their rows of `logits` are filled."""
        num_logprobs: list[int | None] = [None] * len(rows)
        remaining = self._table.wanting_logits(rows)
        if not len(remaining):
            return SampleOutput(tokens, None, tuple(num_logprobs))
        entries = self._table.entries(remaining)
        known = None if positions is None else [positions[entry] for entry in remaining]
        if masks is not None:
            masks = TokenMasks(np.searchsorted(remaining, masks.entries).tolist(), masks.bits)
        sampled = self.sample(logits[entries], [rows[entry] for entry in remaining], known, masks)
        tokens[entries] = sampled.token_ids
        for entry, count in zip(remaining, sampled.num_logprobs, strict=True):
            num_logprobs[entry] = count
        return SampleOutput(tokens, sampled.logprobs, tuple(num_logprobs))

    def _prepare(self, rows: list[int]) -> Batch:
        for known, batch in self._batches:
            if known == rows:
                return batch
        batch = self._table.batch(rows)
        self._batches = [(list(rows), batch), *self._batches[:1]]
        return batch


def best_of_ranks(group: Group, logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Each row's most likely token, as `sampling.draw` takes it, from this rank's columns of the logits. int64 [R]."""
    words = torch.arange(vocab_size, device=logits.device)[shard_of(group).part(vocab_size).held]
    # Both are exact in float64. [ranks, 2, R]
    pairs = group.gather(torch.stack([each.double() for each in sampling.most_likely(logits, words)]))
    return sampling.most_likely(pairs[:, 0].T, pairs[:, 1].T)[1].long()
