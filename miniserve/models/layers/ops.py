"""The small operations of a decoder, as plain functions over tensors: the reference for every fused kernel.

Each rounds to the model's dtype where transformers does, so that in float32 the two differ only by summation order.
"""

from __future__ import annotations

import torch
from torch.nn import functional


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), computed in float32.

    x: [..., size], weight: [size]. Returns x's shape and dtype; the product with `weight` is taken in that dtype.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add x to the residual stream (in the model's dtype), then norm it. x, residual: [T, size].

    Returns (normed, new residual).
    """
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head by its position: the first half of a head is paired with its second half (Su et al. 2021).

    x: [T, heads, head_dim]; cos_sin: float32 [T, head_dim], the cosines then the sines. Computed in float32; returns
    x's shape and dtype.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm every head of q and k where the model has weights for it, then `rope` both.

    q: [T, num_heads, head_dim], k: [T, num_kv_heads, head_dim] (may be strided views of one tensor); weights:
    [head_dim]. Returns new tensors of the same shapes.
    """
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    return rope(q, cos_sin), rope(k, cos_sin)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's middle: silu(gate) * up. gate_up: [T, 2 * size], gate first. Returns [T, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up
