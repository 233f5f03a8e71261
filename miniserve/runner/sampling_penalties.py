"""Repetition, frequency and presence penalties over the tokens that each row has seen.

A row keeps its distinct tokens with their output counts instead of a count per vocabulary entry, so that time and
memory grow with the context, not with the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from miniserve.kernels.sampling import FREQUENCY, PRESENCE, REPETITION
from miniserve.runner.sampling_transfer import to_device

_WIDTH_STEP = 64


@dataclass(frozen=True, slots=True)
class PenalisedRows:
    """The penalised rows of a batch."""

    entries: torch.Tensor  # int64 [num_rows], batch indices
    rows: torch.Tensor  # int64 [num_rows], the runner's rows
    host_rows: npt.NDArray[np.int64]  # the same on the host
    numbers: torch.Tensor  # float32 [num_rows, NUM_COLUMNS], see `RowParams`


class SeenTokens:
    """Distinct tokens per row, in order of appearance; grows with the longest penalised row.

    `_ids` and `_counts` are [max_num_seqs, width], `_sizes` [max_num_seqs] says how many entries of a row are in use.
    `_bounds` is the host's upper bound of `_sizes`: only the device knows whether a sampled token is new.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._ids = torch.zeros(max_num_seqs, 0, dtype=torch.int64, device=device)
        self._counts = torch.zeros(max_num_seqs, 0, dtype=torch.float32, device=device)
        self._sizes = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._bounds = np.zeros(max_num_seqs, dtype=np.int64)

    def start_row(self, row: int, prompt_token_ids: list[int], output_token_ids: list[int]) -> None:
        counts = dict.fromkeys(prompt_token_ids, 0)
        for token_id in output_token_ids:
            counts[token_id] = counts.get(token_id, 0) + 1
        self._bounds[row] = len(counts)
        self._reserve(len(counts))
        device = self._ids.device
        self._ids[row, : len(counts)] = to_device(np.array(list(counts), np.int64), device)
        self._counts[row, : len(counts)] = to_device(np.array(list(counts.values()), np.float32), device)
        self._sizes[row].fill_(len(counts))

    def penalise(self, logits: torch.Tensor, batch: PenalisedRows) -> None:
        """Apply the penalties to the rows `batch.entries` of logits (float32 [batch, vocab_size]) in place.

        Repetition (Keskar et al., CTRL, 2019) divides a positive and multiplies a negative logit of any seen token;
        frequency and presence (OpenAI API) subtract per occurrence and once, for output tokens only.
        """
        width = int(self._bounds[batch.host_rows].max())
        if not width:
            return
        rows, place = batch.rows[:, None], torch.arange(width, device=logits.device)
        used = place < self._sizes[batch.rows, None]
        # Unused places repeat the first entry: they write what it writes.
        place = torch.where(used, place, 0)
        counts = self._counts[rows, place]
        target = batch.entries[:, None] * logits.shape[1] + self._ids[rows, place]
        old = logits.view(-1)[target]
        repetition, frequency, presence = (batch.numbers[:, i, None] for i in (REPETITION, FREQUENCY, PRESENCE))
        new = torch.where(old > 0, old / repetition, old * repetition)
        new -= frequency * counts
        new -= presence * (counts > 0)
        new = torch.where(used[:, :1], new, old)  # a row that has seen nothing
        logits.view(-1)[target] = new

    def record(self, tokens: torch.Tensor, batch: PenalisedRows) -> None:
        """Count one output token for each penalised row. tokens: int64 [batch]."""
        bounds = np.minimum(self._bounds[batch.host_rows] + 1, self._vocab_size)
        self._bounds[batch.host_rows] = bounds
        width = int(bounds.max())
        self._reserve(width)
        tokens = tokens[batch.entries]
        sizes = self._sizes[batch.rows]
        place = torch.arange(width, device=tokens.device)
        match = (self._ids[batch.rows, :width] == tokens[:, None]) & (place < sizes[:, None])
        known = match.any(1)
        place = torch.where(known, (match * place).sum(1), sizes)
        counts = torch.where(known, self._counts[batch.rows, place], 0.0)
        self._ids[batch.rows, place] = tokens
        self._counts[batch.rows, place] = counts + 1
        self._sizes[batch.rows] = sizes + ~known

    def _reserve(self, width: int) -> None:
        have = self._ids.shape[1]
        if width > have:
            more = max(width - have, have, _WIDTH_STEP)
            self._ids = torch.nn.functional.pad(self._ids, (0, more))
            self._counts = torch.nn.functional.pad(self._counts, (0, more))
