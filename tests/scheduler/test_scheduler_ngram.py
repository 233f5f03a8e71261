"""Guesses from the text so far, against a search that looks at everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miniserve.scheduler.ngram import NGramDrafter


def by_definition(token_ids: list[int], count: int) -> list[int]:
    for size in (4, 3, 2):
        for end in range(len(token_ids) - 1, size - 1, -1):
            if token_ids[end - size : end] == token_ids[-size:]:
                text = list(token_ids)
                for _ in range(count):  # a match that runs into the end reads what it wrote
                    text.append(text[end])
                    end += 1
                return text[len(token_ids) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.lists(st.integers(1, 8), min_size=1, max_size=6), st.integers(1, 9))
def test_the_index_finds_what_a_search_finds(text: list[int], steps: list[int], count: int) -> None:
    token_ids: list[int] = []
    drafter = NGramDrafter(token_ids)
    for step in steps:
        token_ids += text[len(token_ids) : len(token_ids) + step]
        assert drafter.draft(count) == by_definition(token_ids, count)
        assert drafter.draft(1) == by_definition(token_ids, 1)


def test_the_latest_of_the_longest_matches_counts() -> None:
    assert NGramDrafter([1, 2, 3, 4, 5, 9, 3, 4, 6, 1, 2, 3, 4]).draft(3) == [5, 9, 3]
    assert NGramDrafter([1, 2, 5, 1, 2, 6, 1, 2]).draft(2) == [6, 1]
    assert NGramDrafter([7, 7, 7]).draft(4) == [7, 7, 7, 7]
    assert NGramDrafter([1, 2]).draft(4) == NGramDrafter([1]).draft(4) == NGramDrafter([1, 2, 3]).draft(4) == []
