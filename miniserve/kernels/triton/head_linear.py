# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Products of many small matrices, one a head, for few tokens: queries and outputs of latent attention.

In a decode step they stand between other kernels of ours. As these they fetch their weights while the one before ends,
and let the next one start (see `pdl.py`), which the vendor's library does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.common import dot_precision, platform
from miniserve.kernels.triton.launch import cdiv, next_power_of_2
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import quick

MOST_TOKENS = 128  # measured on an H200
_TILE = 8192  # weights that a program holds
_BYTES = 64 << 10  # of x that a program holds


def head_linear(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
    """x [T, heads, n], each head by its matrix of weights [heads, n, m] -> [T, heads, m], contiguous, x's dtype; x's
    last dimension is dense, of the weights the last or the last but one. Sums in float32. None where the vendor's
    library is as fast."""
    tokens, heads, n = x.shape
    m, block_n = weights.shape[2], next_power_of_2(n)
    if not 0 < tokens <= MOST_TOKENS or block_n > _TILE // 16 or platform() != "cuda":
        return None
    out = x.new_empty(tokens, heads, m)
    most = min(64, _BYTES // (block_n * x.element_size()))
    block_m, block_t = max(16, min(64, _TILE // block_n)), max(16, min(most, next_power_of_2(tokens)))
    _head_linear_kernel[(cdiv(m, block_m), heads, cdiv(tokens, block_t))](
        x, weights, out, tokens, *x.stride()[:2], *weights.stride(), *out.stride()[:2],
        N=n, M=m, BLOCK_T=block_t, BLOCK_N=max(16, block_n), BLOCK_M=block_m, PRECISION=dot_precision(platform()),
        num_warps=4, **launch_options(x.device),
    )  # fmt: skip
    return out


@quick
@triton.jit(do_not_specialize=["tokens"])
def _head_linear_kernel(
    x, weights, out, tokens, x_row, x_head, w_head, w_in, w_out, out_row, out_head,
    N: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M outputs of one head, for BLOCK_T tokens."""
    start(PDL)
    head = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    at = weights + head * w_head + n[:, None] * w_in + m[None, :] * w_out
    weight = tl.load(at, mask=(n < N)[:, None] & (m < M)[None, :], other=0.0)
    wait(PDL)
    token = tl.program_id(2) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = token.to(tl.int64)[:, None]
    there = (token < tokens)[:, None]
    queries = tl.load(x + rows * x_row + head * x_head + n[None, :], mask=there & (n < N)[None, :], other=0.0)
    y = tl.dot(queries, weight, input_precision=PRECISION)
    tl.store(
        out + rows * out_row + head * out_head + m[None, :], y.to(out.dtype.element_ty), mask=there & (m < M)[None, :]
    )
