"""Edits of a row's logits before its token is drawn: allowed tokens, bad words, biases, stop tokens before min_tokens,
penalties.

Each kind keeps what it knows of rows from step to step, and is laid out for the rows of a batch when these change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miniserve.core import MAX_BAD_WORD, RowStart
from miniserve.runner.device import to_device

Int64 = npt.NDArray[np.int64]
_WIDTH_STEP = 64
_ANY, _NONE = -1, -2  # no ids: a place that matches whatever was drawn; a place where nothing was drawn yet


@dataclass(frozen=True, slots=True)
class BatchEdit:
    """What an edit does in a batch of some rows. apply(logits, num_outputs): in place; float32 [batch, vocab_size], and
    the rows' output tokens so far, int64 [batch]. record(tokens): note what the rows drew, int64 [batch]."""

    apply: Callable[[Tensor, Tensor], object]
    record: Callable[[Tensor], None] | None = None


class Edit(ABC):
    """One kind of edit. `rows`: those it is for, as they started."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size, self._device = vocab_size, device
        self.rows: dict[int, RowStart] = {}

    @abstractmethod
    def concerns(self, start: RowStart) -> bool:
        """Whether a request asks for it."""

    def start_row(self, start: RowStart) -> None:
        """Take in a row that it concerns."""
        self.rows[start.row] = start

    @abstractmethod
    def lay_out(self, rows: Sequence[tuple[int, RowStart]]) -> BatchEdit:
        """For a batch: the batch indices of the rows that it concerns, ascending, and how these started."""

    def _to_device(self, values: npt.ArrayLike, dtype: type[np.generic] = np.int64) -> Tensor:
        return to_device(np.array(values, dtype), self._device)


class AllowedTokens(Edit):
    def concerns(self, start: RowStart) -> bool:
        return start.request.params.allowed_token_ids is not None

    def lay_out(self, rows: Sequence[tuple[int, RowStart]]) -> BatchEdit:
        entries = self._to_device([entry for entry, _ in rows])
        allowed = [np.array(start.request.params.allowed_token_ids, np.int64) for _, start in rows]
        # Indices into the flattened logits, and into those of these rows alone.
        places, own_places = (
            self._to_device(
                np.concatenate([n * self._vocab_size + ids for n, ids in zip(numbers, allowed, strict=True)])
            )
            for numbers in ([entry for entry, _ in rows], range(len(rows)))
        )

        def keep(logits: Tensor, num_outputs: Tensor) -> None:
            kept = torch.full((len(entries), logits.shape[1]), float("-inf"), device=logits.device)
            kept.view(-1)[own_places] = logits.view(-1)[places]
            logits.index_copy_(0, entries, kept)

        return BatchEdit(keep)


class BadWords(Edit):
    """Keeps the last tokens that each row drew, int64 [max_num_seqs, MAX_BAD_WORD - 1], the latest rightmost."""

    def __init__(self, vocab_size: int, device: torch.device, max_num_seqs: int) -> None:
        super().__init__(vocab_size, device)
        self._drawn = torch.full((max_num_seqs, MAX_BAD_WORD - 1), _NONE, dtype=torch.int64, device=device)

    def concerns(self, start: RowStart) -> bool:
        return bool(start.request.params.bad_words)

    def start_row(self, start: RowStart) -> None:
        super().start_row(start)
        width = self._drawn.shape[1]
        self._drawn[start.row] = self._to_device(([_NONE] * width + start.output_token_ids)[-width:])

    def lay_out(self, rows: Sequence[tuple[int, RowStart]]) -> BatchEdit:
        words = [(entry, start.row, word) for entry, start in rows for word in start.request.params.bad_words]
        width = max(len(word) for _, _, word in words) - 1
        # Of each word: the row that must not spell it, all but its last token, and that one in the flattened logits.
        word_rows = self._to_device([row for _, row, _ in words])
        starts = self._to_device([(_ANY,) * (width + 1 - len(word)) + word[:-1] for _, _, word in words])
        places = self._to_device([entry * self._vocab_size + word[-1] for entry, _, word in words])
        drawing = self._to_device([entry for entry, _ in rows])
        drawing_rows = self._to_device([start.row for _, start in rows])

        def ban(logits: Tensor, num_outputs: Tensor) -> None:
            drawn = self._drawn[word_rows][:, self._drawn.shape[1] - width :]
            spelt = ((starts == drawn) | (starts == _ANY)).all(1)
            # Sums, as two words may end with the same token.
            bans = torch.zeros(len(spelt), device=logits.device).masked_fill_(spelt, float("-inf"))
            logits.view(-1).index_add_(0, places, bans)

        def record(tokens: Tensor) -> None:
            earlier = self._drawn[drawing_rows][:, 1:]
            self._drawn[drawing_rows] = torch.cat((earlier, tokens[drawing][:, None]), 1)

        return BatchEdit(ban, record)


class Biases(Edit):
    def concerns(self, start: RowStart) -> bool:
        return bool(start.request.params.logit_bias)

    def lay_out(self, rows: Sequence[tuple[int, RowStart]]) -> BatchEdit:
        biases = [(entry, start.request.params.logit_bias or {}) for entry, start in rows]
        places = self._to_device([entry * self._vocab_size + token_id for entry, bias in biases for token_id in bias])
        values = self._to_device([value for _, bias in biases for value in bias.values()], np.float32)
        return BatchEdit(lambda logits, num_outputs: logits.view(-1).index_add_(0, places, values))


class EarlyStops(Edit):
    """Until a row has `min_tokens`, neither EOS nor one of its stop_token_ids is drawn."""

    def __init__(self, vocab_size: int, device: torch.device, eos_token_ids: Collection[int]) -> None:
        super().__init__(vocab_size, device)
        self._eos_token_ids = frozenset(eos_token_ids)

    def concerns(self, start: RowStart) -> bool:
        return len(start.output_token_ids) < start.request.params.min_tokens

    def lay_out(self, rows: Sequence[tuple[int, RowStart]]) -> BatchEdit:
        found = [
            (entry * self._vocab_size + token_id, entry, params.min_tokens)
            for entry, params in ((entry, start.request.params) for entry, start in rows)
            for token_id in self._eos_token_ids.union(params.stop_token_ids)
            if 0 <= token_id < self._vocab_size  # another cannot be drawn anyhow
        ]
        places, entries, least = self._to_device(np.array(found, np.int64).reshape(-1, 3).T)

        def forbid(logits: Tensor, num_outputs: Tensor) -> None:
            flat, early = logits.view(-1), num_outputs[entries] < least
            flat[places] = flat[places].masked_fill_(early, float("-inf"))

        return BatchEdit(forbid)


class Penalties(Edit):
    """Repetition, frequency and presence penalties over the tokens that each row has seen.

    A row keeps its distinct tokens, in order of appearance, with their output counts instead of a count per vocabulary
    entry, so that time and memory grow with the context, not with the vocabulary.

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


def make_edits(
    max_num_seqs: int, vocab_size: int, device: torch.device, eos_token_ids: Collection[int]
) -> tuple[Edit, ...]:
    """In the order in which they apply."""
    return (
        AllowedTokens(vocab_size, device),
        BadWords(vocab_size, device, max_num_seqs),
        Biases(vocab_size, device),
        EarlyStops(vocab_size, device, eos_token_ids),
        Penalties(vocab_size, device, max_num_seqs),
    )
