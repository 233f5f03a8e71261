"""Routed experts for one token: the time goes to reading weights, so no tiles for the matrix units."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.pdl import launch_options, start, wait

# Of a weight, that a program reads; measured on an H100 for Qwen3-30B-A3B and DeepSeek-V2-Lite.
_MIDDLE_ROWS, _OUT_ROWS, _OUT_COLUMNS = 2, 2, 512


@triton.jit
def _middle_kernel(
    x_ptr, w_ptr, ids_ptr, y_ptr, N, D,
    E: tl.constexpr, FIRST: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[k] = silu(gate) * up of expert ids[k]; one program: BLOCK_N outputs of one expert."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = (rows < N)[:, None]
    wait(PDL)
    start(PDL)  # not earlier: the next kernel reads `ids` before it waits for this one
    k = tl.program_id(1)
    expert = tl.load(ids_ptr + k).to(tl.int64) - FIRST
    inside &= (expert >= 0) & (expert < E)
    gate_ptrs = w_ptr + (expert * 2 * N + rows)[:, None] * D + cols[None, :]
    gate = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, D, BLOCK_D):
        there = first + cols < D
        x = tl.load(x_ptr + first + cols, mask=there, other=0.0).to(tl.float32)[None, :]
        mask = inside & there[None, :]
        gate += x * tl.load(gate_ptrs + first, mask=mask, other=0.0).to(tl.float32)
        up += x * tl.load(gate_ptrs + N.to(tl.int64) * D + first, mask=mask, other=0.0).to(tl.float32)
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
    x_ptr, w_ptr, ids_ptr, weights_ptr, y_ptr, N, D,
    E: tl.constexpr, FIRST: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = the weighted sum of the experts' products; one program: BLOCK_N outputs of all of them. Summed across threads
    once, at the end: a sum for each expert would be a barrier that delays fetching the next one's weights."""
    start(PDL)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    first = _expert_rows(w_ptr, ids_ptr, 0, rows, cols, N, D, E, FIRST)
    second = _expert_rows(w_ptr, ids_ptr, min(1, K - 1), rows, cols, N, D, E, FIRST)
    wait(PDL)
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for k in tl.static_range(K):
        weight = tl.load(weights_ptr + k)
        for tile in tl.static_range(TILES):
            at = tile * BLOCK_D + cols
            if tile == 0 and k < 2:
                w = first if k == 0 else second
            else:
                w = _expert_rows(w_ptr, ids_ptr, k, rows, at, N, D, E, FIRST)
            x = tl.load(x_ptr + k * D + at, mask=at < D, other=0.0).to(tl.float32) * weight
            acc += x[None, :] * w.to(tl.float32)
    tl.store(y_ptr + rows, tl.sum(acc, axis=1).to(y_ptr.dtype.element_ty), mask=rows < N)


def token_experts(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    first: int | None = None,
) -> torch.Tensor:
    """The weighted sum of one token's SwiGLU experts, in float32. x [1, D]; the rest as `moe.experts`. Returns [1, D],
    x's dtype."""
    k, (hidden, middle) = topk_ids.shape[1], w2.shape[1:]
    options = launch_options(x.device) | {"E": len(w1), "FIRST": first or 0}
    activated = torch.empty(k, middle, dtype=x.dtype, device=x.device)
    _middle_kernel[(triton.cdiv(middle, _MIDDLE_ROWS), k)](
        x, w1, topk_ids, activated, middle, hidden,
        BLOCK_N=_MIDDLE_ROWS, BLOCK_D=min(2048, triton.next_power_of_2(hidden)), num_warps=4, **options,
    )  # fmt: skip
    out = torch.empty_like(x)
    block_d = min(_OUT_COLUMNS, triton.next_power_of_2(middle))
    _out_kernel[(triton.cdiv(hidden, _OUT_ROWS),)](
        activated, w2, topk_ids, topk_weights, out, hidden, middle,
        K=k, TILES=triton.cdiv(middle, block_d), BLOCK_N=_OUT_ROWS, BLOCK_D=block_d, num_warps=2, **options,
    )  # fmt: skip
    return out
