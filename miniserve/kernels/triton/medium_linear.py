# mypy: disable-error-code="assignment, misc"
"""Linear layers for 2 to 256 rows, y = x Wᵀ + b, optionally with SwiGLU's activation, by Hopper's matrix units.

A program has up to three warpgroups that multiply, each with 64 rows of the weight as the left operand and the tile's
rows of x as the right one, and one warp that keeps a ring of tiles filled (TMA: copies by descriptor). This way one
round of programs fills the chip where the vendor's library needs two, and the ring fills with weights before the
program waits for x. Long rows may be split among programs, whose sums the caller adds (`linear_parts`). Written in
Gluon, Triton's language in which layouts and the division of labour are explicit.

Weights in 8 bits stay so in the ring, and come to the matrix unit by way of registers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from miniserve.kernels.triton.launch import fullness
from miniserve.kernels.triton.pdl import start, wait
from miniserve.kernels.triton.small_linear import MAX_ROWS, Chip, is_narrow, scale_sizes

MOST_ROWS = 256
_GROUP_ROWS = 64  # of the weight; half as many outputs where they are gated
_ROW_BYTES = 128  # of a swizzled tile of the weight
_MOST_STAGES, _DEEP_STAGES = 8, 16  # the latter where programs have a multiprocessor each
_PRODUCER_REGISTERS = 24
_LEAST_COLUMNS = 256  # of a part
_HELD_ROWS, _OTHER_REGISTERS = 128, 40  # the latter of a thread besides its results


@dataclass(frozen=True, slots=True)
class MediumTile:
    """How a medium linear is cut: block_m rows of x, 64 rows of the weight for each of 1 to 3 warpgroups, num_stages
    tiles of 64 columns (in 8 bits 128) in the ring. early: tiles of the weight to fetch before x is there, whose
    traffic slows the kernel that computes x. splits: programs along the columns. share: the warpgroups have the same
    64 rows and take tiles of columns in turn (8 bits only), num_stages being a multiple of groups: a barrier tells
    apart no more than two fillings of a stage. registers: of a thread on average, a multiple of 8, so that programs of
    the small kernels around this one have room beside it; None: all that a multiprocessor has."""

    block_m: int
    groups: int
    num_stages: int
    early: int = _MOST_STAGES
    splits: int = 1
    share: bool = False
    registers: int | None = None


@gluon.jit
def _fetch_weights(w_desc, ws, ready, stage, first_n, k):
    """64 rows of the weight for each warpgroup; gated, 8 of gates and 8 of ups by turns: a thread then holds an
    output's both."""
    GATED: gl.constexpr = len(w_desc.block_type.shape) == 4
    for group in gl.static_range(len(ws)):
        w = ws[group].index(stage)
        if GATED:
            pairs = w._reinterpret(w_desc.dtype, w_desc.block_type.shape, w_desc.layout)
            tma.async_copy_global_to_shared(w_desc, [(first_n + group * 32) // 8, 0, 0, k], ready, pairs)
        else:
            tma.async_copy_global_to_shared(w_desc, [first_n + group * 64, k], ready, w)


@gluon.jit
def _produce(x_desc, w_desc, xs, ws, ready, free, first_m, first_n, rounds, first_k, EARLY: gl.constexpr):
    """Keeps the ring filled; fetches the weights of its first EARLY tiles before x can be read."""
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_K: gl.constexpr = xs.type.shape[2]
    WEIGHT_BITS: gl.constexpr = w_desc.dtype.primitive_bitwidth
    BYTES: gl.constexpr = (xs.type.shape[1] * 16 + 64 * len(ws) * WEIGHT_BITS) * BLOCK_K // 8
    turn = gl.minimum(STAGES, rounds)
    for i in range(gl.minimum(EARLY, turn)):
        mbarrier.expect(ready.index(i), BYTES)
        _fetch_weights(w_desc, ws, ready.index(i), i, first_n, first_k + i * BLOCK_K)
    wait(True)
    for i in range(turn):
        k = first_k + i * BLOCK_K
        if i >= EARLY:
            mbarrier.expect(ready.index(i), BYTES)
            _fetch_weights(w_desc, ws, ready.index(i), i, first_n, k)
        tma.async_copy_global_to_shared(x_desc, [first_m, k], ready.index(i), xs.index(i))
    for i in range(turn, rounds):
        stage = i % STAGES
        mbarrier.wait(free.index(stage), (i // STAGES - 1) & 1)
        mbarrier.expect(ready.index(stage), BYTES)
        k = first_k + i * BLOCK_K
        _fetch_weights(w_desc, ws, ready.index(stage), stage, first_n, k)
        tma.async_copy_global_to_shared(x_desc, [first_m, k], ready.index(stage), xs.index(stage))


@gluon.jit
def _consume(given, ws, first_n, TURN: gl.constexpr, TURNS: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr):
    """One warpgroup: the outputs of its 64 rows of the weight, for the tile's rows of x. TURNS: warpgroups that have
    the same rows and take tiles of columns in turn; the first of them adds what the others have found."""
    xs, ready, free, sums, done, y_desc, b_ptr, s_ptr, parts_ptr, first_m, rounds, first_k, M, N, K = given
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_M: gl.constexpr = xs.type.shape[1]
    # An instruction's results must fit the registers that a thread has before the warps share them out anew.
    WIDTH: gl.constexpr = BLOCK_M if BLOCK_M < 128 else 128
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, WIDTH, 16])
    if s_ptr is None:
        acc = warpgroup_mma_init(gl.zeros((64, BLOCK_M), gl.float32, layout))
        for i in range(rounds):
            stage = i % STAGES
            mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
            acc = warpgroup_mma(ws.index(stage), xs.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            mbarrier.arrive(free.index((i + STAGES - 1) % STAGES), pred=i > 0)
        out = warpgroup_mma_wait(0, deps=[acc])
    else:
        GATED: gl.constexpr = y_desc is not None and y_desc.block_type.shape[1] == 32
        out = _widened_product(
            xs, ws, ready, free, s_ptr, first_n, rounds, first_k, N, K, layout, GATED, TURN, TURNS, SCALE_N, SCALE_K
        )
        if TURN > 0:
            sums.index(TURN - 1).store(out)
            mbarrier.arrive(done)
        elif TURNS > 1:
            mbarrier.wait(done, 0)
            for other in gl.static_range(TURNS - 1):
                out += sums.index(other).load(layout)
    if TURN > 0:
        pass
    elif parts_ptr is None:
        _store(out, ws, y_desc, b_ptr, first_m, first_n, N)
    else:  # [M, splits, N]
        rows = (first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, layout)))[None, :]
        outputs = (first_n + gl.arange(0, 64, gl.SliceLayout(1, layout)))[:, None]
        part = (rows * gl.num_programs(2) + gl.program_id(2)) * N + outputs
        gl.store(parts_ptr + part, out, mask=(rows < M) & (outputs < N))


@gluon.jit
def _widened_product(
    xs, ws, ready, free, s_ptr, first_n, rounds, first_k, N, K, layout: gl.constexpr, GATED: gl.constexpr,
    TURN: gl.constexpr, TURNS: gl.constexpr, SCALE_N: gl.constexpr, SCALE_K: gl.constexpr,
):  # fmt: skip
    """[64, rows of x] for a weight in 8 bits with scales. A slice of a tile is widened while the one before is
    multiplied."""
    SLICE: gl.constexpr = 32
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_M: gl.constexpr = xs.type.shape[1]
    BLOCK_K: gl.constexpr = xs.type.shape[2]
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))
    # Which row of the weight it is: gated, 8 of gates and 8 of ups by turns.
    rows = first_n + (rows // 16 * 8 + rows % 8 + rows // 8 % 2 * N if GATED else rows)
    inside = rows < (2 * N if GATED else N)
    if SCALE_K > 0:
        s_ptrs = s_ptr + rows // SCALE_N * ((K + SCALE_K - 1) // SCALE_K)
    total = gl.zeros((64, BLOCK_M), gl.float32, layout)
    none = total
    for i in range(TURN, rounds, TURNS):
        stage = i % STAGES
        if SCALE_K > 0:
            scale = gl.load(s_ptrs + gl.minimum(first_k + i * BLOCK_K, K - 1) // SCALE_K, mask=inside, other=0.0)
        mbarrier.wait(ready.index(stage), (i // STAGES) & 1)
        acc = warpgroup_mma_init(total if SCALE_K == 0 else none)
        for first in gl.static_range(0, BLOCK_K, SLICE):
            w = ws.index(stage).slice(first, SLICE, 1).load(operand)
            w = w.to(gl.float32).to(xs.dtype) if xs.dtype == gl.bfloat16 else w.to(xs.dtype)
            x = xs.index(stage).slice(first, SLICE, 1).permute((1, 0))
            acc = warpgroup_mma(w, x, acc, use_acc=SCALE_K == 0 or first > 0, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index(stage))
        total = acc if SCALE_K == 0 else total + acc * scale[:, None]
    if SCALE_K == 0:
        total *= gl.load(s_ptr + rows, mask=inside, other=0.0)[:, None]
    return total


@gluon.jit
def _store(out, ws, y_desc, b_ptr, first_m, first_n, N):
    """What one warpgroup multiplied, [64, rows], turned; with the bias, and gated."""
    BLOCK_M: gl.constexpr = out.shape[1]
    layout: gl.constexpr = out.type.layout
    dtype: gl.constexpr = y_desc.dtype
    OUTPUTS: gl.constexpr = y_desc.block_type.shape[1]
    if OUTPUTS == 32:  # gated
        gate, up = gl.split(out.reshape((4, 2, 8, BLOCK_M)).permute((0, 2, 3, 1)))
        gate, up = gate.reshape((32, BLOCK_M)), up.reshape((32, BLOCK_M))
        if b_ptr is not None:
            outputs = first_n + gl.arange(0, 32, gl.SliceLayout(1, gate.type.layout))
            gate += gl.load(b_ptr + outputs, mask=outputs < N, other=0.0).to(gl.float32)[:, None]
            up += gl.load(b_ptr + N + outputs, mask=outputs < N, other=0.0).to(gl.float32)[:, None]
        # Rounded as gate and up would be if they were stored first.
        gate = gate.to(dtype).to(gl.float32)
        y = (gate / (1.0 + gl.exp(-gate))).to(dtype) * up.to(dtype)
    else:
        if b_ptr is not None:
            outputs = first_n + gl.arange(0, 64, gl.SliceLayout(1, layout))
            out += gl.load(b_ptr + outputs, mask=outputs < N, other=0.0).to(gl.float32)[:, None]
        y = out.to(dtype)
    # Through this warpgroup's part of the ring, which is no longer filled or read.
    turned = ws._reinterpret(dtype, [BLOCK_M, OUTPUTS], y_desc.layout)
    turned.permute((1, 0)).store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [first_m, first_n], turned)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def _medium_linear_kernel(
    x_desc,
    w_desc,
    y_desc,
    b_ptr,
    s_ptr,
    parts_ptr,
    M,
    N,
    K,
    SCALE_N: gl.constexpr,
    SCALE_K: gl.constexpr,
    GROUPS: gl.constexpr,
    SHARE: gl.constexpr,
    STAGES: gl.constexpr,
    EARLY: gl.constexpr,
    REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """N counts outputs. Neighbouring programs share rows of the weight, which then come from the L2 cache."""
    start(True)
    BLOCK_M: gl.constexpr = x_desc.block_type.shape[0]
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    OUTPUTS: gl.constexpr = 64 if y_desc is None else y_desc.block_type.shape[1]
    xs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    w_layout: gl.constexpr = gl.NVMMASharedLayout(128, w_desc.dtype.primitive_bitwidth, rank=2)
    ws = (gl.allocate_shared_memory(w_desc.dtype, [STAGES, 64, BLOCK_K], w_layout),)
    if GROUPS > 1 and not SHARE:
        ws += (gl.allocate_shared_memory(w_desc.dtype, [STAGES, 64, BLOCK_K], w_layout),)
    if GROUPS > 2 and not SHARE:
        ws += (gl.allocate_shared_memory(w_desc.dtype, [STAGES, 64, BLOCK_K], w_layout),)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=len(ws))
    TURNS: gl.constexpr = GROUPS if SHARE else 1
    sums_layout: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, order=[1, 0])
    sums, done = free, free  # stand-ins
    if SHARE:
        sums = gl.allocate_shared_memory(gl.float32, [TURNS - 1, 64, BLOCK_M], sums_layout)
        done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(done, count=TURNS - 1)
    # If M is at least a tile, the last tile overlaps the one before instead of reaching beyond M.
    first_m = gl.minimum(gl.program_id(0) * BLOCK_M, gl.maximum(M - BLOCK_M, 0))
    n0 = gl.program_id(1) * len(ws) * OUTPUTS
    rounds = (K + BLOCK_K * gl.num_programs(2) - 1) // (BLOCK_K * gl.num_programs(2))
    first_k = gl.program_id(2) * rounds * BLOCK_K
    produced = (x_desc, w_desc, xs, ws, ready, free, first_m, n0, rounds, first_k, EARLY)
    given = (xs, ready, free, sums, done, y_desc, b_ptr, s_ptr, parts_ptr, first_m, rounds, first_k, M, N, K)
    # Tuples within the calls: in a variable's, constants would become values.
    if GROUPS == 1:
        gl.warp_specialize(
            [(_consume, (given, ws[0], n0, 0, 1, SCALE_N, SCALE_K)), (_produce, produced)], [1], [PRODUCER_REGISTERS]
        )
    elif GROUPS == 2:
        gl.warp_specialize(
            [
                (_consume, (given, ws[0], n0, 0, TURNS, SCALE_N, SCALE_K)),
                (_consume, (given, ws[-1], n0 + (len(ws) - 1) * OUTPUTS, TURNS - 1, TURNS, SCALE_N, SCALE_K)),
                (_produce, produced),
            ],
            [4, 1],
            [REGISTERS, PRODUCER_REGISTERS],
        )
    elif SHARE:
        gl.warp_specialize(
            [
                (_consume, (given, ws[0], n0, 0, 3, SCALE_N, SCALE_K)),
                (_consume, (given, ws[0], n0, 1, 3, SCALE_N, SCALE_K)),
                (_consume, (given, ws[0], n0, 2, 3, SCALE_N, SCALE_K)),
                (_produce, produced),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (given, ws[0], n0, 0, 1, SCALE_N, SCALE_K)),
                (_consume, (given, ws[1], n0 + OUTPUTS, 0, 1, SCALE_N, SCALE_K)),
                (_consume, (given, ws[2], n0 + 2 * OUTPUTS, 0, 1, SCALE_N, SCALE_K)),
                (_produce, produced),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, PRODUCER_REGISTERS],
        )


# (rows of x, warpgroups), the smallest first.
_CUTS = ((64, 1), (128, 1), (64, 2), (128, 2), (64, 3), (128, 3), (256, 3))


@functools.cache
def choose_medium_tile(m: int, n: int, k: int, itemsize: int, chip: Chip, *, gated: bool) -> MediumTile | None:
    """The smallest cut whose programs for m rows, n outputs and k inputs all run at once, or for up to 64 rows, where
    all is reading the weight, the one of which the last round is fullest; None if there is none, or if `small_linear`
    or the vendor's library is as fast.

    Measured on an H200 over the shapes of Qwen3-0.6B, 8B, 30B-A3B and DeepSeek-V2-Lite (docs/LAB.md).
    """
    if not chip.wgmma or itemsize != 2 or not 2 <= m <= MOST_ROWS or k % 8 or n % 8:
        return None
    if (m <= 16 and gated and k <= 1024) or (m > 128 and not gated and n * k > 1 << (24 if m <= 192 else 23)):
        return None
    outputs = _GROUP_ROWS // 2 if gated else _GROUP_ROWS
    few, large = m <= MAX_ROWS, not gated and n * k > 1 << 24
    if few and n < 32 * outputs:
        return None
    for block_m, groups in [(_rows(m), groups) for groups in (1, 2, 3)] if few else _CUTS:
        row_tiles = triton.cdiv(m, block_m)
        programs = row_tiles * triton.cdiv(n, groups * outputs)
        waste = row_tiles * block_m - m
        fits = few or waste < (32 if large else 64) or (block_m == 128 and not large and not gated)
        if programs <= chip.num_sms and fits:
            return _tile(m, block_m, groups, k, chip, early=_DEEP_STAGES if few else 2)
    if not few:
        return None
    groups = max((3, 2), key=lambda groups: fullness(n / (groups * outputs * chip.num_sms)))
    return _tile(m, _rows(m), groups, k, chip)


@functools.cache
def choose_parts_tile(m: int, n: int, k: int, itemsize: int, chip: Chip) -> MediumTile | None:
    """The cut for a product that a norm then adds to the residual stream: in parts (`linear_parts`) if whole ones would
    use few of the multiprocessors, or half of them for long; else None. Measured as `choose_medium_tile`."""
    if not chip.wgmma or itemsize != 2 or not 2 <= m <= MOST_ROWS or k % 8 or n % 8:
        return None
    tiles, most = triton.cdiv(n, _GROUP_ROWS), 3 * chip.num_sms // 4  # more would be more for the norm to read
    block_m = min(128, _rows(m))
    if block_m == 128 and 6 * tiles <= chip.num_sms:
        block_m = 64
    programs = triton.cdiv(m, block_m) * tiles
    if 3 * programs <= chip.num_sms:
        groups, splits, early = 1, most // programs, 2 if m > MAX_ROWS else _MOST_STAGES
    elif m <= 8 or (k >= 2 * n and m <= 128):
        groups, splits, early = 2, chip.num_sms // triton.cdiv(programs, 2), _MOST_STAGES
    else:
        return None
    splits = min(splits, k // _LEAST_COLUMNS)
    return None if splits < 2 else replace(_tile(m, block_m, groups, k, chip, early), splits=splits)


@functools.cache
def choose_scaled_tile(
    m: int, n: int, k: int, block: tuple[int, int] | None, chip: Chip, *, gated: bool, parts: bool = False
) -> MediumTile | None:
    """The cut for a weight in 8 bits with scales of `block`; None if this kernel cannot, or something else is as fast.
    parts: if it is cut in two parts (`linear_parts`), else None. Measured on an H200 over the shapes of Qwen3-8B."""
    if not chip.wgmma or not 2 <= m <= MOST_ROWS or k % 16 or n % 8 or (block is not None and block[1] % _ROW_BYTES):
        return None
    if not parts and is_narrow(m, n, k, chip, gated=gated):
        return None
    block_m = min(128, _rows(m))
    rows = triton.cdiv(m, block_m)
    tiles, groups = rows * triton.cdiv(n, 32 if gated else _GROUP_ROWS), 3 if block_m < 128 else 2
    share = not gated and tiles <= chip.num_sms
    splits = 2 if parts else 1
    if parts and (not share or splits * tiles > chip.num_sms):
        return None
    if not share:
        groups = next((g for g in range(1, groups) if triton.cdiv(tiles, g) <= chip.num_sms), groups)
    stage = 2 * block_m * _ROW_BYTES + (1 if share else groups) * _GROUP_ROWS * _ROW_BYTES
    sums = (groups - 1) * _GROUP_ROWS * block_m * 4 if share else 0
    stages = min(12 if share else 12 // groups, (chip.shared_bytes - 1024 - sums) // stage)
    if share:  # so that each has a turn's stages for itself
        stages -= stages % groups
    return MediumTile(block_m, groups, stages, early=2, splits=splits, share=share)


def _rows(m: int) -> int:
    """Rows of x in a tile for m of them."""
    return max(16, int(triton.next_power_of_2(m)))


def _tile(m: int, block_m: int, groups: int, k: int, chip: Chip, early: int = _MOST_STAGES) -> MediumTile:
    """early: more than `_MOST_STAGES` makes the ring deep, if rows are long enough to fill it twice."""
    rounds = k // (_ROW_BYTES // 2)
    most = max(_MOST_STAGES, min(early, rounds // 2))
    stage = (block_m + _GROUP_ROWS * groups) * _ROW_BYTES
    stages = min(most, (chip.shared_bytes - 1024) // stage)
    # Of few rows the norm's few programs find room elsewhere. Two rings must not share a multiprocessor: another would
    # have none.
    held = 16 < m <= _HELD_ROWS and 2 * stages * stage > chip.shared_bytes
    registers = block_m // 2 + _OTHER_REGISTERS if held else None
    return MediumTile(block_m, groups, stages, min(early, stages), registers=registers)


def can_describe(x: torch.Tensor) -> bool:
    """Whether x's rows start where a descriptor can: at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) == 1


def medium_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile: MediumTile,
    *,
    gated: bool = False,
    scale: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> torch.Tensor:
    """x [M, K], weight [N, K] or, gated, [2 N, K] -> [M, N], with scale and block as of `small_linear`; N is a multiple
    of 8, block[1] of 128. float16 or bfloat16, for which `can_describe` holds, and a weight of 8 bits with a scale.
    Accumulates in float32."""
    y = torch.empty(x.shape[0], weight.shape[0] // (2 if gated else 1), dtype=x.dtype, device=x.device)
    _launch(x, weight, tile, y=y, bias=bias, gated=gated, scale=scale, block=block)
    return y


def linear_parts(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: MediumTile,
    *,
    scale: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> torch.Tensor:
    """As `medium_linear`, but returns the unsummed parts of the programs along the columns: float32 [M * splits, N], a
    row's parts after one another."""
    parts = torch.empty(x.shape[0] * tile.splits, weight.shape[0], dtype=torch.float32, device=x.device)
    _launch(x, weight, tile, parts=parts, scale=scale, block=block)
    return parts


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    tile: MediumTile,
    *,
    y: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    scale: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    m, k = x.shape
    block_k, bits = _ROW_BYTES // weight.element_size(), 8 * weight.element_size()
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    outputs = _GROUP_ROWS // 2 if gated else _GROUP_ROWS
    flat = gl.NVMMASharedLayout(128, 16, rank=2)
    if gated:
        pairs = gl.NVMMASharedLayout(128, bits, rank=4)
        rows = TensorDescriptor(weight, [n // 8, 2, 8, k], [8 * k, n * k, k, 1], [4, 2, 8, block_k], pairs)
    else:
        layout = gl.NVMMASharedLayout(128, bits, rank=2)
        rows = TensorDescriptor(weight, [n, k], [k, 1], [_GROUP_ROWS, block_k], layout)
    turned = gl.NVMMASharedLayout(2 * outputs, 16, rank=2)
    tiles_n = triton.cdiv(n, outputs if tile.share else tile.groups * outputs)
    _medium_linear_kernel[(triton.cdiv(m, tile.block_m), tiles_n, tile.splits)](
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [tile.block_m, block_k], flat),
        rows,
        None if y is None else TensorDescriptor(y, [m, n], [n, 1], [tile.block_m, outputs], turned),
        bias,
        scale,
        parts,
        m,
        n,
        k,
        **scale_sizes(block),
        GROUPS=tile.groups,
        SHARE=tile.share,
        STAGES=tile.num_stages,
        EARLY=min(tile.early, tile.num_stages),
        REGISTERS=_registers(tile),
        PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        num_warps=4,
        maxnreg=tile.registers,
        launch_pdl=True,
    )


def _registers(tile: MediumTile) -> int:
    """Of a thread that multiplies: an equal share of what the fetching warp and the three idle ones beside it leave."""
    if tile.registers is None:
        return 160 if tile.groups == 3 else 232
    return ((tile.groups + 1) * tile.registers - _PRODUCER_REGISTERS) // tile.groups // 8 * 8


def try_out(device: torch.device) -> None:
    """Multiply once. Raises RuntimeError if the result is wrong, and whatever Triton raises if it cannot compile the
    kernel."""
    x = torch.eye(_GROUP_ROWS, dtype=torch.bfloat16, device=device)
    weight = torch.arange(_GROUP_ROWS**2, device=device).view(_GROUP_ROWS, -1).remainder(127).to(x.dtype)
    tile = MediumTile(_GROUP_ROWS, 1, _MOST_STAGES, registers=_GROUP_ROWS // 2 + _OTHER_REGISTERS)
    if not torch.equal(medium_linear(x, weight, None, tile), weight.T):
        raise RuntimeError("the product of an identity with a matrix is not that matrix")
