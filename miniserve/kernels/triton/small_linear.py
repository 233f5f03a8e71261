"""Linear layers for few rows, y = x Wᵀ + b, optionally with SwiGLU's activation: the time goes to reading the weight.

A program takes BLOCK_N rows of the weight and one of SPLIT_K parts of their length. Of the programs that share rows,
the last one to arrive sums the parts in a fixed order (so that a result does not depend on the timing) and finishes.
The first tile of the weight is fetched before the program waits for x: it does not depend on the kernel before.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.pdl import launch_options, start, wait

MAX_ROWS = 64
Block = tuple[int, int] | None  # rows and columns that share a scale; None: one for each row, or there are none
CHUNK = tl.constexpr(8)  # columns that a thread loads at once of a weight in 8 bits, and of x


def scale_sizes(block: tuple[int, int] | None) -> dict[str, int]:
    """The kernels' constants for a weight's scales. block: rows and columns that share one, columns a multiple of 32;
    None: one for each row, or there are none."""
    return {"SCALE_N": 1, "SCALE_K": 0} if block is None else {"SCALE_N": block[0], "SCALE_K": block[1]}


def largest_tile(block: tuple[int, int] | None, rows: int, columns: int) -> tuple[int, int]:
    """The largest tile of at most `rows` and `columns`, powers of two, that any `block` with a scale is made of."""
    if block is None:
        return rows, columns
    return math.gcd(block[0], rows), math.gcd(block[1], columns)


@dataclass(frozen=True, slots=True)
class LinearTile:
    """How a small linear is cut: BLOCK_N weight rows and BLOCK_K columns a tile, split_k programs along the columns.
    swap: the weight is the left operand of the matrix unit, which may demand 64 rows of that side. splits: a tile has
    so many times BLOCK_K columns, of which each warp multiplies some by itself, so that few rows keep as many warps
    busy; the batched product's matrix unit is one whose operands stay in registers."""

    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    splits: int = 1


@triton.jit
def product(acc, w, x, scale, DOT: tl.constexpr, SWAP: tl.constexpr, x_scale=None):
    """acc plus the product, in the weight's dtype or, if that has 8 bits, in x's. scale, unless it is None: one number
    of all of w, or without DOT one for each of its `CHUNK`s. x_scale, of x in 8 bits: one for each row."""
    if DOT:
        if x_scale is not None:
            x_scale = x_scale[None, :] if SWAP else x_scale[:, None]
            scale = x_scale if scale is None else x_scale * scale
        if w.dtype.primitive_bitwidth == 8:
            if x.dtype.primitive_bitwidth > 8:
                w = widened(w, x.dtype)
        else:
            x = x.to(w.dtype)
        left, right = (w, tl.trans(x)) if SWAP else (x, tl.trans(w))
        if scale is None:
            acc = tl.dot(left, right, acc, input_precision="ieee")
        else:
            acc += tl.dot(left, right, input_precision="ieee") * scale
    elif w.dtype.primitive_bitwidth == 8:
        acc += chunk_product(w, x, scale)
    else:
        acc += w.to(tl.float32) * x.to(tl.float32)
    return acc


@triton.jit
def columns(SIZE: tl.constexpr, CHUNKS: tl.constexpr):
    """0 to SIZE - 1. CHUNKS: no thread takes more than one of those at once, so that it has the same columns of x and
    the weight: else one would have to be exchanged."""
    return tl.max_contiguous(tl.arange(0, SIZE), CHUNK) if CHUNKS else tl.arange(0, SIZE)


@triton.jit
def widened(w, dtype: tl.constexpr):
    """8 bits in 16, which is exact. By way of float32 where NVIDIA's instruction for the last step is the slow one."""
    return w.to(tl.float32).to(dtype) if dtype == tl.bfloat16 else w.to(dtype)


@triton.jit
def chunk_product(w, x, scale):
    """The products of rows of w [N, K] in 8 bits with x [1, K] by chunks, [N, K / CHUNK], each times its scale if there
    are any."""
    products = w.to(tl.float32) * x.to(tl.float32)
    sums = tl.sum(tl.reshape(products, (w.shape[0], w.shape[1] // CHUNK, CHUNK)), axis=2)
    return sums if scale is None else sums * scale


@triton.jit
def as_rows(rows, SPLITS: tl.constexpr):
    """[M] as [M, 1], or where a tile has SPLITS parts of its columns [1, M, 1]."""
    return rows[:, None] if SPLITS == 1 else rows[None, :, None]


@triton.jit
def as_columns(cols, SPLITS: tl.constexpr):
    """[K] as [1, K], or those and the next ones after another [SPLITS, 1, K]."""
    return cols[None, :] if SPLITS == 1 else tl.arange(0, SPLITS)[:, None, None] * cols.shape[0] + cols[None, None, :]


@triton.jit
def split_begins(BLOCK_K: tl.constexpr, SPLITS: tl.constexpr):
    """Where the parts of a tile's columns begin: 0, or [SPLITS, 1, 1]."""
    return 0 if SPLITS == 1 else tl.arange(0, SPLITS)[:, None, None] * BLOCK_K


@triton.jit
def load_scale(s_ptr, row, col, K, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr):
    """Of the weight's block around (row, col), which may lie beyond its last column."""
    return tl.load(s_ptr + row // SCALE_N * tl.cdiv(K, SCALE_K) + tl.minimum(col, K - 1) // SCALE_K)


@triton.jit
def accumulator(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr, SPLITS: tl.constexpr = 1):
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    return acc if SPLITS == 1 else tl.zeros((SPLITS, acc.shape[0], acc.shape[1]), tl.float32)


@triton.jit
def swiglu(gate, up, dtype: tl.constexpr):
    """silu(gate) * up in float32, rounded as gate and up would be if they were stored first."""
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype)
    return (silu * up.to(dtype)).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def _small_linear_kernel(
    x_ptr, w_ptr, s_ptr, b_ptr, y_ptr, parts_ptr, counts_ptr, M, N, K, x_stride,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, DOT: tl.constexpr, SWAP: tl.constexpr, EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    SPLITS: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """N counts outputs. GATED: the weight has 2 N rows, gates first. Without DOT a program has one row, BLOCK_M = 1.
    A weight with scales: one for each row (SCALE_K = 0), or for each SCALE_N x SCALE_K, which a tile lies within
    (without DOT its columns may be of several)."""
    start(PDL)
    tile, split = tl.program_id(0), tl.program_id(1)
    rows_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = as_columns(tl.arange(0, BLOCK_K) if DOT else columns(BLOCK_K, s_ptr is not None), SPLITS)
    ROUND: tl.constexpr = SPLITS * BLOCK_K
    num_tiles = tl.cdiv(tl.cdiv(K, ROUND), SPLIT_K)
    first = split * num_tiles * ROUND
    end = tl.minimum(first + num_tiles * ROUND, K)
    w_ptrs = w_ptr + as_rows(rows_n, SPLITS).to(tl.int64) * K + (first + cols)
    up_ptrs = w_ptrs + tl.cast(N, tl.int64) * K
    inside_n = rows_n < N
    n_mask = as_rows(inside_n, SPLITS)
    w_mask = n_mask & (first + cols < end)
    if EVEN_N and EVEN_K:
        w = tl.load(w_ptrs)
        if GATED:
            up_w = tl.load(up_ptrs)
    else:
        w = tl.load(w_ptrs, mask=w_mask, other=0.0)
        if GATED:
            up_w = tl.load(up_ptrs, mask=w_mask, other=0.0)
    at_k = first + (split_begins(BLOCK_K, SPLITS) if DOT else tl.arange(0, BLOCK_K // CHUNK)[None, :] * CHUNK)
    scale = load_scale(s_ptr, tile * BLOCK_N, at_k, K, SCALE_N, SCALE_K) if SCALE_K > 0 else None
    up_scale = load_scale(s_ptr, N + tile * BLOCK_N, at_k, K, SCALE_N, SCALE_K) if GATED and SCALE_K > 0 else None
    wait(PDL)
    if DOT:
        x_ptrs = x_ptr + as_rows(rows_m, SPLITS).to(tl.int64) * x_stride + (first + cols)
        inside_m = as_rows(rows_m < M, SPLITS)
        acc = accumulator(BLOCK_M, BLOCK_N, SWAP, SPLITS)
    else:
        x_ptrs = x_ptr + tl.program_id(2).to(tl.int64) * x_stride + (first + cols)
        inside_m = True
        acc = tl.zeros((BLOCK_N, BLOCK_K if s_ptr is None else BLOCK_K // CHUNK), dtype=tl.float32)
    up_acc = tl.zeros_like(acc)
    if EVEN_K:
        x = tl.load(x_ptrs, mask=inside_m, other=0.0)
    else:
        x = tl.load(x_ptrs, mask=inside_m & (first + cols < end), other=0.0)
    acc = product(acc, w, x, scale, DOT, SWAP)
    if GATED:
        up_acc = product(up_acc, up_w, x, up_scale, DOT, SWAP)
    if SCALE_K > 0:
        scale = load_scale(s_ptr, tile * BLOCK_N, at_k + ROUND, K, SCALE_N, SCALE_K)
        if GATED:
            up_scale = load_scale(s_ptr, N + tile * BLOCK_N, at_k + ROUND, K, SCALE_N, SCALE_K)
    for start_k in range(first + ROUND, end, ROUND):
        w_ptrs += ROUND
        x_ptrs += ROUND
        up_ptrs += ROUND
        if EVEN_K:
            x = tl.load(x_ptrs, mask=inside_m, other=0.0)
            w = tl.load(w_ptrs) if EVEN_N else tl.load(w_ptrs, mask=n_mask, other=0.0)
        else:
            inside_k = start_k + cols < end
            x = tl.load(x_ptrs, mask=inside_m & inside_k, other=0.0)
            w = tl.load(w_ptrs, mask=n_mask & inside_k, other=0.0)
        acc = product(acc, w, x, scale, DOT, SWAP)
        if GATED:
            if EVEN_K and EVEN_N:
                up_w = tl.load(up_ptrs)
            else:
                up_w = tl.load(up_ptrs, mask=n_mask & (start_k + cols < end), other=0.0)
            up_acc = product(up_acc, up_w, x, up_scale, DOT, SWAP)
        if SCALE_K > 0:  # of the next tile
            at_next = at_k + (start_k - first) + ROUND
            scale = load_scale(s_ptr, tile * BLOCK_N, at_next, K, SCALE_N, SCALE_K)
            if GATED:
                up_scale = load_scale(s_ptr, N + tile * BLOCK_N, at_next, K, SCALE_N, SCALE_K)
    if SPLITS > 1:
        acc = tl.sum(acc, axis=0)
        up_acc = tl.sum(up_acc, axis=0)
    if not DOT:
        acc = tl.sum(acc, axis=1)[None, :]
        up_acc = tl.sum(up_acc, axis=1)[None, :]
    elif SWAP:
        acc = tl.trans(acc)
        up_acc = tl.trans(up_acc)
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
        for part in tl.static_range(SPLIT_K):
            acc += tl.load(parts_ptr + part * width * plane + offsets, mask=mask, other=0.0, cache_modifier=".cg")
            if GATED:
                other = parts_ptr + (part * width + 1) * plane + offsets
                up_acc += tl.load(other, mask=mask, other=0.0, cache_modifier=".cg")
    if s_ptr is not None and SCALE_K == 0:
        acc *= tl.load(s_ptr + rows_n, mask=inside_n, other=0.0)[None, :]
        if GATED:
            up_acc *= tl.load(s_ptr + N + rows_n, mask=inside_n, other=0.0)[None, :]
    if HAS_BIAS:
        acc += tl.load(b_ptr + rows_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up_acc += tl.load(b_ptr + N + rows_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = swiglu(acc, up_acc, x_ptr.dtype.element_ty)
    tl.store(y_ptr + offsets, acc.to(y_ptr.dtype.element_ty), mask=mask)


class Workspace:
    """Memory through which programs of split weights exchange parts. All layers of a device share it: kernels run one
    by one."""

    def __init__(self, device: torch.device) -> None:
        self.parts = torch.empty(1 << 22, dtype=torch.float32, device=device)
        self.counts = torch.zeros(1 << 16, dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True)
class Chip:
    """What a cut depends on: multiprocessors; bytes of shared memory per program; splits: whether programs may share a
    row (not on AMD until reading others' writes across its dies has been tested); and whether it has Hopper's matrix
    unit, which warpgroups feed from shared memory."""

    num_sms: int
    shared_bytes: int
    splits: bool = True
    wgmma: bool = False


def choose_tile(m: int, n: int, k: int, itemsize: int, chip: Chip, *, gated: bool) -> LinearTile | None:
    """The cut for m rows, n outputs and k inputs; None if the vendor's library is at least as fast.

    Measured over the shapes of Qwen3-0.6B and 8B (docs/LAB.md), one row on an H200, more on an H100.
    """
    if m > MAX_ROWS or k % 16:
        return None
    if m == 1 and gated and itemsize == 2:  # whole rows, but for short ones, of which one would be too little to do
        block_n, block_k, warps = (4, 512, 4) if k <= 1024 else (1, min(4096, triton.next_power_of_2(k)), 2)
        return LinearTile(block_n, block_k, 1, warps, 3)
    if m == 1 or itemsize == 4:
        # float32, which only routers use on a GPU, gains nothing from the matrix units.
        return LinearTile(1 if gated else 4, min(2048, triton.next_power_of_2(k)), 1, 4, 3) if m <= 16 else None
    if m > 32 and n < 2048:
        return None
    wanted = 2 * chip.num_sms
    block_k, stages, swap = (128 if gated else 256), (4 if m <= 16 else 6), False
    if m > 32:
        swap = gated and n > 4096
        block_n, block_k, stages = 64 if n > 4096 else 32, 128, 3 if swap else 6
    else:
        block_n = 32 if gated or n <= 4096 else 64
    tiles = triton.cdiv(n, block_n)
    split_k = 4 if tiles < (wanted if gated or m > 16 else 2 * wanted) and (m <= 16 or (n > 4096 and m <= 32)) else 1
    split_k = split_k if chip.splits else 1
    while not swap and block_n > 16 and triton.cdiv(n, block_n) * split_k < (wanted if m <= 16 else wanted // 4):
        block_n //= 2
    while split_k > 1 and k < 2 * split_k * block_k:
        split_k //= 2
    if split_k > 1 and not gated:
        stages = 2
    rows = block_n * (2 if gated else 1) + max(16, triton.next_power_of_2(m))
    while stages > 1 and rows * block_k * itemsize * stages > chip.shared_bytes:
        stages -= 1
    return LinearTile(block_n, block_k, split_k, 4, stages, swap)


def is_narrow(m: int, n: int, k: int, chip: Chip, *, gated: bool) -> bool:
    """Whether a product in 8 bits has so few outputs that larger tiles of them would leave multiprocessors idle."""
    return chip.wgmma and m <= 8 and not gated and n <= 16 * chip.num_sms and k >= 2048


def choose_scaled_tile(
    m: int, n: int, k: int, block: tuple[int, int] | None, chip: Chip, *, gated: bool
) -> LinearTile | None:
    """As `choose_tile`, for a weight in 8 bits with scales of `block`.

    Measured on an H200 over the shapes of Qwen3-8B and of an eighth of Qwen3-235B-A22B (docs/LAB.md).
    """
    if m > MAX_ROWS or k % 16:
        return None
    if m == 1 and is_narrow(m, n, k, chip, gated=gated):
        return LinearTile(2, min(4096, triton.next_power_of_2(k)), 1, 4, 3)
    if m == 1:
        block_n = largest_tile(block, 8 if n > 4096 and not gated else 4, 1)[0]
        return LinearTile(block_n, min(2048, triton.next_power_of_2(k)), 1, 2 if gated else 4, 3)
    if is_narrow(m, n, k, chip, gated=gated):
        return LinearTile(*largest_tile(block, 16, 128), 1, 4, 3, swap=True, splits=4)
    block_m = max(16, triton.next_power_of_2(m))
    swap = gated and m > 32
    block_n, block_k = largest_tile(block, 64 if swap or m > 16 or (n > 4096 and not gated) else 32, 128)
    split_k = 4 if m <= 32 else 2
    while split_k > 1 and (gated or not chip.splits or k < 2 * split_k * block_k):
        split_k //= 2
    stage = (block_n * (2 if gated else 1) + 2 * block_m) * block_k
    return LinearTile(block_n, block_k, split_k, 4, max(1, min(3 if swap else 6, chip.shared_bytes // stage)), swap)


def small_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tile: LinearTile,
    workspace: Workspace,
    *,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    scale: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> torch.Tensor:
    """x [M, K] (rows may be strided), weight [N, K] or, gated, [2 N, K], contiguous -> [M, N]. x is converted to the
    weight's dtype, or a weight in 8 bits to x's.

    gated: silu(x W_gateᵀ) * (x W_upᵀ), gates first. M is at most MAX_ROWS. Accumulates in float32. scale: of a weight
    in 8 bits, float32: [⌈rows / block[0]⌉, ⌈K / block[1]⌉], or without `block` one for each row.
    """
    m, k = x.shape
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    dot = m > 1 and weight.dtype != torch.float32
    if block is not None and (block[0] % tile.block_n or (dot and block[1] % tile.block_k) or (gated and n % block[0])):
        raise ValueError(f"blocks of {block} with a scale do not fit tiles of {tile} for {n} outputs")
    block_m = max(16 if tile.splits == 1 else 8, triton.next_power_of_2(m)) if dot else 1
    if tile.splits > 1 and not dot:
        raise ValueError("splits of a tile need the matrix units")
    if tile.split_k > 1 and not dot and m > 1:
        raise ValueError("a split linear of several rows needs the matrix units")
    if tile.split_k > 1 and (
        tile.split_k * m * n * (2 if gated else 1) > workspace.parts.numel()
        or triton.cdiv(n, tile.block_n) > workspace.counts.numel()
    ):
        raise ValueError(f"a split linear of {m} x {n} does not fit its workspace")
    y = torch.empty(m, n, dtype=out_dtype or x.dtype, device=x.device)
    _small_linear_kernel[(triton.cdiv(n, tile.block_n), tile.split_k, 1 if dot else m)](
        x, weight, scale, weight if bias is None else bias, y, workspace.parts, workspace.counts, m, n, k, x.stride(0),
        GATED=gated, HAS_BIAS=bias is not None, DOT=dot, SWAP=tile.swap, EVEN_N=n % tile.block_n == 0,
        EVEN_K=k % (tile.block_k * tile.splits * tile.split_k) == 0, BLOCK_M=block_m, BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k, SPLIT_K=tile.split_k, SPLITS=tile.splits, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **scale_sizes(block), **launch_options(x.device),
    )  # fmt: skip
    return y


@functools.cache
def chip_of(device: torch.device) -> Chip:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    on_nvidia = torch.version.hip is None
    return Chip(properties.multi_processor_count, shared, on_nvidia, wgmma=on_nvidia and properties.major == 9)
