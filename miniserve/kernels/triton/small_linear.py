"""Linear layers for few rows, where reading the weight is all the work: y = x Wᵀ + b, optionally SwiGLU's middle on it.

A program takes BLOCK_N rows of the weight and one of SPLIT_K parts of their length. Of the programs that share rows,
the one that arrives last sums the parts in their order (so that a result does not depend on the timing) and finishes.
The first tile of the weight is fetched before the program waits for x: it does not depend on the kernel before.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.pdl import launch_options, start, wait

MAX_ROWS = 32


@dataclass(frozen=True, slots=True)
class LinearTile:
    """How a small linear is cut: BLOCK_N weight rows and BLOCK_K columns a tile, split_k programs along the columns."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _product(acc, w, x, DOT: tl.constexpr):
    if DOT:
        acc = tl.dot(x.to(w.dtype), tl.trans(w), acc, input_precision="ieee")
    else:
        acc += w.to(tl.float32) * x.to(tl.float32)
    return acc


@triton.jit
def _small_linear_kernel(
    x_ptr,
    w_ptr,
    b_ptr,
    y_ptr,
    parts_ptr,
    counts_ptr,
    M,
    N,
    K,
    x_stride,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """N counts outputs. GATED: the weight has 2 N rows, gates first. Without DOT there is one row (M = BLOCK_M = 1)."""
    start(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    rows_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_K)
    num_tiles = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K)
    first = split * num_tiles * BLOCK_K
    end = tl.minimum(first + num_tiles * BLOCK_K, K)
    w_ptrs = w_ptr + rows_n[:, None].to(tl.int64) * K + (first + cols)[None, :]
    up_ptrs = w_ptrs + tl.cast(N, tl.int64) * K
    inside_n = rows_n < N
    w_mask = inside_n[:, None] & (first + cols < end)[None, :]
    if EVEN_N and EVEN_K:
        w = tl.load(w_ptrs)
        if GATED:
            up_w = tl.load(up_ptrs)
    else:
        w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        if GATED:
            up_w = tl.load(up_ptrs, mask=w_mask, other=0.0)
    wait(PDL)
    if DOT:
        x_ptrs = x_ptr + rows_m[:, None].to(tl.int64) * x_stride + (first + cols)[None, :]
        inside_m = (rows_m < M)[:, None]
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    else:
        x_ptrs = x_ptr + (first + cols)[None, :]
        inside_m = True
        acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        up_acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    if EVEN_K:
        x = tl.load(x_ptrs, mask=inside_m, other=0.0)
    else:
        x = tl.load(x_ptrs, mask=inside_m & (first + cols < end)[None, :], other=0.0)
    acc = _product(acc, w, x, DOT)
    if GATED:
        up_acc = _product(up_acc, up_w, x, DOT)
    for start_k in range(first + BLOCK_K, end, BLOCK_K):
        w_ptrs += BLOCK_K
        x_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
        if EVEN_K:
            x = tl.load(x_ptrs, mask=inside_m, other=0.0)
            w = tl.load(w_ptrs) if EVEN_N else tl.load(w_ptrs, mask=inside_n[:, None], other=0.0)
        else:
            inside_k = (start_k + cols < end)[None, :]
            x = tl.load(x_ptrs, mask=inside_m & inside_k, other=0.0)
            w = tl.load(w_ptrs, mask=inside_n[:, None] & inside_k, other=0.0)
        acc = _product(acc, w, x, DOT)
        if GATED:
            if EVEN_K and EVEN_N:
                up_w = tl.load(up_ptrs)
            else:
                up_w = tl.load(up_ptrs, mask=inside_n[:, None] & (start_k + cols < end)[None, :], other=0.0)
            up_acc = _product(up_acc, up_w, x, DOT)
    if not DOT:
        acc = tl.sum(acc, axis=1)[None, :]
        up_acc = tl.sum(up_acc, axis=1)[None, :]
    mask = (rows_m < M)[:, None] & inside_n[None, :]
    offsets = rows_m[:, None].to(tl.int64) * N + rows_n[None, :]
    if SPLIT_K > 1:
        width: tl.constexpr = 2 if GATED else 1
        plane = tl.cast(M, tl.int64) * N
        tl.store(parts_ptr + split * width * plane + offsets, acc, mask=mask)
        if GATED:
            tl.store(parts_ptr + (split * width + 1) * plane + offsets, up_acc, mask=mask)
        tl.debug_barrier()
        if tl.atomic_add(counts_ptr + tile, 1, sem="acq_rel") < SPLIT_K - 1:
            return
        tl.store(counts_ptr + tile, 0)
        acc = tl.zeros_like(acc)
        up_acc = tl.zeros_like(acc)
        for part in range(SPLIT_K):
            acc += tl.load(parts_ptr + part * width * plane + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            if GATED:
                other = parts_ptr + (part * width + 1) * plane + offsets
                up_acc += tl.load(other, mask=mask, other=0.0, cache_modifier=".cg")
    if HAS_BIAS:
        acc += tl.load(b_ptr + rows_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_acc += tl.load(b_ptr + N + rows_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        # Rounded as gate and up would be if they were stored first.
        gate = acc.to(x_ptr.dtype.element_ty).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(x_ptr.dtype.element_ty)
        acc = (silu * up_acc.to(x_ptr.dtype.element_ty)).to(tl.float32)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


class Workspace:
    """What the programs of split weights exchange, shared by all layers of a device: its kernels run one by one."""

    def __init__(self, device: torch.device) -> None:
        self.parts = torch.empty(1 << 22, dtype=torch.float32, device=device)
        self.counts = torch.zeros(1 << 16, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Chip:
    """What a cut depends on: multiprocessors, and bytes of shared memory that one program can have."""

    num_sms: int
    shared_bytes: int


def choose_tile(m: int, n: int, k: int, itemsize: int, chip: Chip, *, gated: bool) -> LinearTile | None:
    """The cut for m rows, n outputs and k inputs; None where the vendor's library is at least as fast."""
    if m > MAX_ROWS or k % 16:
        return None
    # Measured on an H100 over the shapes of Qwen3-8B (docs/BENCHMARKS.md).
    if m == 1:
        return LinearTile(1 if gated else 4, min(2048, triton.next_power_of_2(k)), 1, 4, 3)
    block_n, warps = (32, 4) if gated or n <= 4096 else (64, 4)
    split = m <= 16 and triton.cdiv(n, block_n) < 4 * chip.num_sms
    block_k, stages, split_k = (256, 2, 4) if split else (256, 6, 1)
    while block_n > 16 and triton.cdiv(n, block_n) * split_k < 2 * chip.num_sms:
        block_n //= 2
    if gated:
        block_k //= 2
    while split_k > 1 and k < 2 * split_k * block_k:
        split_k //= 2
    rows = block_n * (2 if gated else 1) + max(16, triton.next_power_of_2(m))
    while stages > 1 and rows * block_k * itemsize * stages > chip.shared_bytes:
        stages -= 1
    return LinearTile(block_n, block_k, split_k, warps, stages)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile: LinearTile,
    workspace: Workspace,
    *,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [M, K] (rows may be strided), weight [N, K] or, gated, [2 N, K], contiguous -> [M, N]. x may be of another
    dtype than the weight, in which it is multiplied.

    gated: silu(x W_gateᵀ) * (x W_upᵀ), gates first. M is at most MAX_ROWS. Accumulates in float32.
    """
    m, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    dot = m > 1
    block_m = max(16, triton.next_power_of_2(m)) if dot else 1
    if tile.split_k > 1 and (
        tile.split_k * m * n * (2 if gated else 1) > workspace.parts.numel()
        or triton.cdiv(n, tile.block_n) > workspace.counts.numel()
    ):
        raise ValueError(f"a split linear of {m} x {n} does not fit its workspace")
    y = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    _small_linear_kernel[(triton.cdiv(n, tile.block_n), tile.split_k)](
        x,
        weight,
        weight if bias is None else bias,
        y,
        workspace.parts,
        workspace.counts,
        m,
        n,
        k,
        x.stride(0),
        GATED=gated,
        HAS_BIAS=bias is not None,
        DOT=dot,
        EVEN_N=n % tile.block_n == 0,
        EVEN_K=k % (tile.block_k * tile.split_k) == 0,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        SPLIT_K=tile.split_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x.device),
    )
    return y


@functools.cache
def chip_of(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    return Chip(properties.multi_processor_count, shared)
