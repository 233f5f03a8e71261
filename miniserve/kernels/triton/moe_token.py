"""Routed experts for one token: the time goes to reading weights, so no tiles for the matrix units."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.small_linear import CHUNK, Block, columns, load_scale, product, scale_sizes

# The rows and columns of a weight that a program takes at a time, and its warps; of the first and the second product.
# Measured on an H200 for Qwen3-30B-A3B and DeepSeek-V2-Lite.
_MIDDLE, _OUT = (2, 1024, 2), (2, 512, 2)
# The same in 8 bits, measured for Qwen3-235B-A22B: of the first product for at most 512 rows and for more, of the
# second likewise.
_SCALED_MIDDLE, _SCALED_OUT = ((2, 1024, 4), (2, 1024, 1)), ((2, 256, 1), (8, 512, 4))
# Where the second product fetches all experts' rows at once: how many a program, by a weight's bytes.
_AT_ONCE = {2: 2, 1: 4}


@triton.jit
def _scales(
    s_ptr, expert, row, at, N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N rows from `row` on of an expert's weight [N, D], for the chunks of BLOCK_D columns from `at` on; by
    blocks also of several experts, [K, 1]."""
    if SCALE_K > 0:
        s_ptr += expert * (tl.cdiv(N, SCALE_N) * tl.cdiv(D, SCALE_K))
        chunks = at + tl.arange(0, BLOCK_D // CHUNK)[None, :] * CHUNK
        scales = load_scale(s_ptr, row, chunks, D, SCALE_N, SCALE_K)
    else:
        rows = row + tl.arange(0, BLOCK_N)[:, None]
        scales = tl.load(s_ptr + expert * N + rows, mask=rows < N, other=0.0)
    return scales


@triton.jit
def _middle_kernel(
    x_ptr, w_ptr, s_ptr, ids_ptr, y_ptr, N, D,
    E: tl.constexpr, FIRST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[k] = silu(gate) * up of expert ids[k]; one program: BLOCK_N outputs of one expert."""
    row = tl.program_id(0) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    cols = columns(BLOCK_D, s_ptr is not None)
    inside = (rows < N)[:, None]
    wait(PDL)
    start(PDL)  # not earlier: the next kernel reads `ids` before it waits for this one
    k = tl.program_id(1)
    expert = tl.load(ids_ptr + k).to(tl.int64) - FIRST
    here = (expert >= 0) & (expert < E)
    inside &= here
    expert = tl.where(here, expert, 0)  # of other ranks' experts no scales are read either
    gate_ptrs = w_ptr + (expert * 2 * N + rows)[:, None] * D + cols[None, :]
    WIDTH: tl.constexpr = BLOCK_D if s_ptr is None else BLOCK_D // CHUNK
    gate = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    up = tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for first in range(0, D, BLOCK_D):
        there = first + cols < D
        x = tl.load(x_ptr + first + cols, mask=there, other=0.0)[None, :]
        mask = inside & there[None, :]
        w = tl.load(gate_ptrs + first, mask=mask, other=0.0)
        up_w = tl.load(gate_ptrs + N.to(tl.int64) * D + first, mask=mask, other=0.0)
        if s_ptr is None:
            gate = product(gate, w, x, None, False, False)
            up = product(up, up_w, x, None, False, False)
        else:
            scale = _scales(s_ptr, expert, row, first, 2 * N, D, BLOCK_N, BLOCK_D, SCALE_N, SCALE_K)
            gate = product(gate, w, x, scale, False, False)
            scale = _scales(s_ptr, expert, N + row, first, 2 * N, D, BLOCK_N, BLOCK_D, SCALE_N, SCALE_K)
            up = product(up, up_w, x, scale, False, False)
    dtype = x_ptr.dtype.element_ty
    wide = tl.sum(gate, axis=1).to(dtype).to(tl.float32)
    silu = (wide / (1.0 + tl.exp(-wide))).to(dtype)
    tl.store(y_ptr + k * N + rows, silu * tl.sum(up, axis=1).to(dtype), mask=rows < N)


@triton.jit
def _expert_rows(w_ptr, ids_ptr, k, rows, at, N, D, E: tl.constexpr, FIRST: tl.constexpr):
    """Of expert ids[k]: [rows, at] of its weight [N, D]; zeros of one that is not here."""
    expert = tl.load(ids_ptr + k).to(tl.int64) - FIRST
    pointers = w_ptr + (expert * N + rows)[:, None] * D + at[None, :]
    here = (rows < N) & (expert >= 0) & (expert < E)
    return tl.load(pointers, mask=here[:, None] & (at < D)[None, :], other=0.0)


@triton.jit
def _out_kernel(
    x_ptr, w_ptr, s_ptr, ids_ptr, weights_ptr, y_ptr, N, D,
    E: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = the weighted sum of the experts' products; one program: BLOCK_N outputs of all of them. Summed across threads
    once, at the end: a sum for each expert would be a barrier that delays fetching the next one's weights. AT_ONCE: all
    their weights are fetched before the wait."""
    start(PDL)
    row = tl.program_id(0) * BLOCK_N
    rows = row + tl.arange(0, BLOCK_N)
    cols = columns(BLOCK_D, s_ptr is not None)
    if AT_ONCE:
        ks = tl.arange(0, K)
        expert = tl.load(ids_ptr + ks).to(tl.int64) - FIRST
        here = ((expert >= 0) & (expert < E))[:, None, None] & (rows < N)[None, :, None] & (cols < D)[None, None, :]
        w_ptrs = w_ptr + (expert[:, None, None] * N + rows[None, :, None]) * D + cols[None, None, :]
        w = tl.load(w_ptrs, mask=here, other=0.0).to(tl.float32)
        if s_ptr is not None:
            expert = tl.where((expert >= 0) & (expert < E), expert, 0)[:, None]
            if SCALE_K > 0:
                scale = _scales(s_ptr, expert, row, 0, N, D, BLOCK_N, BLOCK_D, SCALE_N, SCALE_K)[:, None, :]
            else:
                scale = tl.load(s_ptr + expert * N + tl.minimum(rows, N - 1)[None, :])[:, :, None]
        wait(PDL)
        x = tl.load(x_ptr + ks[:, None] * D + cols[None, :], mask=(cols < D)[None, :], other=0.0).to(tl.float32)
        weights = tl.load(weights_ptr + ks)[:, None]
        if s_ptr is None:
            products = w * (x * weights)[:, None, :]
        else:
            products = tl.reshape(w * x[:, None, :], (K, BLOCK_N, BLOCK_D // CHUNK, CHUNK))
            products = tl.sum(products, axis=3) * (scale * weights[:, None])
        y = tl.sum(tl.sum(products, axis=0), axis=1)
        tl.store(y_ptr + rows, y.to(y_ptr.dtype.element_ty), mask=rows < N)
        return
    first = _expert_rows(w_ptr, ids_ptr, 0, rows, cols, N, D, E, FIRST)
    second = _expert_rows(w_ptr, ids_ptr, min(1, K - 1), rows, cols, N, D, E, FIRST)
    wait(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_D if s_ptr is None else BLOCK_D // CHUNK), tl.float32)
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + k)
        for tile in tl.static_range(TILES):
            at = tile * BLOCK_D + cols
            if tile == 0 and k < 2:
                w = first if k == 0 else second
            else:
                w = _expert_rows(w_ptr, ids_ptr, k, rows, at, N, D, E, FIRST)
            x = tl.load(x_ptr + k * D + at, mask=at < D, other=0.0).to(tl.float32) * weight
            if s_ptr is None:
                acc = product(acc, w, x[None, :], None, False, False)
            else:
                expert = tl.load(ids_ptr + k).to(tl.int64) - FIRST
                expert = tl.where((expert >= 0) & (expert < E), expert, 0)
                scale = _scales(s_ptr, expert, row, tile * BLOCK_D, N, D, BLOCK_N, BLOCK_D, SCALE_N, SCALE_K)
                acc = product(acc, w, x[None, :], scale, False, False)
    tl.store(y_ptr + rows, tl.sum(acc, axis=1).to(y_ptr.dtype.element_ty), mask=rows < N)


def token_experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    first: int | None = None,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    blocks: tuple[Block, Block] = (None, None),
) -> torch.Tensor:
    """The weighted sum of one token's SwiGLU experts, in float32. x [1, D]; the rest as `moe.experts`. Returns [1, D],
    x's dtype."""
    w1_scale, w2_scale = scales or (None, None)
    middle_tile, out_tile = _MIDDLE, _OUT
    if scales is not None:
        large = w2.shape[2] > 512
        middle_tile, out_tile = _SCALED_MIDDLE[large], _SCALED_OUT[large]
    k, (hidden, middle) = topk_ids.shape[1], w2.shape[1:]
    options = launch_options(x.device) | {"E": len(w1), "FIRST": first or 0}
    activated = torch.empty(k, middle, dtype=x.dtype, device=x.device)
    _middle_kernel[(triton.cdiv(middle, middle_tile[0]), k)](
        x, w1, w1_scale, topk_ids, activated, middle, hidden,
        BLOCK_N=middle_tile[0], BLOCK_D=min(middle_tile[1], triton.next_power_of_2(hidden)), num_warps=middle_tile[2],
        **scale_sizes(blocks[0]), **options,
    )  # fmt: skip
    out = torch.empty_like(x)
    block_d = min(out_tile[1], triton.next_power_of_2(middle))
    at_once = middle <= block_d <= 256 and k == triton.next_power_of_2(k) <= 8
    rows = _AT_ONCE.get(w2.element_size(), 1) if at_once else out_tile[0]
    _out_kernel[(triton.cdiv(hidden, rows),)](
        activated, w2, w2_scale, topk_ids, topk_weights, out, hidden, middle,
        K=k, TILES=triton.cdiv(middle, block_d), AT_ONCE=at_once, BLOCK_N=rows, BLOCK_D=block_d,
        num_warps=1 if at_once else out_tile[2],
        **scale_sizes(blocks[1]), **options,
    )  # fmt: skip
    return out
