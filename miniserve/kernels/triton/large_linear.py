# mypy: disable-error-code="assignment, misc"
"""Products of many rows by Hopper's matrix units: SwiGLU's first, and both of routed experts (what `moe.experts`
computes).

Programs stay for many tiles: two warpgroups multiply, each 64 rows by 256 rows of the weight, while one warp keeps a
ring of tiles filled (TMA: copies by descriptor), also with those of the next tile while this one's results are stored.
Rows of experts are first copied into the order of their experts, so that a block of 128 of them is one tile of memory,
and stay in it between the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
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

from miniserve.kernels.triton.launch import cdiv, next_power_of_2
from miniserve.kernels.triton.medium_linear import MOST_ROWS, can_describe
from miniserve.kernels.triton.moe import aligned_pairs
from miniserve.kernels.triton.quick_launch import describe, quick
from miniserve.kernels.triton.small_linear import Chip, chip_of

_BLOCK_M, _BLOCK_N, _BLOCK_K = 128, 256, 64  # rows, rows of the weight and inputs of a tile
_FLAT, _NESTED = (gl.NVMMASharedLayout(128, 16, rank=rank) for rank in (2, 4))
_STAGES = 4
_REGISTERS, _PRODUCER_REGISTERS = 232, 24
_BAND = 16  # blocks of rows that share what the L2 cache holds of a large weight
_LEAST_EXPERT_ROWS = 100  # on average: fewer leave tiles too empty


@quick
@triton.jit(do_not_specialize=["num_pairs"])
def _sort_kernel(
    x_ptr, sorted_ptr, pairs_ptr, experts_ptr, num_pairs, D,
    PAIRS_PER_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row of the aligned order; zeros where it has no pair."""
    row = tl.program_id(0)
    if row // BLOCK_M >= tl.load(experts_ptr):
        return
    pair = tl.load(pairs_ptr + row)
    cols = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (pair // PAIRS_PER_ROW).to(tl.int64) * D + cols, mask=(pair < num_pairs) & (cols < D), other=0)
    tl.store(sorted_ptr + row.to(tl.int64) * D + cols, x, mask=cols < D)


@gluon.jit
def _place(tile, blocks, tiles_n, BAND: gl.constexpr):
    """Block of rows and tile of outputs of a tile: bands of BAND blocks, whose rows then stay in the L2 cache."""
    first = tile // (BAND * tiles_n) * BAND
    width = gl.minimum(blocks - first, BAND)
    inside = tile % (BAND * tiles_n)
    return first + inside % width, inside // width


@gluon.jit
def _produce(
    x_desc, w_desc, xs, ws, ready, free, experts_ptr, blocks, tiles_n, outputs, weight_rows, rounds, BAND: gl.constexpr
):
    """Fills the ring for all of the program's tiles."""
    STAGES: gl.constexpr = ws.type.shape[0]
    GATED: gl.constexpr = len(w_desc.block_type.shape) == 4
    BYTES: gl.constexpr = (xs.type.shape[1] + ws.type.shape[1]) * 64 * 2
    step = 0
    for tile in range(gl.program_id(0), blocks * tiles_n, gl.num_programs(0)):
        block, place = _place(tile, blocks, tiles_n, BAND)
        first_n = place * outputs
        if experts_ptr is not None:
            first_n += gl.load(experts_ptr + 1 + block) * weight_rows
        for k in range(rounds):
            stage = step % STAGES
            mbarrier.wait(free.index(stage), (step // STAGES - 1) & 1, pred=step >= STAGES)
            bar = ready.index(stage)
            mbarrier.expect(bar, BYTES)
            tma.async_copy_global_to_shared(x_desc, [block * xs.type.shape[1], k * 64], bar, xs.index(stage))
            if GATED:
                pairs = ws.index(stage)._reinterpret(w_desc.dtype, w_desc.block_type.shape, w_desc.layout)
                tma.async_copy_global_to_shared(w_desc, [first_n // 8, 0, 0, k * 64], bar, pairs)
            else:
                tma.async_copy_global_to_shared(w_desc, [first_n, k * 64], bar, ws.index(stage))
            step += 1


@gluon.jit
def _consume(
    group, xs, ws, staged, ready, free, y_desc, parts_ptr, scale_ptr, pairs_ptr, num_pairs, blocks, tiles_n, rounds, N,
    BAND: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of each of the program's tiles, times all its rows of the weight."""
    STAGES: gl.constexpr = ws.type.shape[0]
    BLOCK_N: gl.constexpr = ws.type.shape[1]
    halves = xs._reinterpret(xs.dtype, [STAGES * 2, 64, 64], xs.layout)
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]
    )
    step = 0
    for tile in range(gl.program_id(0), blocks * tiles_n, gl.num_programs(0)):
        acc = warpgroup_mma_init(gl.zeros((64, BLOCK_N), gl.float32, layout))
        for k in range(rounds):
            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            left = halves.index(stage * 2 + group)
            acc = warpgroup_mma(left, ws.index(stage).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            mbarrier.arrive(free.index((step + STAGES - 1) % STAGES), pred=k > 0)
            step += 1
        out = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(free.index((step + STAGES - 1) % STAGES))
        block, place = _place(tile, blocks, tiles_n, BAND)
        first_row = block * 128 + group * 64
        if parts_ptr is None:
            _store_gated(out, staged, y_desc, first_row, place * (BLOCK_N // 2))
        else:
            _store_parts(out.to(xs.dtype), parts_ptr, scale_ptr, pairs_ptr + first_row, num_pairs, place * BLOCK_N, N)
    if parts_ptr is None:
        tma.store_wait(0)


@gluon.jit
def _store_gated(out, staged, y_desc, first_row, first_n):
    """SwiGLU of [64, pairs of 8 gates and 8 ups], rounded as if gate and up were stored first."""
    dtype: gl.constexpr = y_desc.dtype
    OUTPUTS: gl.constexpr = out.shape[1] // 2
    gate, up = gl.split(out.reshape((64, OUTPUTS // 8, 2, 8)).permute((0, 1, 3, 2)))
    gate, up = gate.reshape((64, OUTPUTS)), up.reshape((64, OUTPUTS))
    gate = gate.to(dtype).to(gl.float32)
    y = (gate / (1.0 + gl.exp(-gate))).to(dtype) * up.to(dtype)
    tma.store_wait(0)  # until the last tile's have been read
    staged.store(y)
    fence_async_shared()
    tma.async_copy_shared_to_global(y_desc, [first_row, first_n], staged)


@gluon.jit
def _store_parts(out, parts_ptr, scale_ptr, pairs_ptr, num_pairs, first_n, N):
    """Each pair's row to its place, times its weight."""
    layout: gl.constexpr = out.type.layout
    pairs = gl.load(pairs_ptr + gl.arange(0, 64, gl.SliceLayout(1, layout)))
    valid = pairs < num_pairs
    cols = first_n + gl.arange(0, out.shape[1], gl.SliceLayout(0, layout))
    scale = gl.load(scale_ptr + pairs, mask=valid, other=0.0)
    out = out.to(gl.float32) * scale[:, None]
    at = parts_ptr + (pairs.to(gl.int64) * N)[:, None] + cols[None, :]
    gl.store(at, out.to(parts_ptr.dtype.element_ty), mask=valid[:, None] & (cols < N)[None, :])


@quick
@gluon.jit(do_not_specialize=["num_pairs", "blocks"])
def _large_linear_kernel(
    x_desc, w_desc, y_desc, parts_ptr, scale_ptr, pairs_ptr, experts_ptr, num_pairs, blocks, tiles_n, weight_rows,
    rounds, N, BAND: gl.constexpr, STAGES: gl.constexpr, BLOCK_N: gl.constexpr, REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """N counts outputs. experts_ptr: how many blocks there are, and each one's expert; None: `blocks` of one weight."""
    dtype: gl.constexpr = x_desc.dtype
    layout: gl.constexpr = x_desc.layout
    OUTPUTS: gl.constexpr = BLOCK_N if y_desc is None else BLOCK_N // 2
    if experts_ptr is not None:
        blocks = gl.load(experts_ptr)
    xs = gl.allocate_shared_memory(dtype, [STAGES, 128, 64], layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, 64], layout)
    first_staged = gl.allocate_shared_memory(dtype, [64, OUTPUTS if y_desc is not None else 64], layout)
    second_staged = gl.allocate_shared_memory(dtype, [64, OUTPUTS if y_desc is not None else 64], layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    gl.warp_specialize(
        [
            (_consume, (
                0, xs, ws, first_staged, ready, free, y_desc, parts_ptr, scale_ptr, pairs_ptr, num_pairs, blocks,
                tiles_n, rounds, N, BAND,
            )),
            (_consume, (
                1, xs, ws, second_staged, ready, free, y_desc, parts_ptr, scale_ptr, pairs_ptr, num_pairs, blocks,
                tiles_n, rounds, N, BAND,
            )),
            (_produce, (
                x_desc, w_desc, xs, ws, ready, free, experts_ptr, blocks, tiles_n, OUTPUTS, weight_rows, rounds,
                BAND,
            )),
        ],
        [4, 1],
        [REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def can_gate(x: torch.Tensor, weight: torch.Tensor, chip: Chip) -> bool:
    """Whether `large_gated` takes these, and is faster than the vendor's library with a kernel for the activation: if
    programs have little to wait for in their last round. Measured on an H200 (docs/LAB.md)."""
    rows, middle, hidden = x.shape[0], weight.shape[0] // 2, weight.shape[1]
    tiles = cdiv(rows, _BLOCK_M) * cdiv(middle, _BLOCK_N // 2)
    full = 8 * tiles >= 7 * chip.num_sms * cdiv(tiles, chip.num_sms)
    return rows > MOST_ROWS and full and _fits(x, weight, middle, hidden) and can_describe(x)


def large_gated(x: torch.Tensor, weight: torch.Tensor, chip: Chip) -> torch.Tensor:
    """x [M, K], weight [2 N, K] -> [M, N], as of `small_linear` with `gated`, for what `can_gate` allows."""
    y = torch.empty(x.shape[0], weight.shape[0] // 2, dtype=x.dtype, device=x.device)
    _launch(x, weight[None], y, chip, blocks=cdiv(x.shape[0], _BLOCK_M), band=_BAND)
    return y


def can_group(x: torch.Tensor, w1: torch.Tensor, num_pairs: int) -> bool:
    """Whether `large_experts` takes these, and is faster than `moe.experts`."""
    num_experts, middle, hidden = w1.shape[0], w1.shape[1] // 2, w1.shape[2]
    return num_pairs >= _LEAST_EXPERT_ROWS * num_experts and _fits(x, w1, middle, hidden)


def large_experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    chip: Chip,
) -> torch.Tensor:
    """As `moe.experts`, for what `can_group` allows, but in x's dtype: half the bytes to write and to read again."""
    (tokens, hidden), num_experts, k = x.shape, w1.shape[0], topk_ids.shape[1]
    num_pairs = tokens * k
    pairs, block_experts = aligned_pairs(topk_ids, num_experts, _BLOCK_M)
    ordered = torch.empty(len(pairs), hidden, dtype=x.dtype, device=x.device)
    _sort_kernel[(len(pairs),)](
        x, ordered, pairs, block_experts, num_pairs, hidden,
        PAIRS_PER_ROW=k, BLOCK_M=_BLOCK_M, BLOCK=next_power_of_2(hidden), num_warps=4,
    )  # fmt: skip
    activated = torch.empty(len(pairs), w2.shape[2], dtype=x.dtype, device=x.device)
    _launch(ordered, w1, activated, chip, block_experts=block_experts)
    del ordered  # its memory serves the parts
    parts = torch.empty(num_pairs, hidden, dtype=x.dtype, device=x.device)
    _launch(activated, w2, parts, chip, block_experts=block_experts, pairs=pairs, scales=topk_weights)
    return parts


def _fits(x: torch.Tensor, weight: torch.Tensor, middle: int, hidden: int) -> bool:
    """Whether descriptors can describe these."""
    return x.dtype == weight.dtype and x.dtype.itemsize == 2 and middle % 8 == hidden % 8 == 0


def _launch(
    x: torch.Tensor,
    weights: torch.Tensor,
    y: torch.Tensor,
    chip: Chip,
    *,
    blocks: int | None = None,
    block_experts: torch.Tensor | None = None,
    pairs: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    band: int = 1,
) -> None:
    """x [rows, K] by weights [experts, N, K], gated where there are no pairs; with them y's rows are pairs. blocks: of
    rows, where no block_experts have their number."""
    (rows, k), (num_experts, n, _), outputs = x.shape, weights.shape, y.shape[1]
    gated = pairs is None
    if gated:  # groups of 8 rows of the weight, each with its group of gates and, `outputs` rows on, of ups
        shape, strides = ((2 * num_experts - 1) * outputs // 8, 2, 8, k), (8 * k, outputs * k, k, 1)
        weight = describe(weights, shape, strides, (_BLOCK_N // 16, 2, 8, _BLOCK_K), _NESTED)
        out = describe(y, y.shape, (outputs, 1), (_BLOCK_M // 2, _BLOCK_N // 2), _FLAT)
    else:
        weight = describe(weights, (num_experts * n, k), (k, 1), (_BLOCK_N, _BLOCK_K), _FLAT)
        out = None
    tiles_n = cdiv(outputs, _BLOCK_N // 2 if gated else _BLOCK_N)
    _large_linear_kernel[(min(chip.num_sms, tiles_n * cdiv(rows, _BLOCK_M)),)](
        describe(x, (rows, k), (x.stride(0), 1), (_BLOCK_M, _BLOCK_K), _FLAT), weight, out,
        None if gated else y, scales, pairs, block_experts, 0 if gated else len(y), blocks or 0, tiles_n, n,
        cdiv(k, _BLOCK_K), outputs,
        BAND=band, STAGES=_STAGES, BLOCK_N=_BLOCK_N, REGISTERS=_REGISTERS, PRODUCER_REGISTERS=_PRODUCER_REGISTERS,
        num_warps=4,
    )  # fmt: skip


def try_out(device: torch.device) -> None:
    """Multiply once. Raises RuntimeError if the result is wrong, and whatever Triton raises if it cannot compile the
    kernel."""
    x = torch.eye(64, 128, dtype=torch.bfloat16, device=device)
    w1 = torch.full((1, 128, 128), 30.0, dtype=x.dtype, device=device)
    w1[:, 64:] = torch.eye(64, 128, device=device)
    w2 = torch.arange(128 * 64, device=device).remainder(127).to(x.dtype).view(1, 128, 64) / 32
    ids, scales = torch.zeros(64, 1, dtype=torch.int32, device=device), torch.full((64, 1), 0.5, device=device)
    if not torch.equal(large_experts(x, w1, w2, scales, ids, chip_of(device)), 30 * w2[0].T / 2):
        raise RuntimeError("the expert of an identity is not that expert")
