"""The sum over ranks in the kernel of the norm: every rank pushes, then every rank pulls, so that programs may run one
after the other. What they do at the same time `tests/parallel/test_parallel_gpu.py` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from thread_ranks import make_inboxes
from triton_support import DEVICE, normal, on_gpu  # before anything imports Triton

from miniserve.kernels.triton.elementwise import add_rms_norm
from miniserve.kernels.triton.reduce_norm import EMPTY, TURNS, Inboxes
from miniserve.parallel import peer_memory

EPS = 1e-6
FEWER = [(3, torch.float32), pytest.param(2, torch.bfloat16, marks=on_gpu)]


class Ranks:
    """Inboxes of `size` ranks on one device."""

    def __init__(self, size: int) -> None:
        self.memory, self.inboxes = make_inboxes(size, DEVICE, limit=2)

    def run(self, launch: Callable[[Inboxes], torch.Tensor]) -> list[torch.Tensor]:
        """A turn of all ranks; `launch` on each of them, twice."""
        turn = int(self.inboxes[0].state[0])
        for memory in self.memory:
            assert (memory.view(TURNS, -1)[turn] == EMPTY).all(), "the region was not cleared"
        for each in self.inboxes:
            launch(replace(each, phases=(True, False)))
        found = [launch(replace(each, phases=(False, True))) for each in self.inboxes]
        assert [each.state.tolist()[3] for each in self.inboxes] == [0] * len(found), "a rank gave up"
        return found


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int16 if x.element_size() == 2 else torch.int32)


@pytest.mark.parametrize(("size", "dtype"), [*((size, torch.float16) for size in range(1, 9)), *FEWER])
def test_ten_turns_are_the_sum_in_the_order_of_the_ranks_then_the_norm(size: int, dtype: torch.dtype) -> None:
    ranks = Ranks(size)
    shapes = [(1, 100), (3, 33), (1, 7), (1, 257), (2, 48)] * 2  # rows that begin at odd places, and sizes that change
    for turn, (tokens, width) in enumerate(shapes):
        k, shared = turn % 3 + 1, turn % 2 == 1
        parts = [normal(10 * turn + rank, tokens * k, width) for rank in range(size)]
        more = [normal(rank, tokens, width, dtype=dtype) if shared else None for rank in range(size)]
        if k == 1:
            parts = [part.to(dtype) for part in parts]
        for part in parts:
            part[0, :5] = torch.tensor([-0.0, 0.0, torch.inf, -1e-40, -0.0], device=DEVICE)
        parts[0][-k:] = torch.nan  # a padding row
        residual, weight = normal(97, tokens, width, dtype=dtype), normal(98, width, dtype=dtype)
        streams = [residual.clone() for _ in range(size)]
        normed = ranks.run(
            lambda box, a=parts, b=more, c=streams, w=weight: box.reduce_norm(
                a[box.rank], b[box.rank], c[box.rank], w, EPS
            )
        )
        total = torch.zeros(tokens, width, device=DEVICE)
        for part, each in zip(parts, more, strict=True):
            own = torch.zeros_like(total)
            for row in part.float().view(tokens, k, width).unbind(1):
                own += row
            total += (own if each is None else own + each.float()).to(dtype).float()
        want = residual.clone()
        want_normed = add_rms_norm(total.to(dtype), want, weight, EPS)
        for got, stream in zip(normed, streams, strict=True):
            finite = ~want.isnan()
            assert torch.equal(stream.isnan(), ~finite) and torch.equal(stream[finite], want[finite])
            assert torch.equal(got.isnan(), want_normed.isnan())
            assert torch.equal(bits(got), bits(normed[0]))
            assert torch.equal(got[:-1].nan_to_num(), want_normed[:-1].nan_to_num())


@pytest.mark.parametrize("size", [2, 5])
def test_a_gather_keeps_every_bit(size: int) -> None:
    ranks = Ranks(size)
    generator = torch.Generator().manual_seed(0)
    for shape in ((1, 1), (2, 1500), (3, 7), (2, 2, 600)):
        sent = [torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int().to(DEVICE) for _ in range(size)]
        for index, each in enumerate((EMPTY, -0x80000000, 0x8000, 0)):
            sent[0].view(-1)[: index + 1] = each
        for got in ranks.run(lambda box, sent=sent: box.gather(sent[box.rank])):
            assert torch.equal(got, torch.stack(sent))


def test_sums_and_gathers_take_turns() -> None:
    ranks, weight = Ranks(3), normal(0, 64)
    for turn in range(9):
        x, residual = [normal(turn + rank, 2, 64) for rank in range(3)], normal(5, 2, 64)
        if turn % 2:
            (first, *others) = ranks.run(lambda box, x=x: box.gather(x[box.rank]))
            assert torch.equal(first, torch.stack(x)) and all(torch.equal(first, each) for each in others)
        else:
            found = ranks.run(lambda box, x=x, r=residual: box.reduce_norm(x[box.rank], None, r.clone(), weight, EPS))
            want = add_rms_norm(x[0] + x[1] + x[2], residual.clone(), weight, EPS)
            assert all(torch.equal(each, want) for each in found)


def test_a_peer_that_sends_nothing_is_noticed_within_the_limit() -> None:
    ranks = Ranks(2)
    first = ranks.inboxes[0]
    x = normal(0, 1, 64)
    first.reduce_norm(x, None, x.clone(), normal(1, 64), EPS)
    assert int(first.state[3]) == 1


def test_what_is_too_large_or_odd_is_not_taken() -> None:
    inboxes = Ranks(2).inboxes[0]
    assert inboxes.take(torch.empty(256, 4096, dtype=torch.bfloat16))
    assert not inboxes.take(torch.empty(257, 4096, dtype=torch.bfloat16))
    assert inboxes.take_gather(torch.empty(1 << 18, dtype=torch.int32))
    assert not inboxes.take_gather(torch.empty((1 << 18) + 1, dtype=torch.int32))
    assert not inboxes.take_gather(torch.empty(0)) and not inboxes.take_gather(torch.empty(2, dtype=torch.int8))


def test_a_trial_finds_inboxes_that_nobody_writes_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_memory, "_TRIAL_LIMIT", 2)
    memory, (alone,) = make_inboxes(1, DEVICE, limit=2)
    peer_memory._try_out(alone, DEVICE)
    others, (first, _) = make_inboxes(2, DEVICE, limit=2)
    with pytest.raises(RuntimeError, match="does not arrive"):
        peer_memory._try_out(first, DEVICE)
    assert len(memory + others) == 3
