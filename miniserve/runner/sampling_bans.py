"""Tokens that a row must not draw: all but its allowed ones, and what would complete one of its bad words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from miniserve.core import MAX_BAD_WORD
from miniserve.runner.sampling_transfer import to_device

_ANY, _NONE = -1, -2  # no ids: a place that matches whatever was drawn; a place where nothing was drawn yet


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """entries: int64 [num_rows], batch indices of the rows with allowed tokens; places: int64, what is allowed, as
    indices into the flattened logits; own_places: the same into those rows alone."""

    entries: torch.Tensor
    places: torch.Tensor
    own_places: torch.Tensor

    def apply(self, logits: torch.Tensor) -> None:
        """In place. logits: float32 [batch, vocab_size]."""
        kept = torch.full((len(self.entries), logits.shape[1]), float("-inf"), device=logits.device)
        kept.view(-1)[self.own_places] = logits.view(-1)[self.places]
        logits.index_copy_(0, self.entries, kept)


def allowed_tokens(
    allowed: Sequence[tuple[int, Sequence[int]]], vocab_size: int, device: torch.device
) -> AllowedTokens:
    """Of pairs of a batch index and what is allowed there."""
    entries = [entry for entry, _ in allowed]
    places = [np.array(ids, np.int64) + entry * vocab_size for entry, ids in allowed]
    own = [np.array(ids, np.int64) + index * vocab_size for index, (_, ids) in enumerate(allowed)]
    return AllowedTokens(
        to_device(np.array(entries, np.int64), device),
        to_device(np.concatenate(places), device),
        to_device(np.concatenate(own), device),
    )


@dataclass(frozen=True, slots=True)
class BadWords:
    """Of each sequence of a row: rows: int64, whose outputs it is looked for in; starts: int64 [num, width], all but
    its last token, from the right, _ANY before; places: int64, its last token, as an index into the flattened logits.
    drawing: int64, batch indices of the rows that have such sequences; drawing_rows: int64, these rows."""

    rows: torch.Tensor
    starts: torch.Tensor
    places: torch.Tensor
    drawing: torch.Tensor
    drawing_rows: torch.Tensor


def bad_words(
    words: Sequence[tuple[int, int, Sequence[Sequence[int]]]], vocab_size: int, device: torch.device
) -> BadWords:
    """Of triples of a batch index, its row, and the sequences not to be spelt there."""
    flat = [(entry, row, word) for entry, row, sequences in words for word in sequences]
    width = max(len(word) for _, _, word in flat) - 1
    starts = np.full((len(flat), width), _ANY, np.int64)
    for index, (_, _, word) in enumerate(flat):
        if len(word) > 1:
            starts[index, width + 1 - len(word) :] = word[:-1]
    places = [entry * vocab_size + word[-1] for entry, _, word in flat]
    columns = (
        [row for _, row, _ in flat],
        starts,
        places,
        [entry for entry, _, _ in words],
        [row for _, row, _ in words],
    )
    return BadWords(*(to_device(np.array(column, np.int64), device) for column in columns))


class LastTokens:
    """The last tokens that each row drew, int64 [max_num_seqs, MAX_BAD_WORD - 1], the latest rightmost."""

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._tokens = torch.full((max_num_seqs, MAX_BAD_WORD - 1), _NONE, dtype=torch.int64, device=device)

    def start_row(self, row: int, output_token_ids: Sequence[int]) -> None:
        width = self._tokens.shape[1]
        tokens = np.array([_NONE] * width + list(output_token_ids), np.int64)[-width:]
        self._tokens[row] = to_device(tokens.copy(), self._tokens.device)

    def ban(self, logits: torch.Tensor, words: BadWords) -> None:
        """Forbid, in place, what would complete one of the sequences. logits: float32 [batch, vocab_size]."""
        width = words.starts.shape[1]
        drawn = self._tokens[words.rows][:, self._tokens.shape[1] - width :]
        spelt = ((words.starts == drawn) | (words.starts == _ANY)).all(1)
        # Sums, as two sequences may end with the same token.
        bans = torch.zeros(len(spelt), device=logits.device).masked_fill_(spelt, float("-inf"))
        logits.view(-1).index_add_(0, words.places, bans)

    def record(self, tokens: torch.Tensor, words: BadWords) -> None:
        """Note the token that each row with such sequences drew. tokens: int64 [batch]."""
        earlier = self._tokens[words.drawing_rows][:, 1:]
        self._tokens[words.drawing_rows] = torch.cat((earlier, tokens[words.drawing][:, None]), 1)
