"""What ranks tell one another arrives whole, in order and with the same bits."""

from __future__ import annotations

import threading

import pytest
import torch
from thread_ranks import ThreadGroup, run_ranks

from miniserve.parallel.group import Alone, Group, gather_rows, shard_of


def contract(group: Group) -> dict[str, object]:
    """What a rank gets; any `Group` of the same size gives the same (of `rows`: its part)."""
    rank = group.rank
    x = torch.arange(12, dtype=torch.float32).view(3, 4) * (rank + 1)
    logits = torch.arange(35, dtype=torch.float32).view(5, 7)
    part = shard_of(group).part(7)
    owned = group.rows(logits[:, part.held].contiguous(), 7)
    assert torch.equal(owned, logits[shard_of(group).part(5).held])
    counts = [max(0, 2 - each) for each in range(group.size)]
    return {
        "reduce": group.reduce(x.clone()).tolist(),
        "rounded once": group.reduce(torch.full((2,), 1.0 if rank else 256.0, dtype=torch.bfloat16)).tolist(),
        "gather": group.gather(torch.tensor([rank, 7])).tolist(),
        "uneven": gather_rows(group, torch.full((counts[rank], 2), rank), counts).tolist(),
        "exchange": group.exchange(b"x" * rank),
    }


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_threads_keep_the_contract(size: int) -> None:
    found = run_ranks(size, contract)
    assert all(each == found[0] for each in found)
    total = sum(range(1, size + 1))
    assert found[0]["reduce"] == (torch.arange(12.0).view(3, 4) * total).tolist()
    # In bfloat16 256 + 1 is 256: a sum that rounds at each step would never get away from it.
    assert found[0]["rounded once"] == torch.full((2,), 255.0 + size).to(torch.bfloat16).tolist()
    assert found[0]["gather"] == [[rank, 7] for rank in range(size)]
    assert found[0]["uneven"] == [[0, 0], [0, 0], [1, 1]][: 2 if size == 1 else 3]
    assert found[0]["exchange"] == [b"x" * rank for rank in range(size)]


def test_one_rank_alone_keeps_the_contract_and_has_the_shapes_of_many() -> None:
    assert contract(Alone()) == run_ranks(1, contract)[0]
    group = Alone(2, 3)
    assert group.rows(torch.ones(4, 33), 100).shape == (1, 100)
    assert group.gather(torch.ones(4, 3)).shape == (3, 4, 3)
    assert gather_rows(group, torch.ones(1, 2), [2, 1, 1]).shape == (4, 2)


def test_a_rank_that_fails_ends_all() -> None:
    def work(group: ThreadGroup) -> None:
        group.exchange(b"")
        if group.rank == 1:
            raise ValueError("rank 1")
        group.exchange(b"")

    before = threading.active_count()
    with pytest.raises(ValueError, match="rank 1"):
        run_ranks(3, work)
    assert threading.active_count() <= before
