"""Ranks as threads of one process: a matrix of models and sizes runs without a process to start."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from miniserve.parallel.group import shard_of

T = TypeVar("T")
TIMEOUT = 300.0


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=TIMEOUT)
        self.brought: list[Any] = [None] * size


class ThreadGroup:
    """A `Group`. Ranks that call different things, or with different shapes, fail."""

    inboxes: Any = None

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank, self.size = rank, len(meeting.brought)
        self._meeting = meeting

    def reduce(self, x: Tensor) -> Tensor:
        def total(all_x: list[Tensor]) -> Tensor:
            wide = all_x[0].float().clone()
            for each in all_x[1:]:
                wide += each.float()
            return wide.to(x.dtype)

        return self._meet(("reduce", x.shape, x.dtype), x, total)

    def gather(self, x: Tensor) -> Tensor:
        return self._meet(("gather", x.shape, x.dtype), x, torch.stack)

    def rows(self, x: Tensor, count: int) -> Tensor:
        assert x.shape[1] == shard_of(self).part(count).size
        mine = shard_of(self).part(x.shape[0]).held
        return self._meet(("rows", x.shape[0], x.dtype), x, lambda all_x: torch.cat([each[mine] for each in all_x], 1))

    def exchange(self, message: bytes) -> list[bytes]:
        return self._meet(("exchange",), message, list)

    def _meet(self, kind: tuple[Any, ...], value: Any, use: Callable[[list[Any]], Any]) -> Any:
        meeting = self._meeting
        meeting.brought[self.rank] = (kind, value)
        meeting.barrier.wait()
        assert all(each == kind for each, _ in meeting.brought), [each for each, _ in meeting.brought]
        found = use([each for _, each in meeting.brought])
        meeting.barrier.wait()  # now all have read what each brought
        return found


def run_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """`work` on each rank; raises what the first rank to fail raised, and ends the others."""
    meeting = _Meeting(size)
    torch.set_num_threads(1)

    def on_rank(rank: int) -> T:
        try:
            return work(ThreadGroup(rank, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(on_rank, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def make_inboxes(size: int, device: torch.device, limit: int) -> tuple[list[Tensor], list[Any]]:
    """The `Inboxes` of ranks on one device, and their memory, which the caller keeps."""
    from miniserve.kernels.triton.reduce_norm import EMPTY, INBOX_BYTES, TURNS, Inboxes

    words = TURNS * INBOX_BYTES // 4
    memory = [torch.full((words,), EMPTY, dtype=torch.int32, device=device) for _ in range(size)]
    addresses = torch.tensor([each.data_ptr() for each in memory], device=device)
    states = [torch.zeros(4, dtype=torch.int32, device=device) for _ in range(size)]
    return memory, [Inboxes(addresses, state, rank, limit=limit) for rank, state in enumerate(states)]


class InterpretedInboxes:
    """An `Inboxes` whose programs run one after the other: all ranks push, then all pull. calls: how many sums."""

    def __init__(self, inboxes: Any, barrier: threading.Barrier) -> None:
        self.take, self._barrier, self.calls = inboxes.take, barrier, 0
        self._push, self._pull = (replace(inboxes, phases=phases) for phases in ((True, False), (False, True)))

    def reduce_norm(self, *arguments: Any) -> Tensor:
        self.calls += 1
        self._push.reduce_norm(*arguments)
        self._barrier.wait()
        found: Tensor = self._pull.reduce_norm(*arguments)
        self._barrier.wait()
        return found


def one_kernel_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter changes what is global while it runs a kernel."""
    from triton.runtime.interpreter import GridExecutor

    lock, interpret = threading.Lock(), GridExecutor.__call__

    def interpreted(executor: GridExecutor, *arguments: Any, **named: Any) -> None:
        with lock:
            interpret(executor, *arguments, **named)

    monkeypatch.setattr(GridExecutor, "__call__", interpreted)
