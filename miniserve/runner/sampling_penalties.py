"""Repetition, frequency and presence penalties over the tokens that each row has seen.

A row keeps its distinct tokens with their output counts instead of a count per vocabulary entry, so that time and
memory grow with the context, not with the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miniserve.core import RowStart
from miniserve.runner.sampling_edits import BatchEdit, Edit

_WIDTH_STEP = 64
Int64 = npt.NDArray[np.int64]


class Penalties(Edit):
    """Distinct tokens per row, in order of appearance; grows with the longest penalised row.

    `_ids` and `_counts` are [max_num_seqs, width], `_sizes` [max_num_seqs] says how many entries of a row are in use.
    `_bounds` is the host's upper bound of `_sizes`: only the device knows whether a sampled token is new.
    """

    def __init__(self, vocab_size: int, device: torch.device, max_num_seqs: int) -> None:
        super().__init__(vocab_size, device)
        self._ids = torch.zeros(max_num_seqs, 0, dtype=torch.int64, device=device)
        self._counts = torch.zeros(max_num_seqs, 0, dtype=torch.float32, device=device)
        self._sizes = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._bounds = np.zeros(max_num_seqs, dtype=np.int64)

    def concerns(self, start: RowStart) -> bool:
        return start.request.params.penalised

    def start_row(self, start: RowStart) -> None:
        super().start_row(start)
        row, counts = start.row, dict.fromkeys(start.request.prompt_token_ids, 0)
        for token_id in start.output_token_ids:
            counts[token_id] = counts.get(token_id, 0) + 1
        self._bounds[row] = len(counts)
        self._reserve(len(counts))
        self._ids[row, : len(counts)] = self._to_device(list(counts))
        self._counts[row, : len(counts)] = self._to_device(list(counts.values()), np.float32)
        self._sizes[row].fill_(len(counts))

    def lay_out(self, rows: Sequence[tuple[int, RowStart]]) -> BatchEdit:
        host_rows = np.array([start.row for _, start in rows], np.int64)
        entries, device_rows = self._to_device([entry for entry, _ in rows]), self._to_device(host_rows)
        asked = [start.request.params for _, start in rows]
        factors = [(each.repetition_penalty, each.frequency_penalty, each.presence_penalty) for each in asked]
        return BatchEdit(
            partial(self._penalise, host_rows, device_rows, entries, self._to_device(factors, np.float32)),
            partial(self._count, host_rows, device_rows, entries),
        )

    def _penalise(
        self, host_rows: Int64, rows: Tensor, entries: Tensor, factors: Tensor, logits: Tensor, num_outputs: Tensor
    ) -> None:
        """Repetition (Keskar et al., CTRL, 2019) divides a positive and multiplies a negative logit of any seen token;
        frequency and presence (OpenAI API) subtract per occurrence and once, for output tokens only.

        host_rows, rows: int64 [num_rows], the runner's; entries: int64 [num_rows], batch indices; factors: float32
        [num_rows, 3].
        """
        width = int(self._bounds[host_rows].max())
        if not width:
            return
        place = torch.arange(width, device=logits.device)
        used = place < self._sizes[rows, None]
        # Unused places repeat the first entry: they write what it writes.
        place = torch.where(used, place, 0)
        counts = self._counts[rows[:, None], place]
        target = entries[:, None] * logits.shape[1] + self._ids[rows[:, None], place]
        old = logits.view(-1)[target]
        repetition, frequency, presence = factors.T[:, :, None]
        new = torch.where(old > 0, old / repetition, old * repetition)
        new -= frequency * counts
        new -= presence * (counts > 0)
        new = torch.where(used[:, :1], new, old)  # a row that has seen nothing
        logits.view(-1)[target] = new

    def _count(self, host_rows: Int64, rows: Tensor, entries: Tensor, tokens: Tensor) -> None:
        """Count one output token for each row. tokens: int64 [batch]; the rest as above."""
        bounds = np.minimum(self._bounds[host_rows] + 1, self._vocab_size)
        self._bounds[host_rows] = bounds
        width = int(bounds.max())
        self._reserve(width)
        tokens, sizes = tokens[entries], self._sizes[rows]
        place = torch.arange(width, device=tokens.device)
        match = (self._ids[rows, :width] == tokens[:, None]) & (place < sizes[:, None])
        known = match.any(1)
        place = torch.where(known, (match * place).sum(1), sizes)
        counts = torch.where(known, self._counts[rows, place], 0.0)
        self._ids[rows, place] = tokens
        self._counts[rows, place] = counts + 1
        self._sizes[rows] = sizes + ~known

    def _reserve(self, width: int) -> None:
        have = self._ids.shape[1]
        if width > have:
            more = max(width - have, have, _WIDTH_STEP)
            self._ids = torch.nn.functional.pad(self._ids, (0, more))
            self._counts = torch.nn.functional.pad(self._counts, (0, more))
