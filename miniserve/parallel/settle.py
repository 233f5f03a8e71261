"""What ranks settle together when they start, so that none goes another way than the others. No torch.

All ranks make the same calls in the same order, whatever goes wrong in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

import msgspec

from miniserve.core import UserError
from miniserve.parallel.link import PeerLost

if TYPE_CHECKING:
    from miniserve.parallel.group import Group

T = TypeVar("T")


@contextmanager
def together(group: Group) -> Iterator[None]:
    """What any rank raises within this block is raised by all at its end: one's own error, or else that of the first
    rank that has one. Nothing within may wait for the other ranks."""
    error: Exception | None = None
    try:
        yield
    except PeerLost:
        raise
    except Exception as raised:
        error = raised
    found = (isinstance(error, UserError), "" if error is None else str(error) or type(error).__name__)
    answers = all_values(group, found, tuple[bool, str])
    if error is not None:
        raise error
    for rank, (for_user, message) in enumerate(answers):
        if message:
            raise UserError(message) if for_user else RuntimeError(f"rank {rank} failed at its start: {message}")


def all_values(group: Group, value: T, kind: type[T]) -> list[T]:
    """Each rank's value, of a type that msgspec knows."""
    message = msgspec.msgpack.encode(value)
    return [msgspec.msgpack.decode(each, type=kind) for each in group.exchange(message)]


def first(group: Group, value: T, kind: type[T]) -> T:
    """Rank 0's."""
    return all_values(group, value, kind)[0]


def least(group: Group, value: int) -> int:
    """The smallest of all ranks' values."""
    return min(all_values(group, value, int))


def first_failure(group: Group, failure: str | None) -> str | None:
    """What fails on one rank has failed on all: the first rank's sentence, None where nothing failed."""
    for rank, sentence in enumerate(all_values(group, failure or "", str)):
        if sentence:
            return f"{sentence} (rank {rank})" if rank else sentence
    return None
