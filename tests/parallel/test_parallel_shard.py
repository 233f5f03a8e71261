"""Parts tile what is shared out, and a rank's query heads read the KV heads that it holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.core import UserError
from miniserve.parallel.shard import Part, Shard, whole


@given(count=st.integers(0, 300), size=st.integers(1, 17), unit=st.integers(1, 70))
def test_parts_tile_the_whole_and_are_even(count: int, size: int, unit: int) -> None:
    parts = [Shard(rank, size).part(count, unit) for rank in range(size)]
    assert [each for part in parts for each in range(count)[part.held]] == list(range(count))
    assert all(part.count == count and part.size == part.held.stop - part.held.start >= 0 for part in parts)
    assert all(part.held.start % unit == 0 or part.size == 0 for part in parts)
    units = [-(-part.size // unit) for part in parts]
    assert units == sorted(units, reverse=True)
    assert max(units) - min(units) <= 1
    assert all(part.held.start == 0 or part.held.start % part.begins == 0 for part in parts)
    assert all(part.size % part.sizes == 0 for part in parts if part.size)


@given(kv=st.integers(1, 9), group=st.integers(1, 9), size=st.integers(1, 40))
def test_heads_cover_and_read_what_their_rank_holds(kv: int, group: int, size: int) -> None:
    if size > kv * group:
        with pytest.raises(UserError, match=f"{size} ranks cannot share {kv * group} heads"):
            Shard(size - 1, size).heads(kv * group, kv)
        return
    queries = []
    for rank in range(size):
        q, kvs = Shard(rank, size).heads(kv * group, kv)
        held = list(range(kv)[kvs.held])
        mine = range(kv * group)[q.held]
        # Every rank has some, as many for each of its KV heads, in their order.
        assert len(mine) % len(held) == 0
        assert [head // group for head in mine] == [each for each in held for _ in range(len(mine) // len(held))]
        assert mine
        for part in (q, kvs):
            assert (part.held.start % part.begins if part.begins else part.held.start) == 0 == part.size % part.sizes
        queries += mine
    assert Shard(0, size).heads(kv * group, kv)[0].size == max(
        Shard(rank, size).heads(kv * group, kv)[0].size for rank in range(size)
    )
    assert queries == list(range(kv * group))


def test_a_part_in_elements() -> None:
    assert Shard(1, 3).part(14).times(8) == Part(112, slice(40, 80))
    assert whole(7) == Shard().part(7) == whole(whole(7))
