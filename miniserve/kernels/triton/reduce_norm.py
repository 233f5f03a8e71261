# mypy: disable-error-code="no-untyped-call"
"""The sum over ranks with the norm that follows it in one kernel, over memory that the ranks of a host share.

Each rank has an inbox on its device that all ranks write to. A program sends this rank's row to all inboxes, waits
until its own inbox has every rank's, sums them in the order of the ranks in float32, rounds once, adds the residual
stream and norms: one trip over the links and no barrier. As in NCCL's LL protocol and TensorRT-LLM's "Lamport" kernels
the data are their own flags: an inbox is full of `EMPTY`, which no sender sends, and a reader reads again while it
finds any. (NaN would be no flag: padding rows may hold it.)

Why no fence is needed to read: a word of 2 or 4 bytes, aligned, arrives as a whole and says itself that it is there, so
that no order among words matters.

Why a region is empty when it is used again: launches (turns) use three regions in rotation, and turn t clears, on its
own device, the region of turn t - 1, which is used again in turn t + 2. The reader of turn t - 1 has completed by then,
as each kernel waits for those before it. And a peer sends in turn t + 2 only after its turn t + 1 has completed, for
which it had every row of this rank's turn t + 1, which this rank sent after its turn t, with the clearing, had
completed.

The turn is counted on the device, by the last program of a launch to come that far, so that replays of a graph go on
counting. All ranks make the same launches in the same order. How much is cleared follows from the size of the turn
before. Rows are sent in the model's dtype: what a rank has is rounded once before the sum, as by `Group.reduce`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.elementwise import rms_normed
from miniserve.kernels.triton.pdl import launch_options, start, wait

# Of 16 bits negative zero, which is sent as zero. Of 32 bits the float32 -4.6e-41, which is sent as zero too.
EMPTY = -0x7FFF8000
_EMPTY = tl.constexpr(EMPTY)
_EMPTY_HALF = tl.constexpr(-0x8000)
# Bytes that all ranks together may send to an inbox in a turn. To push all to all moves `size` times a row, which
# beyond some 10 us at a link's speed is slower than a reduction whose rows have owners.
INBOX_BYTES = 4 << 20
TURNS = 3
_FOREVER = 1 << 62
_CHUNK = 1024  # words of 16 bits that a program of a gather sends


@dataclass(frozen=True, slots=True)
class Inboxes:
    """Those of all ranks. addresses: int64 [size], of each rank's `TURNS` * `INBOX_BYTES` bytes, full of `EMPTY` at
    first. state: int32 [4], zeros at first: the turn, how many of its programs have come, what a rank sent in the turn
    before (in 16 bytes), whether a program gave up. limit: how often a program reads before it gives up; for trials
    only, as steps must end with a right sum or not at all. phases: which halves of a launch run, (push, pull); both,
    except where programs run one after the other."""

    addresses: torch.Tensor
    state: torch.Tensor
    rank: int
    limit: int = _FOREVER
    phases: tuple[bool, bool] = (True, True)

    @property
    def size(self) -> int:
        return len(self.addresses)

    @property
    def capacity(self) -> int:
        """Bytes that a rank may send in a turn."""
        return INBOX_BYTES // self.size // 16 * 16

    def take(self, x: torch.Tensor) -> bool:
        """Whether `reduce_norm` takes rows of this shape and dtype."""
        return x.nbytes <= self.capacity

    def take_gather(self, x: torch.Tensor) -> bool:
        """Whether `gather` takes this."""
        return 0 < 2 * x.nbytes <= self.capacity and x.element_size() % 2 == 0

    def reduce_norm(
        self,
        parts: torch.Tensor,
        shared: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
    ) -> torch.Tensor:
        """Adds to `residual` [T, D], contiguous, the sum over the ranks of what each has: its `parts` [T * K, D] of any
        float, a token's after one another, and `shared` [T, D]. Returns its RMSNorm, `weight` [D]."""
        tokens, size = residual.shape
        out = torch.empty_like(residual)
        block = triton.next_power_of_2(size)
        push, pull = self.phases
        _reduce_norm_kernel[(tokens,)](
            parts, residual if shared is None else shared, residual, weight, out, self.addresses, self.state,
            size, eps, self.capacity, self.limit, self.rank,
            RANKS=self.size, K=parts.shape[0] // tokens, SHARED=shared is not None, BLOCK=block, HALF=_is_half(weight),
            PUSH=push, PULL=pull, num_warps=min(16, max(1, block // 256)), **launch_options(residual.device),
        )  # fmt: skip
        return out

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """As `Group.gather`, bit for bit: x of any dtype whose size is even."""
        words = x.contiguous().view(-1).view(torch.int16)
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        push, pull = self.phases
        _gather_kernel[(triton.cdiv(len(words), _CHUNK),)](
            words, out.view(-1).view(torch.int16), self.addresses, self.state,
            len(words), self.capacity, self.limit, self.rank,
            RANKS=self.size, BLOCK=_CHUNK, PUSH=push, PULL=pull, num_warps=4, **launch_options(x.device),
        )  # fmt: skip
        return out


def _is_half(x: torch.Tensor) -> bool:
    return x.element_size() == 2


@triton.jit
def _region(inboxes_ptr, owner, turn, source, capacity, RANKS: tl.constexpr, WORD: tl.constexpr):
    """Where rank `source` writes to the owner's inbox in a turn."""
    address = tl.load(inboxes_ptr + owner) + (turn * RANKS + source).to(tl.int64) * capacity
    return tl.multiple_of(address.to(tl.pointer_type(WORD)), 16)


@triton.jit
def _push(words, at, inside, inboxes_ptr, turn, capacity, rank, empty, RANKS: tl.constexpr):
    """Send `words` to all ranks, this one last, to the places `at`."""
    words = tl.where(words == empty, 0, words).to(words.dtype)
    for step in tl.static_range(RANKS):
        peer = (rank + 1 + step) % RANKS  # each sends to another one at a time
        region = _region(inboxes_ptr, peer, turn, rank, capacity, RANKS, words.dtype)
        tl.store(region + at, words, mask=inside, cache_modifier=".wt")


@triton.jit
def _arrive(state_ptr, turn, sent):
    """All programs have read the state; the last of them counts the turn, in which a rank sends `sent` words of 32
    bits."""
    tl.debug_barrier()
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, 0)
        tl.store(state_ptr, (turn + 1) % 3)
        tl.store(state_ptr + 2, tl.cdiv(sent, 4))


@triton.jit
def _clear(inboxes_ptr, turn, sent, capacity, rank, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's share of the region of the turn before, in which each rank sent `sent` times 16 bytes."""
    sent *= 4
    for first in range(tl.program_id(0) * BLOCK, sent, tl.num_programs(0) * BLOCK):
        at = first + tl.arange(0, BLOCK)
        for source in tl.static_range(RANKS):
            region = _region(inboxes_ptr, rank, (turn + 2) % 3, source, capacity, RANKS, tl.int32)
            tl.store(region + at, tl.full((BLOCK,), _EMPTY, tl.int32), mask=at < sent, cache_modifier=".wt")


@triton.jit(do_not_specialize=["rank", "limit"])
def _reduce_norm_kernel(
    parts_ptr, shared_ptr, residual_ptr, weight_ptr, out_ptr, inboxes_ptr, state_ptr,
    size, eps, capacity, limit, rank,
    RANKS: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr,
    PUSH: tl.constexpr, PULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token."""
    start(PDL)
    WORD: tl.constexpr = tl.int16 if HALF else tl.int32
    empty: tl.constexpr = _EMPTY_HALF if HALF else _EMPTY
    dtype: tl.constexpr = weight_ptr.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    at = token * size + cols
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    wait(PDL)
    turn, sent = tl.load(state_ptr), tl.load(state_ptr + 2)
    if PUSH:
        total = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(K):
            total += tl.load(parts_ptr + (token * K + k) * size + cols, mask=inside, other=0.0).to(tl.float32)
        if SHARED:
            total += tl.load(shared_ptr + at, mask=inside, other=0.0).to(tl.float32)
        _push(total.to(dtype).to(WORD, bitcast=True), at, inside, inboxes_ptr, turn, capacity, rank, empty, RANKS)
    if PULL:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        _arrive(state_ptr, turn, tl.cdiv(tl.num_programs(0) * size, 2 if HALF else 1))
        _clear(inboxes_ptr, turn, sent, capacity, rank, RANKS, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        missing = 1
        tries = tl.zeros((), tl.int64)
        while (missing != 0) & (tries < limit):
            total = tl.zeros((BLOCK,), tl.float32)
            absent = tl.zeros((BLOCK,), tl.int32)
            for source in tl.static_range(RANKS):  # all are read before the first is looked at
                region = _region(inboxes_ptr, rank, turn, source, capacity, RANKS, WORD)
                words = tl.load(region + at, mask=inside, other=0, cache_modifier=".cv", volatile=True)
                absent = tl.where(words == empty, 1, absent)
                total += words.to(dtype, bitcast=True).to(tl.float32)
            missing = tl.max(absent, axis=0)
            tries += 1
        if missing != 0:
            tl.store(state_ptr + 3, 1)
        x = total.to(dtype) + residual
        tl.store(residual_ptr + at, x, mask=inside)
        tl.store(out_ptr + at, rms_normed(x, weight, size, eps), mask=inside)


@triton.jit(do_not_specialize=["rank", "limit"])
def _gather_kernel(
    x_ptr, out_ptr, inboxes_ptr, state_ptr, count, capacity, limit, rank,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, PUSH: tl.constexpr, PULL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program BLOCK words of 16 bits, each sent as one of 32 bits, which is never `_EMPTY`."""
    start(PDL)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    wait(PDL)
    turn, sent = tl.load(state_ptr), tl.load(state_ptr + 2)
    if PUSH:
        words = tl.load(x_ptr + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
        _push(words, at, inside, inboxes_ptr, turn, capacity, rank, _EMPTY, RANKS)
    if PULL:
        _arrive(state_ptr, turn, count)
        _clear(inboxes_ptr, turn, sent, capacity, rank, RANKS, BLOCK)
        missing = 1
        tries = tl.zeros((), tl.int64)
        while (missing != 0) & (tries < limit):
            absent = tl.zeros((BLOCK,), tl.int32)
            for source in tl.static_range(RANKS):
                region = _region(inboxes_ptr, rank, turn, source, capacity, RANKS, tl.int32)
                words = tl.load(region + at, mask=inside, other=0, cache_modifier=".cv", volatile=True)
                absent = tl.where(words == _EMPTY, 1, absent)
                tl.store(out_ptr + source * count + at, words.to(tl.int16), mask=inside)
            missing = tl.max(absent, axis=0)
            tries += 1
        if missing != 0:
            tl.store(state_ptr + 3, 1)
