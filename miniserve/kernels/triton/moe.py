"""Routed experts on a GPU: tokens grouped by expert, the two grouped products, and the sum of their results.

A pair is a token with one of its experts; token t's k-th is pair t * K + k. Pairs are laid out expert by expert, each
expert's filled up to whole blocks of BLOCK_M, so that a program's rows share an expert (the "aligned" layout of vLLM's
fused_moe). Nothing waits for the host: grids are as large as the worst case, and unused programs return at once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.elementwise import rms_normed
from miniserve.kernels.triton.launch import cdiv, next_power_of_2
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import quick
from miniserve.kernels.triton.rounded_linear import GROUP, rounded
from miniserve.kernels.triton.small_linear import (
    Block,
    accumulator,
    as_columns,
    as_rows,
    chip_of,
    largest_tile,
    load_scale,
    product,
    scale_sizes,
    split_begins,
    swiglu,
)


@dataclass(frozen=True, slots=True)
class MoETile:
    """A program's part of a grouped product: BLOCK_M pairs, BLOCK_N outputs, BLOCK_K inputs a round or, splits > 1,
    so many times that. swap, splits: as in `LinearTile`."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    splits: int = 1


@quick
@triton.jit(do_not_specialize=["num_pairs"])
def _align_kernel(
    ids_ptr, pairs_ptr, experts_ptr, num_pairs,
    E: tl.constexpr, FIRST: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program an expert, the first of which has id FIRST: where its pairs start, and which they are. One more
    counts the blocks in use."""
    start(PDL)
    wait(PDL)
    expert = tl.program_id(0)
    numbers = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    for first in range(0, num_pairs, BLOCK_P):
        pairs = first + tl.arange(0, BLOCK_P)
        ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32) - FIRST
        counts += tl.histogram(tl.where((ids >= 0) & (ids < E), ids, BLOCK_E - 1), BLOCK_E)
    counts = tl.where(numbers < E, counts, 0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(numbers < expert, blocks, 0), axis=0)
    if expert == E:
        tl.store(experts_ptr, first_block)
        return
    num_blocks = tl.sum(tl.where(numbers == expert, blocks, 0), axis=0)
    for block in range(num_blocks):
        tl.store(experts_ptr + 1 + first_block + block, expert)
    rank = tl.zeros((), tl.int32)
    for first in range(0, num_pairs, BLOCK_P):
        pairs = first + tl.arange(0, BLOCK_P)
        ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32)
        mine = (ids - FIRST == expert).to(tl.int32)
        place = first_block * BLOCK_M + rank + tl.cumsum(mine, axis=0) - 1
        tl.store(pairs_ptr + place, pairs, mask=mine == 1)
        rank += tl.sum(mine, axis=0)
    rest = tl.arange(0, BLOCK_M)
    place = first_block * BLOCK_M + rank + rest
    tl.store(pairs_ptr + place, num_pairs + rest * 0, mask=rank + rest < num_blocks * BLOCK_M)


@quick
@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_kernel(
    x_ptr, w_ptr, s_ptr, xs_ptr, scale_ptr, y_ptr, pairs_ptr, experts_ptr, num_pairs, N, D,
    PAIRS_PER_ROW: tl.constexpr, GATED: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[pair] = x[pair // PAIRS_PER_ROW] W[expert]ᵀ, GATED and with `s_ptr` as in `small_linear`, SCALED by the pair's
    weight. N counts outputs, D inputs. Not ALIGNED: a block is one pair, and `experts_ptr` has its expert. xs_ptr: the
    scales of x in 8 bits, [⌈D / GROUP⌉, num_pairs // PAIRS_PER_ROW], tiles lying within a group."""
    if GATED:
        wait(PDL)
    start(PDL)  # not earlier: the second product reads the pairs before it waits for the first
    block = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    if ALIGNED:
        used = tl.load(experts_ptr)
        expert = tl.load(experts_ptr + 1 + block).to(tl.int64)  # all asked for before any of it is there
        pairs = tl.load(pairs_ptr + block * BLOCK_M + rows)
    else:
        used = block + 1
        expert = tl.load(experts_ptr + block).to(tl.int64)
        pairs = tl.where(rows == 0, block, num_pairs)
    if not GATED:
        wait(PDL)
    if block >= used:
        return
    valid = pairs < num_pairs
    cols_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols_k = as_columns(tl.arange(0, BLOCK_K), SPLITS)
    inside_n = cols_n < N
    x_mask = as_rows(valid, SPLITS)
    w_mask = as_rows(inside_n, SPLITS)
    width: tl.constexpr = 2 if GATED else 1
    x_ptrs = x_ptr + as_rows((pairs // PAIRS_PER_ROW).to(tl.int64), SPLITS) * D + cols_k
    w_ptrs = w_ptr + expert * (width * N).to(tl.int64) * D + as_rows(cols_n.to(tl.int64), SPLITS) * D + cols_k
    up_ptrs = w_ptrs + N.to(tl.int64) * D
    if s_ptr is not None:
        s_ptr += expert * (tl.cdiv(width * N, SCALE_N) * (tl.cdiv(D, SCALE_K) if SCALE_K > 0 else 1))
    tile_n = tl.program_id(0) * BLOCK_N
    ROUND: tl.constexpr = SPLITS * BLOCK_K
    at_k = split_begins(BLOCK_K, SPLITS)
    scale = load_scale(s_ptr, tile_n, at_k, D, SCALE_N, SCALE_K) if SCALE_K > 0 else None
    up_scale = load_scale(s_ptr, N + tile_n, at_k, D, SCALE_N, SCALE_K) if GATED and SCALE_K > 0 else None
    acc = accumulator(BLOCK_M, BLOCK_N, SWAP, SPLITS)
    up_acc = tl.zeros_like(acc)
    for first in range(0, D, ROUND):
        at_scale = first // GROUP * (num_pairs // PAIRS_PER_ROW) + pairs // PAIRS_PER_ROW
        x_scale = None if xs_ptr is None else tl.load(xs_ptr + at_scale, mask=valid, other=0.0)
        if EVEN_K:
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        else:
            x = tl.load(x_ptrs, mask=x_mask & (first + cols_k < D), other=0.0)
            w = tl.load(w_ptrs, mask=w_mask & (first + cols_k < D), other=0.0)
        acc = product(acc, w, x, scale, True, SWAP, x_scale)
        if GATED:
            if EVEN_K:
                up = tl.load(up_ptrs, mask=w_mask, other=0.0)
            else:
                up = tl.load(up_ptrs, mask=w_mask & (first + cols_k < D), other=0.0)
            up_acc = product(up_acc, up, x, up_scale, True, SWAP, x_scale)
        if SCALE_K > 0:  # of the next tile
            scale = load_scale(s_ptr, tile_n, at_k + (first + ROUND), D, SCALE_N, SCALE_K)
            if GATED:
                up_scale = load_scale(s_ptr, N + tile_n, at_k + (first + ROUND), D, SCALE_N, SCALE_K)
        x_ptrs += ROUND
        w_ptrs += ROUND
        up_ptrs += ROUND
    if SPLITS > 1:
        acc = tl.sum(acc, axis=0)
        up_acc = tl.sum(up_acc, axis=0)
    if SWAP:
        acc = tl.trans(acc)
        up_acc = tl.trans(up_acc)
    if s_ptr is not None and SCALE_K == 0:
        acc *= tl.load(s_ptr + cols_n, mask=inside_n, other=0.0)[None, :]
        if GATED:
            up_acc *= tl.load(s_ptr + N + cols_n, mask=inside_n, other=0.0)[None, :]
    if GATED:
        acc = swiglu(acc, up_acc, y_ptr.dtype.element_ty)
    if SCALED:
        if xs_ptr is None:
            acc = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
        acc = acc * tl.load(scale_ptr + pairs, mask=valid, other=0.0)[:, None]
    y_ptrs = y_ptr + pairs.to(tl.int64)[:, None] * N + cols_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=valid[:, None] & inside_n[None, :])


@quick
@triton.jit
def _add_pairs_norm_kernel(
    parts_ptr, shared_ptr, residual_ptr, weight_ptr, out_ptr, size, eps,
    K: tl.constexpr, SHARED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token. Rounds as if the sum, the sum with `shared` and the residual were stored one by one."""
    start(PDL)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    wait(PDL)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        total += tl.load(parts_ptr + (token * K + k) * size + cols, mask=inside, other=0.0).to(tl.float32)
    x = total.to(weight.dtype)
    if SHARED:
        x += tl.load(shared_ptr + token * size + cols, mask=inside, other=0.0)
    x += tl.load(residual_ptr + token * size + cols, mask=inside, other=0.0)
    tl.store(residual_ptr + token * size + cols, x, mask=inside)
    tl.store(out_ptr + token * size + cols, rms_normed(x, weight, size, eps), mask=inside)


def choose_tiles(num_pairs: int, num_experts: int, middle: int) -> tuple[MoETile, MoETile]:
    """Tiles of the two products, by an expert's average number of rows; the fewer, the more time goes to reading
    weights. Of a narrow middle few rounds fill no deep ring: programs that share a multiprocessor hide each other's
    waiting instead."""
    rows = num_pairs / num_experts
    if middle <= 256 and middle % 64 == 0 and rows <= 40:
        block_m = 16 if rows <= 12 else 32
        return MoETile(block_m, 64, 64, 4, 5, swap=True), MoETile(block_m, 64, 64, 4, 3, swap=True)
    if num_pairs <= 16:
        return MoETile(16, 64, 64, 4, 5, swap=True), MoETile(16, 64, 128, 4, 5, swap=True)
    if rows <= 12:
        return MoETile(16, 32, 128, 4, 5), MoETile(16, 64, 128, 4, 4, swap=True)
    if rows <= 40:
        return MoETile(32, 64, 64, 4, 5, swap=True), MoETile(32, 64, 128, 4, 4, swap=True)
    if rows <= 100:
        return MoETile(64, 64, 64, 4, 4), MoETile(64, 64, 64, 4, 4)
    return MoETile(128, 64, 64, 8, 3), MoETile(128, 128, 64, 8, 3)


def choose_scaled_tiles(
    num_pairs: int,
    num_experts: int,
    middle: int,
    blocks: tuple[Block, Block],
    *,
    splits: bool,
    rounded: bool = False,
) -> tuple[MoETile, MoETile]:
    """As `choose_tiles`, for weights in 8 bits with scales of `blocks`; rounded: and x in 8 bits. splits: whether tiles
    may have them, for which AMD's compilers run out of registers. Measured, but for
    that, on an H200 for Qwen3-235B-A22B, whole, a half and an eighth of it, and for Qwen3-30B-A3B."""
    if rounded and num_pairs > 100 * num_experts:
        tiles = MoETile(128, 128, 128, 8, 3), MoETile(128, 128, 128, 8, 5)
    elif rounded:
        rows = 64 if num_pairs > 40 * num_experts else 32
        tiles = MoETile(rows, 64, 128, 4, 4, rows == 32), MoETile(rows, 128, 128, 4, 4, rows == 32)
    elif num_pairs > 12 * num_experts:
        tiles = choose_tiles(num_pairs, num_experts, middle)
    elif num_pairs <= 16:
        tiles = MoETile(16, 32, 128, 4, 3), MoETile(16, 64, 128, 2, 3)
    elif splits and num_pairs <= (8 if middle <= 256 else 4) * num_experts:  # of more, many would be read twice
        short = middle % 128 > 0
        tiles = (
            MoETile(8, 16, 128, 2, 4, swap=True, splits=2),
            MoETile(8, 128 if short else 64, 64 if short else 128, 4, 4, swap=True),
        )
    elif middle <= 256:
        tiles = MoETile(16, 16, 128, 1, 5), MoETile(16, 64, 64, 2, 3)
    else:
        tiles = MoETile(16, 32, 128, 4, 5), MoETile(16, 64, 128, 4, 5)

    def fit(tile: MoETile, block: Block) -> MoETile:
        block_n, block_k = largest_tile(block, tile.block_n, tile.block_k)
        return replace(tile, block_n=block_n, block_k=block_k)

    return fit(tiles[0], blocks[0]), fit(tiles[1], blocks[1])


def fitted(tiles: tuple[MoETile, MoETile], itemsize: int, shared_bytes: int) -> tuple[MoETile, MoETile]:
    """Set as many stages, at least one each, as shared memory holds; the first of the two products is gated."""

    def fit(tile: MoETile, width: int) -> MoETile:
        stage = (tile.block_n * width + tile.block_m) * tile.block_k * tile.splits * itemsize
        return replace(tile, num_stages=max(1, min(tile.num_stages, shared_bytes // stage)))

    return fit(tiles[0], 2), fit(tiles[1], 1)


def aligned_pairs(
    topk_ids: torch.Tensor, num_experts: int, block_m: int, first: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of topk_ids [T, K] by expert, each expert's filled up to whole blocks: int32 [blocks * block_m], the
    number of all pairs where there is none; how many blocks are in use, and each one's expert, counted from `first`,
    int32 [1 + blocks]."""
    num_pairs, device = topk_ids.numel(), topk_ids.device
    num_blocks = min(num_pairs, num_experts + num_pairs // block_m)
    pairs = torch.empty(num_blocks * block_m, dtype=torch.int32, device=device)
    block_experts = torch.empty(num_blocks + 1, dtype=torch.int32, device=device)
    many = num_pairs > 8192  # in fewer rounds of more threads
    _align_kernel[(num_experts + 1,)](
        topk_ids, pairs, block_experts, num_pairs,
        E=num_experts, FIRST=first, BLOCK_E=next_power_of_2(num_experts + 1),
        BLOCK_P=8192 if many else min(1024, next_power_of_2(num_pairs)), BLOCK_M=block_m,
        num_warps=16 if many else 4, **launch_options(device),
    )  # fmt: skip
    return pairs, block_experts


def experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    tiles: tuple[MoETile, MoETile] | None = None,
    first: int | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    blocks: tuple[Block, Block] = (None, None),
    rounds: bool = False,
) -> torch.Tensor:
    """The weighted results of each token's SwiGLU experts. x [T, D], contiguous; w1 [E, 2 I, D], gates before ups; w2
    [E, D, I]; topk_weights float32, topk_ids int, [T, K]. tiles: of the two products, with the same block_m; chosen by
    default. first: the id of the first of these experts, where the model has more; the others give zeros. scales: of w1
    and w2 in 8 bits, each expert's as in `small_linear`, with their `blocks`; rounds: what is multiplied with them is
    rounded to 8 bits, a scale for each `GROUP` values of a row. Returns float32 [T * K, D], a token's after one
    another."""
    tokens, hidden = x.shape
    num_experts, k, middle = w1.shape[0], topk_ids.shape[1], w2.shape[2]
    num_pairs = tokens * k
    options = launch_options(x.device)
    if tiles is None:
        sizes, chip = (num_pairs, num_experts, middle), chip_of(x.device) if x.device.type == "cuda" else None
        if scales is None:
            tiles = choose_tiles(*sizes)
        else:
            tiles = choose_scaled_tiles(*sizes, blocks, splits=chip is not None and chip.wgmma, rounded=rounds)
        if chip is not None:
            tiles = fitted(tiles, 1 if rounds else x.element_size(), chip.shared_bytes)
    gate_up, down = tiles
    aligned = tokens > 1 or first is not None
    if aligned:
        pairs, block_experts = aligned_pairs(topk_ids, num_experts, gate_up.block_m, first or 0)
        num_blocks = len(block_experts) - 1
    else:
        pairs, block_experts, num_blocks = topk_ids, topk_ids, num_pairs

    def multiply(source: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, tile: MoETile, per_row: int) -> None:
        n, gated = target.shape[1], tile is gate_up
        scale, x_scale = None if scales is None else scales[0 if gated else 1], None
        if rounds:
            source, x_scale = rounded(source, GROUP, len(source))
        _grouped_kernel[(cdiv(n, tile.block_n), num_blocks)](
            source, weight, scale, x_scale, topk_weights, target, pairs, block_experts, num_pairs, n, weight.shape[2],
            PAIRS_PER_ROW=per_row, GATED=gated, SCALED=not gated, ALIGNED=aligned, SWAP=tile.swap,
            EVEN_K=weight.shape[2] % (tile.block_k * tile.splits) == 0, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k, SPLITS=tile.splits, num_warps=tile.num_warps, num_stages=tile.num_stages,
            **scale_sizes(blocks[0 if gated else 1]), GROUP=GROUP, **options,
        )  # fmt: skip

    activated = torch.empty(num_pairs, middle, dtype=x.dtype, device=x.device)
    multiply(x, w1, activated, gate_up, k)
    make = torch.empty if first is None else torch.zeros  # nobody writes pairs of other experts
    parts = make(num_pairs, hidden, dtype=torch.float32, device=x.device)
    multiply(activated, w2, parts, down, 1)
    return parts


def add_pairs_norm(
    parts: torch.Tensor,
    shared: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Sums each token's `parts`, as `experts` returns them, adds them and `shared` [T, D] to `residual` [T, D], and
    returns its RMSNorm, `weight` [D]: one kernel instead of three."""
    tokens, size = residual.shape
    out = torch.empty_like(residual)
    block = next_power_of_2(size)
    _add_pairs_norm_kernel[(tokens,)](
        parts, residual if shared is None else shared, residual, weight, out, size, eps,
        K=parts.shape[0] // tokens, SHARED=shared is not None, BLOCK=block, num_warps=min(16, max(1, block // 512)),
        **launch_options(parts.device),
    )  # fmt: skip
    return out
