"""Products of many rows with a weight in 8 bits by the vendor's library, which multiplies in 8 bits: what is multiplied
is rounded to them first, with scales of its own. On Hopper GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn import functional

GROUP = 128  # values of a row that share a scale where the weight has blocks
_LARGEST = 448.0  # of float8_e4m3fn
_ROW_MULTIPLE = 16  # of what the library multiplies; those beyond x's are anything


@triton.jit(do_not_specialize=["M"])
def _round_kernel(
    x_ptr, codes_ptr, scale_ptr, M, K, x_stride, scale_stride,
    LARGEST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: a tile, each row of which has a scale. NaN and infinite values become NaN."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    offsets = rows[:, None].to(tl.int64)
    x = tl.load(x_ptr + offsets * x_stride + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), 1e-10)
    codes = (x * (LARGEST / largest)[:, None]).to(codes_ptr.dtype.element_ty)
    tl.store(codes_ptr + offsets * K + cols[None, :], codes, mask=inside)
    tl.store(scale_ptr + tl.program_id(1).to(tl.int64) * scale_stride + rows, largest / LARGEST, mask=rows < M)


def rounded(x: torch.Tensor, group: int | None, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], rows may be strided -> float8_e4m3fn codes [rows, K], and the float32 numbers that multiply them: one
    for each `group` values of a row, [⌈K / group⌉, rows], or without it one for each row, [1, rows]. Rows from M on are
    not written."""
    m, k = x.shape
    groups = 1 if group is None else triton.cdiv(k, group)
    codes = torch.empty(rows, k, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(groups, rows, dtype=torch.float32, device=x.device)
    block_m, block_k = (1, triton.next_power_of_2(k)) if group is None else (32, group)
    _round_kernel[(triton.cdiv(m, block_m), groups)](
        x, codes, scales, m, k, x.stride(0), rows, LARGEST=_LARGEST, BLOCK_M=block_m, BLOCK_K=block_k,
        num_warps=min(16, max(4, block_m * block_k // 1024)),
    )  # fmt: skip
    return codes, scales


def rounded_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, K] in 16 bits, weight [N, K] in 8 with scales as of `small_linear`, block 128 x 128 or None -> [M, N], x's
    dtype. N is a multiple of 16, and so is K, or with blocks of 512: the library reads their scales by fours."""
    m = x.shape[0]
    codes, x_scale = rounded(x, None if block is None else GROUP, -(-m // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    kinds = functional.ScalingType
    if block is None:
        recipes, scales = (kinds.RowWise, kinds.RowWise), (x_scale.view(-1, 1), scale[None])
    else:
        recipes, scales = (kinds.BlockWise1x128, kinds.BlockWise128x128), (x_scale.t(), scale.t())
    y = functional.scaled_mm(codes, weight.t(), scales[0], recipes[0], scales[1], recipes[1], output_dtype=x.dtype)[:m]
    return y if bias is None else y + bias
