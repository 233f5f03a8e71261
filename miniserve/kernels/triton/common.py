# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Shared by the attention kernels: reading tiles of keys and values in either layout, and parts of the softmax.

A tile's tokens are found through the block table, so a tile may span many blocks. In the shuffled layout a tile is read
as [chunks, tokens, x], in the order in which it lies in memory (16 bytes per thread, neighbours side by side), and only
then turned into a matrix.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.launch import Launch, Platform, next_power_of_2

LOG2E = 1.4426950408889634


def platform() -> Platform:
    """Which vendor's GPUs this PyTorch is built for."""
    return "hip" if torch.version.hip else "cuda"


def dot_precision(on: Platform) -> str:
    """The precision of float32 matrix products (other dtypes have one only): float32's accuracy, by the matrix unit; on
    NVIDIA in three passes of TF32."""
    return "tf32x3" if on == "cuda" else "ieee"


def plane_strides(plane: torch.Tensor, shuffled: bool) -> tuple[int, int, int]:
    """(block, token, kv head) strides in elements of a key or value plane; a shuffled plane has no token stride."""
    if shuffled:
        return plane.stride(0), 0, plane.stride(1)
    return plane.stride(0), plane.stride(1), plane.stride(2)


def paged_arguments(
    q: torch.Tensor,
    planes: tuple[torch.Tensor, torch.Tensor],
    block_tables: torch.Tensor,
    out: torch.Tensor,
    launch: Launch,
    *,
    num_kv_heads: int,
    block_size: int,
    shuffled: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    num_splits: int,
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Arguments that the decode and prefill kernels share, after their pointers: values; constants and options."""
    head_dim = q.shape[2]
    strides = (stride for plane in planes for stride in plane_strides(plane, shuffled))
    values = (*q.stride()[:2], *strides, block_tables.stride(0), *out.stride()[:2])
    return (*values, scale * LOG2E, window or 0, (softcap or 0.0) * LOG2E, num_splits), {
        "GROUP": q.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": next_power_of_2(head_dim),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_SIZE": block_size,
        "X": 16 // planes[0].element_size() if shuffled else 0,
        "HAS_WINDOW": window is not None,
        "HAS_SOFTCAP": softcap is not None,
        "PRECISION": dot_precision(platform()),
        **launch.options,
    }


@triton.jit
def key_tile(
    cache, ids, pos, visible, block_stride, token_stride, kv_head_offset,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Keys of the tokens at `pos` [BLOCK_N], which lie in blocks `ids`, as [BLOCK_D, BLOCK_N]; 0 where not visible.
    X: 0 for the linear layout, else the shuffled layout's x."""
    base = cache + ids.to(tl.int64) * block_stride + kv_head_offset
    if X == 0:
        base += pos % BLOCK_SIZE * token_stride
        d = tl.arange(0, BLOCK_D)
        mask = visible[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (d < HEAD_DIM)[None, :]
        k = tl.trans(tl.load(base[:, None] + d[None, :], mask=mask, other=0.0))
    else:
        base += pos % BLOCK_SIZE * X
        c = tl.arange(0, BLOCK_D // X)
        x = tl.arange(0, X)
        mask = visible[None, :, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (c < HEAD_DIM // X)[:, None, None]
        # `max_contiguous` orders the threads: 16 bytes each, neighbours along the tokens, as the block lies in memory.
        pointers = base[None, :, None] + (c * (BLOCK_SIZE * X))[:, None, None] + x[None, None, :]
        k = tl.load(tl.max_contiguous(pointers, [1, 2, X]), mask=mask, other=0.0)
        k = tl.reshape(tl.permute(k, (0, 2, 1)), (BLOCK_D, BLOCK_N))
    return k


@triton.jit
def value_tile(
    cache, ids, pos, low, high, block_stride, token_stride, kv_head_offset,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """Values of the tokens low <= pos < high as [BLOCK_N, BLOCK_D]; 0 elsewhere. Linear: `ids`, `pos` [BLOCK_N];
    shuffled: [BLOCK_N / X], of each group of X tokens. There a group that is partly visible is read whole: the caller
    must keep its other tokens, which may hold NaN, out of the sum (`finite`)."""
    base = cache + ids.to(tl.int64) * block_stride + kv_head_offset
    d = tl.arange(0, BLOCK_D)
    if X == 0:
        base += pos % BLOCK_SIZE * token_stride
        mask = ((pos >= low) & (pos < high))[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (d < HEAD_DIM)[None, :]
        v = tl.load(base[:, None] + d[None, :], mask=mask, other=0.0)
    else:
        base += pos % BLOCK_SIZE * HEAD_DIM
        x = tl.arange(0, X)
        mask = ((pos + X > low) & (pos < high))[:, None, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (d < HEAD_DIM)[None, :, None]
        pointers = base[:, None, None] + (d * X)[None, :, None] + x[None, None, :]
        v = tl.load(tl.max_contiguous(pointers, [1, 2, X]), mask=mask, other=0.0)
        v = tl.reshape(tl.permute(v, (0, 2, 1)), (BLOCK_N, BLOCK_D))
    return v


@triton.jit
def finite(x):
    """x with infinities and NaN replaced by 0. Elementwise, so that a tile can go from memory straight to the matrix
    unit; a mask by position would be computed in another register layout and cost a trip through shared memory."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def running_softmax(scores, visible, best, total):
    """Add a tile's scores [rows, keys], base 2, to the running softmax, whose sums [rows, keys] are reduced over keys
    at the end. Returns weights, the factor for earlier sums, the new maximum and sums. Every row must see a key."""
    scores = tl.where(visible[None, :], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    decay = tl.exp2(best - higher)
    weights = tl.exp2(scores - higher[:, None])
    return weights, decay, higher, total * decay[:, None] + weights


@triton.jit
def capped(scores, softcap):
    """softcap * tanh(scores / softcap), written with exp2 so that it needs no vendor's library."""
    return softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.8853900817779268 / softcap)) + 1.0))
