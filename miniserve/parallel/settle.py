"""What ranks settle together when they start, so that none goes another way than the others. No torch.

All ranks make the same calls in the same order, whatever goes wrong in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import msgspec

from miniserve.core import UserError
from miniserve.parallel.link import PeerLost

T = TypeVar("T")


class Exchanging(Protocol):
    """What is needed of a `Group`."""

    def exchange(self, message: bytes) -> list[bytes]: ...


@contextmanager
def together(group: Exchanging) -> Iterator[None]:
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
    answers = [msgspec.msgpack.decode(each, type=tuple[bool, str]) for each in group.exchange(_encode(found))]
    if error is not None:
        raise error
    for rank, (for_user, message) in enumerate(answers):
        if message:
            raise UserError(message) if for_user else RuntimeError(f"rank {rank} failed at its start: {message}")


def first(group: Exchanging, value: T, kind: type[T]) -> T:
    """Rank 0's value, of a type that msgspec knows."""
    return msgspec.msgpack.decode(group.exchange(_encode(value))[0], type=kind)


def least(group: Exchanging, value: int) -> int:
    """The smallest of all ranks' values."""
    return min(msgspec.msgpack.decode(each, type=int) for each in group.exchange(_encode(value)))


def all_values(group: Exchanging, value: T, kind: type[T]) -> list[T]:
    """Each rank's."""
    return [msgspec.msgpack.decode(each, type=kind) for each in group.exchange(_encode(value))]


def first_failure(group: Exchanging, failure: str | None) -> str | None:
    """What fails on one rank has failed on all: the first rank's sentence, None where nothing failed."""
    found = [(rank, each) for rank, each in enumerate(all_values(group, failure or "", str)) if each]
    return f"{found[0][1]}{f' (rank {found[0][0]})' if found[0][0] else ''}" if found else None


_encode = msgspec.msgpack.Encoder().encode
