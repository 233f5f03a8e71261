"""torch's process groups as a `Group`: what threads of one process get, bit for bit. (The ranks are threads here, too,
each with process groups of its own; real processes run in test_parallel_processes.py.)"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from test_parallel_group import contract
from thread_ranks import run_ranks

from miniserve.parallel import distributed
from miniserve.parallel.distributed import DistributedGroup, find_store, open_store, own_address
from miniserve.parallel.group import Group
from miniserve.parallel.link import PeerLost

HOST = "127.0.0.1"


def run_distributed(size: int, work: Callable[[Group], Any]) -> list[Any]:
    store = open_store(HOST, 0)

    def on_rank(rank: int) -> Any:
        own = store if rank == 0 else find_store(HOST, store.port, 30)
        return work(DistributedGroup(own, rank, size, torch.device("cpu"), own_address(HOST, store.port)))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(on_rank, range(size)))


def sums(group: Group) -> list[torch.Tensor]:
    """Few rows, which all ranks add, and many, which have owners; more ranks than rows; integers' bits."""
    random = torch.Generator().manual_seed(group.rank)
    shapes = [(3, 5), (130, 1024), (2, 200_000), (7, 3, 9000), (1, 70_000)]
    found = [group.reduce(torch.randn(shape, generator=random)) for shape in shapes]
    found += [group.reduce(torch.randn(129, 2048, generator=random).bfloat16())]
    return [*found, group.gather(torch.tensor([1 << 40, -group.rank])), group.gather(torch.tensor([group.rank > 0]))]


@pytest.mark.parametrize("size", [2, 3])
def test_process_groups_keep_the_contract(size: int) -> None:
    assert run_distributed(size, contract) == run_ranks(size, contract)


def test_sums_are_in_the_order_of_the_ranks_with_the_same_bits_on_all() -> None:
    want = run_ranks(3, sums)[0]
    for found in run_distributed(3, sums):
        for got, exact in zip(found, want, strict=True):
            assert got.dtype == exact.dtype and torch.equal(got, exact)


def test_messages_may_be_long_or_empty() -> None:
    messages = [b"", b"x" * 100_000, b"\0"]
    assert run_distributed(3, lambda group: group.exchange(messages[group.rank])) == [messages] * 3


def test_nobody_at_the_meeting_place_is_an_error() -> None:
    port = open_store(HOST, 0).port  # gone at once
    with pytest.raises(PeerLost, match=f"no main rank answers at {HOST}:{port}"):
        find_store(HOST, port, 0.5)


def test_gpus_that_share_no_memory_do_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    group = DistributedGroup(open_store(HOST, 0), 0, 1, torch.device("cpu"), HOST)
    errors: list[Exception] = [RuntimeError("no peer access"), PeerLost("gone")]

    def fail(*_: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(distributed, "open_inboxes", fail)
    assert group._open_inboxes() is None
    assert "no peer access" in caplog.text and "without graphs" in caplog.text
    with pytest.raises(PeerLost):
        group._open_inboxes()
