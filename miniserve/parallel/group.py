"""What the ranks of a model tell one another. All ranks make the same calls in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from miniserve.parallel.shard import Part, Shard

if TYPE_CHECKING:
    from miniserve.kernels.triton.reduce_norm import Inboxes


class Group(Protocol):
    """The ranks that hold a model together. Tensors lie on the ranks' device, messages on the host.

    What a call returns has the same bits on each rank, but for `rows`; it is the caller's, and the argument may be
    overwritten as soon as the call has returned (on an asynchronous device: as soon as it is enqueued). A peer that is
    gone is an error; no call waits for ever.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def inboxes(self) -> Inboxes | None:
        """Through which kernels of the ranks exchange rows themselves; None where their devices cannot."""
        ...

    def reduce(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, of the same shape and dtype: added in float32 in the order of the ranks, whatever
        the library would do, and rounded once. x may be overwritten."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """x [...] of any dtype, of the same shape on each rank -> [size, ...], in the order of the ranks."""
        ...

    def rows(self, x: Tensor, count: int) -> Tensor:
        """From parts of columns to parts of rows. x [R, n], the same R on each rank, is this rank's `Shard.part` of
        `count` columns; returns all `count` columns of its `Shard.part` of the R rows. Either part may be empty."""
        ...

    def exchange(self, message: bytes) -> list[bytes]:
        """Each rank's message, in the order of the ranks; lengths may differ."""
        ...


class Alone:
    """A rank without others. With a size beyond 1 it has the shapes of one rank of many, to be measured or counted;
    what it computes has no meaning then."""

    inboxes: Inboxes | None = None

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def reduce(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x.expand(self.size, *x.shape)

    def rows(self, x: Tensor, count: int) -> Tensor:
        if self.size == 1:
            return x
        return x.new_zeros(shard_of(self).part(x.shape[0]).size, count)

    def exchange(self, message: bytes) -> list[bytes]:
        return [message] * self.size


def shard_of(group: Group) -> Shard:
    return Shard(group.rank, group.size)


def parts_of_all(group: Group, count: int) -> list[Part]:
    """Each rank's part of `count` rows after `Group.rows`."""
    return [Shard(rank, group.size).part(count) for rank in range(group.size)]


def gather_rows(group: Group, x: Tensor, counts: Sequence[int]) -> Tensor:
    """One after the other, the rows that ranks have: x [counts[rank], ...] -> [sum(counts), ...]."""
    if group.size == 1:
        return x
    padded = torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, max(counts) - len(x)))
    return torch.cat([part[:count] for part, count in zip(group.gather(padded), counts, strict=True)])
