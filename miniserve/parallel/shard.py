"""Which part of a model a rank holds. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from miniserve.core import UserError


@dataclass(frozen=True, slots=True)
class Part:
    """The `held` of `count` rows, columns, heads or experts: a slice with both ends, of none where they are equal.
    begins: what divides the begin of every rank's part; 0 where all begin at 0."""

    count: int
    held: slice
    begins: int = field(default=0, compare=False)

    @property
    def size(self) -> int:
        """How many are held."""
        return int(self.held.stop - self.held.start)

    @property
    def sizes(self) -> int:
        """What divides the size of every rank's part."""
        return math.gcd(self.begins, self.count)

    def times(self, width: int) -> Part:
        """The same part in elements, of things that have `width` elements each."""
        held = slice(self.held.start * width, self.held.stop * width)
        return Part(self.count * width, held, self.begins * width)


def whole(count: int | Part) -> Part:
    """All of `count`; a part stays what it is."""
    return count if isinstance(count, Part) else Part(count, slice(0, count))


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size` that hold a model together. Parts are in the order of the ranks and cover everything."""

    rank: int = 0
    size: int = 1

    def part(self, count: int, unit: int = 1) -> Part:
        """This rank's part, as even as can be in whole units (the last unit may be shorter); earlier ranks have the
        larger ones, later ranks may have nothing."""
        units = -(-count // unit)
        begins = [min(count, unit * _begin(units, rank, self.size)) for rank in range(self.size + 1)]
        return Part(count, slice(*begins[self.rank : self.rank + 2]), math.gcd(*begins[:-1]))

    def heads(self, num_heads: int, num_kv_heads: int) -> tuple[Part, Part]:
        """This rank's query heads, and the KV heads that they read. Where there are fewer KV heads than ranks,
        neighbours hold the same KV head and share its query heads. Raises `UserError` for more ranks than heads."""
        if self.size > num_heads:
            raise UserError(f"{self.size} ranks cannot share {num_heads} heads: use {num_heads} ranks or fewer.")
        group = num_heads // num_kv_heads
        if self.size <= num_kv_heads:
            kv = self.part(num_kv_heads)
            return kv.times(group), kv
        # The first KV heads have the fewest ranks, so that rank 0 has the most query heads.
        parts: list[tuple[int, slice]] = []
        for rank in range(self.size):
            head = ((rank + 1) * num_kv_heads - 1) // self.size
            first, end = (self.size * each // num_kv_heads for each in (head, head + 1))
            mine = Shard(rank - first, end - first).part(group).held
            parts.append((head, slice(head * group + mine.start, head * group + mine.stop)))
        head, queries = parts[self.rank]
        begins = math.gcd(*(each.start for _, each in parts))
        kv = Part(num_kv_heads, slice(head, head + 1), begins=min(1, num_kv_heads - 1))
        return Part(num_heads, queries, begins), kv


def _begin(count: int, index: int, parts: int) -> int:
    """Where part `index` of `count` things in `parts` parts begins."""
    each, more = divmod(count, parts)
    return each * index + min(index, more)
