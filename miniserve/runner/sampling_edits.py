"""Edits of a row's logits before its token is drawn: allowed tokens, bad words, biases, stop tokens before min_tokens.

Each kind keeps what it knows of rows from step to step, and is laid out for the rows of a batch when these change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miniserve.core import MAX_BAD_WORD, RowStart
from miniserve.runner.sampling_transfer import to_device

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
