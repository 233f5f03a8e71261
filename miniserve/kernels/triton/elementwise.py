"""The small operations of a decoder between its matrix products: norms, qk-norm with rope, SwiGLU's middle.

Each rounds where `models/layers/ops.py` does, so that results differ only by the order of sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.launch import cdiv, next_power_of_2
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import quick


@triton.jit
def rms_normed(x, weight, size, eps):
    """The norm of a row x of `size` values, zeros behind them."""
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / size + eps)
    return weight * wide.to(x.dtype)


@quick
@triton.jit
def _rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, size, x_row, eps,
    ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start(PDL)
    token = tl.program_id(0).to(tl.int64)
    row = token * size
    cols = tl.arange(0, BLOCK)
    inside = cols < size
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0)
    wait(PDL)
    x = tl.load(x_ptr + token * x_row + cols, mask=inside, other=0.0)
    if ADD:
        x = x + tl.load(residual_ptr + row + cols, mask=inside, other=0.0)
        tl.store(residual_ptr + row + cols, x, mask=inside)
    tl.store(out_ptr + row + cols, rms_normed(x, weight, size, eps), mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [T, size], whose rows may be strided, weight [size], same dtype -> [T, size], contiguous."""
    return _norm(x, x, weight, eps, add=False)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Adds x into `residual` (both [T, size], contiguous) and returns the norm of the sum."""
    return _norm(x, residual, weight, eps, add=True)


def _norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, add: bool) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    size = x.shape[-1]
    block = next_power_of_2(size)
    _rms_norm_kernel[(x.numel() // size,)](
        x, residual, weight, out, size, x.stride(0), eps,
        ADD=add, BLOCK=block, num_warps=min(16, max(1, block // 512)), **launch_options(x.device),
    )  # fmt: skip
    return out


@quick
@triton.jit
def _silu_mul_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    start(PDL)
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < size
    wait(PDL)
    gate = tl.load(x_ptr + row * 2 * size + cols, mask=inside, other=0.0)
    up = tl.load(x_ptr + row * 2 * size + size + cols, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    tl.store(out_ptr + row * size + cols, (wide / (1.0 + tl.exp(-wide))).to(gate.dtype) * up, mask=inside)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """[T, 2 * size], contiguous, gate first -> [T, size]."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, next_power_of_2(size))
    grid = (rows, cdiv(size, block))
    _silu_mul_kernel[grid](gate_up, out, size, BLOCK=block, num_warps=4, **launch_options(gate_up.device))
    return out


@quick
@triton.jit
def _norm_rope_kernel(
    qkv_ptr, cos_sin_ptr, q_weight_ptr, k_weight_ptr, eps, row_size, num_heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token and head, q's heads first, then k's; in place."""
    start(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    cols = tl.arange(0, HALF)
    inside = cols < half
    if NORM:
        weight_ptr = q_weight_ptr if head < num_heads else k_weight_ptr
        first_weight = tl.load(weight_ptr + cols, mask=inside, other=0.0)
        second_weight = tl.load(weight_ptr + half + cols, mask=inside, other=0.0)
    wait(PDL)
    base = qkv_ptr + token * row_size + head * HEAD_DIM
    first = tl.load(base + cols, mask=inside, other=0.0)
    second = tl.load(base + half + cols, mask=inside, other=0.0)
    if NORM:
        wide_1, wide_2 = first.to(tl.float32), second.to(tl.float32)
        total = tl.sum(wide_1 * wide_1, axis=0) + tl.sum(wide_2 * wide_2, axis=0)
        inverse = tl.rsqrt(total / HEAD_DIM + eps)
        first = first_weight * (wide_1 * inverse).to(first.dtype)
        second = second_weight * (wide_2 * inverse).to(second.dtype)
    cos = tl.load(cos_sin_ptr + token * HEAD_DIM + cols, mask=inside, other=0.0)
    sin = tl.load(cos_sin_ptr + token * HEAD_DIM + half + cols, mask=inside, other=0.0)
    wide_1, wide_2 = first.to(tl.float32), second.to(tl.float32)
    tl.store(base + cols, (wide_1 * cos - wide_2 * sin).to(first.dtype), mask=inside)
    tl.store(base + half + cols, (wide_2 * cos + wide_1 * sin).to(first.dtype), mask=inside)


def norm_rope(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    """Norm (where there are weights [head_dim]) and rotate q and k within qkv [T, (num_heads + 2 num_kv_heads) *
    head_dim], contiguous; cos_sin float32 [T, head_dim], cosines first. NeoX style: halves are paired."""
    norm = q_weight is not None and k_weight is not None
    _norm_rope_kernel[(qkv.shape[0], num_heads + num_kv_heads)](
        qkv, cos_sin, q_weight if norm else qkv, k_weight if norm else qkv, eps, qkv.shape[1], num_heads,
        HEAD_DIM=head_dim, HALF=next_power_of_2(head_dim // 2), NORM=norm, num_warps=1,
        **launch_options(qkv.device),
    )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["tokens", "lse_head", "part_lse_head"])
def _merge_lse_kernel(
    out_ptr, lse_ptr, part_ptr, part_lse_ptr, tokens, out_row, out_head, lse_head, part_row, part_head, part_lse_head,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T tokens of one head."""
    start(PDL)
    wait(PDL)
    head = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    there = token < tokens
    lse = tl.load(lse_ptr + head * lse_head + token, mask=there, other=float("-inf"))
    part_lse = tl.load(part_lse_ptr + head * part_lse_head + token, mask=there, other=float("-inf"))
    higher = tl.maximum(lse, part_lse)
    higher = tl.where(higher == float("-inf"), 0.0, higher)  # neither has a key
    weight, part_weight = tl.exp(lse - higher), tl.exp(part_lse - higher)
    total = weight + part_weight
    some = tl.where(total > 0.0, total, 1.0)
    cols = tl.arange(0, BLOCK_D)[None, :]
    out_at = out_ptr + token[:, None] * out_row + head * out_head + cols
    part_at = part_ptr + token[:, None] * part_row + head * part_head + cols
    # Without keys a part may hold NaN, which a weight of 0 does not hide: it is not read.
    inside = cols < DIM
    out = tl.load(out_at, mask=inside & (weight > 0.0)[:, None], other=0.0).to(tl.float32)
    part = tl.load(part_at, mask=inside & (part_weight > 0.0)[:, None], other=0.0).to(tl.float32)
    merged = out * (weight / some)[:, None] + part * (part_weight / some)[:, None]
    tl.store(out_at, merged.to(out_ptr.dtype.element_ty), mask=inside & there[:, None])
    merged_lse = tl.where(total > 0.0, tl.log(some) + higher, float("-inf"))
    tl.store(lse_ptr + head * lse_head + token, merged_lse, mask=there)


def merge_lse(out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge an attention's result over some keys into that over others (Flash-Decoding, Dao et al. 2023): part
    [T, num_heads, dim] into out, lse float32 [num_heads, T] of each, natural, -inf where there was no key (what out
    holds there does not count); last dimensions dense, dtypes may differ. Sums in float32."""
    tokens, num_heads, dim = out.shape
    if tokens == 0:
        return
    block_d = next_power_of_2(dim)
    block_t = max(1, 2048 // block_d)
    _merge_lse_kernel[(cdiv(tokens, block_t), num_heads)](
        out, lse, part, part_lse, tokens, *out.stride()[:2], lse.stride(0), *part.stride()[:2], part_lse.stride(0),
        DIM=dim, BLOCK_D=block_d, BLOCK_T=block_t, num_warps=4, **launch_options(out.device),
    )  # fmt: skip
