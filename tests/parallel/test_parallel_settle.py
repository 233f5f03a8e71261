"""What ranks settle: one rank's error is everybody's, and everybody goes the same way."""

from __future__ import annotations

import pytest
from thread_ranks import ThreadGroup, run_ranks

from miniserve.core import UserError
from miniserve.parallel.group import Alone
from miniserve.parallel.settle import first, first_failure, least, together


def test_a_rank_that_cannot_go_on_stops_all_with_its_sentence() -> None:
    def work(group: ThreadGroup) -> str:
        try:
            with together(group):
                if group.rank:
                    raise UserError(f"rank {group.rank} has no memory")
        except UserError as error:
            return str(error)
        return "went on"

    assert run_ranks(3, work) == ["rank 1 has no memory", "rank 1 has no memory", "rank 2 has no memory"]


def test_a_bug_of_one_rank_stops_all_and_names_it() -> None:
    def work(group: ThreadGroup) -> str:
        with pytest.raises((RuntimeError, ZeroDivisionError)) as raised, together(group):
            if group.rank == 2:
                raise ZeroDivisionError
        return str(raised.value)

    assert run_ranks(3, work) == ["rank 2 failed at its start: ZeroDivisionError"] * 2 + [""]


def test_values_are_the_least_the_first_and_the_first_that_fails() -> None:
    def work(group: ThreadGroup) -> tuple[int, tuple[str, ...], str | None, str | None]:
        with together(group):
            pass
        order = ("A:linear", "B:linear")[:: 1 - 2 * (group.rank % 2)]
        failure = ["", "", "wrong", "worse"][group.rank]
        found = least(group, 10 - group.rank), first(group, order, tuple[str, ...])
        return *found, first_failure(group, failure or None), first_failure(group, None)

    assert run_ranks(4, work) == [(7, ("A:linear", "B:linear"), "wrong (rank 2)", None)] * 4
    assert first_failure(Alone(), "wrong") == "wrong"
