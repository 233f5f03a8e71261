"""Linear layers for some hundred rows of a small weight, optionally with SwiGLU's middle: y = x Wᵀ + b.

There the vendor's library takes longer to start a product than to do it, and cannot be started while the kernel before
drains. Tiles come by descriptor (TMA: copies that one thread starts and that zero what lies outside), so NVIDIA's GPUs
from sm_90 on only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.small_linear import MAX_ROWS, Chip

MOST_ROWS = 256


@dataclass(frozen=True, slots=True)
class MediumTile:
    """How a medium linear is cut: rows of x, rows of the weight (gated: half of them gates, half ups) and columns."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    def shared_bytes(self, itemsize: int) -> int:
        return (self.block_m + self.block_n) * self.block_k * itemsize * self.num_stages


@triton.jit(do_not_specialize=["M"])
def _medium_linear_kernel(
    x_desc,
    w_desc,
    b_ptr,
    y_ptr,
    M,
    N,
    K,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """N counts outputs. Neighbouring programs share rows of the weight, which then come from the L2 cache."""
    start(PDL)
    OUTPUTS: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    # The last rows share some with those before rather than reach beyond M: tiles that lie half outside are slow.
    first_m = tl.minimum(tl.program_id(0) * BLOCK_M, M - BLOCK_M)
    first_n = tl.program_id(1) * OUTPUTS
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    wait(PDL)
    for k in range(0, K, BLOCK_K):
        x = x_desc.load([first_m, k])
        w = w_desc.load([0, first_n, k]).reshape(BLOCK_N, BLOCK_K) if GATED else w_desc.load([first_n, k])
        acc = tl.dot(x, w.T, acc)
    rows_m = first_m + tl.arange(0, BLOCK_M)
    rows_n = first_n + tl.arange(0, OUTPUTS)
    inside_n = rows_n < N
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    if GATED:
        gate, up = acc.reshape(BLOCK_M, 2, OUTPUTS).permute(0, 2, 1).split()
        if HAS_BIAS:
            gate += tl.load(b_ptr + rows_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
            up += tl.load(b_ptr + N + rows_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        # Rounded as gate and up would be if they were stored first.
        gate = gate.to(dtype).to(tl.float32)
        y = (gate / (1.0 + tl.exp(-gate))).to(dtype) * up.to(dtype)
    else:
        if HAS_BIAS:
            acc += tl.load(b_ptr + rows_n, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        y = acc.to(dtype)
    offsets = rows_m[:, None].to(tl.int64) * N + rows_n[None, :]
    tl.store(y_ptr + offsets, y, mask=inside_n[None, :])


def choose_medium_tile(m: int, n: int, k: int, itemsize: int, chip: Chip, *, gated: bool) -> MediumTile | None:
    """The cut for m rows, n outputs and k inputs; None where `small_linear` or the vendor's library is as fast.

    Measured on an H100 over the shapes of Qwen3-0.6B, 8B, 30B-A3B and DeepSeek-V2-Lite (docs/BENCHMARKS.md).
    """
    if not chip.tma or itemsize != 2 or not MAX_ROWS < m <= MOST_ROWS or k % 8:
        return None
    if gated:
        tile = MediumTile(64, 128, 128, 4, 4) if m <= 128 else MediumTile(128, 128, 64, 8, 6)
        large = m > 128 and n * k > 1 << 23
    else:
        one_round = triton.cdiv(m, 64) * triton.cdiv(n, 64) <= chip.num_sms
        tile = MediumTile(64, 64, 128, 4, 6) if one_round else MediumTile(64, 128, 128, 4, 4)
        large = n * k > 1 << 22
    # Not all GPUs that copy by descriptor have an H100's shared memory.
    return None if large or tile.shared_bytes(itemsize) > chip.shared_bytes else tile


def can_describe(x: torch.Tensor) -> bool:
    """Whether x's rows start where a descriptor can: at multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.stride(1) == 1


def medium_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: MediumTile, *, gated: bool = False
) -> torch.Tensor:
    """x [M, K], weight [N, K] or, gated, [2 N, K] -> [M, N], as of `small_linear`; M is at least the tile's block_m.
    float16 or bfloat16, for which `can_describe` holds. Accumulates in float32."""
    m, k = x.shape
    if m < tile.block_m:
        raise ValueError(f"tiles of {tile.block_m} rows cannot be cut from {m}")
    n = weight.shape[0] // 2 if gated else weight.shape[0]
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    outputs = tile.block_n // 2 if gated else tile.block_n
    if gated:
        rows = TensorDescriptor(weight, [2, n, k], [n * k, k, 1], [2, outputs, tile.block_k])
    else:
        rows = TensorDescriptor(weight, [n, k], [k, 1], [outputs, tile.block_k])
    _medium_linear_kernel[(triton.cdiv(m, tile.block_m), triton.cdiv(n, outputs))](
        TensorDescriptor(x, [m, k], [x.stride(0), 1], [tile.block_m, tile.block_k]),
        rows,
        weight if bias is None else bias,
        y,
        m,
        n,
        k,
        GATED=gated,
        HAS_BIAS=bias is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(x.device),
    )
    return y
