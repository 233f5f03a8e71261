"""A weight in 8 bits in the dtype of the activations, for the vendor's library: many rows pay for that."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.small_linear import largest_tile, load_scale, scale_sizes


@triton.jit
def _widen_kernel(
    w_ptr, s_ptr, y_ptr, N, K,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile that lies within a block that has a scale, if there are blocks."""
    row, col = tl.program_id(0) * BLOCK_N, tl.program_id(1) * BLOCK_K
    rows, cols = row + tl.arange(0, BLOCK_N), col + tl.arange(0, BLOCK_K)
    inside = (rows < N)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None].to(tl.int64) * K + cols[None, :]
    if SCALE_K > 0:
        scale = load_scale(s_ptr, row, col, K, SCALE_N, SCALE_K)
    else:
        scale = tl.load(s_ptr + rows, mask=rows < N, other=0.0)[:, None]
    w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * scale
    tl.store(y_ptr + offsets, w.to(y_ptr.dtype.element_ty), mask=inside)


def widen(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> torch.Tensor:
    """weight [N, K] in 8 bits times its scales, as of `small_linear`, rounded once to `dtype`."""
    n, k = weight.shape
    rows, columns = largest_tile(block, 32, 128)
    wide = torch.empty(n, k, dtype=dtype, device=weight.device)
    _widen_kernel[(triton.cdiv(n, rows), triton.cdiv(k, columns))](
        weight, scale, wide, n, k, BLOCK_N=rows, BLOCK_K=columns, num_warps=4, **scale_sizes(block)
    )
    return wide
