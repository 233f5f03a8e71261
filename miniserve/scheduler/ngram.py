"""Guesses at a sequence's next tokens from the sequence itself: what followed when its last tokens came up before.

Known as prompt lookup decoding (Saxena 2023) and n-gram speculation. It needs no second model, and guesses well where
an answer repeats its prompt or itself.
"""

from __future__ import annotations

_SIZES = (4, 3, 2)  # of the n-grams that are looked up, the most reliable first


class NGramDrafter:
    """Guesses for one sequence, whose `token_ids` others append to. Each token is indexed once, at the next draft."""

    def __init__(self, token_ids: list[int]) -> None:
        self._token_ids = token_ids
        self._ends: dict[tuple[int, ...], int] = {}  # of each n-gram, where its latest occurrence ends
        self._num_indexed = 0

    def draft(self, count: int) -> list[int]:
        """`count` tokens that may come next, or none: those after the latest earlier occurrence of the longest n-gram
        at the end. If they run into the end, the text is assumed to repeat."""
        token_ids = self._token_ids
        self._index(len(token_ids) - 1)  # the n-grams at the very end have not occurred *before*
        for size in _SIZES:
            end = self._ends.get(tuple(token_ids[-size:]))
            if end is not None:
                period = len(token_ids) - end
                known = token_ids[end : end + count]
                return [known[index % period] for index in range(count)]
        return []

    def _index(self, until: int) -> None:
        """Index all n-grams that end before or at `until`."""
        for size in _SIZES:
            first, last = max(self._num_indexed + 1 - size, 0), until - size  # where they begin
            if first <= last:
                columns = (self._token_ids[first + place : last + place + 1] for place in range(size))
                self._ends.update(zip(zip(*columns, strict=True), range(first + size, until + 1), strict=True))
        self._num_indexed = max(self._num_indexed, until)
