"""The small operations of a decoder: in PyTorch, as plain functions (the reference), and as the CPU's fused kernels.

Each rounds to the model's dtype where transformers does, so that in float32 they differ only by summation order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.linear import Linear


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How a row of fused qkv divides: num_heads queries, then num_kv_heads keys and as many values, of head_dim."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


class PendingSum(Protocol):
    """What a layer adds to the residual stream, in parts that are summed where they are added: the norm that follows
    does it on its way."""

    def __add__(self, other: torch.Tensor) -> PendingSum:
        """`other` [T, size] is another part."""
        ...

    def add_rms_norm(
        self, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Ops.add_rms_norm`, with all parts for x."""
        ...


class Ops(Protocol):
    """What a decoder computes between its matrix products; x, residual [T, size], contiguous."""

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """As the function `rms_norm`."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As the function `add_rms_norm`; may add into `residual` itself."""
        ...

    def split_norm_rope(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        cos_sin: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv [T, (num_heads + 2 num_kv_heads) * head_dim], contiguous, may be overwritten -> q [T, num_heads,
        head_dim] and k, v [T, num_kv_heads, head_dim], q and k normed and rotated as `qk_norm_rope` does."""
        ...

    def rope_pair(
        self, q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor, *, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q [T, heads, dim] and k [T, dim], which may be views and may be overwritten, rotated as `rope` or
        `rope_interleaved` does."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """As the function `silu_and_mul`."""
        ...

    def gated_linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """`silu_and_mul` of what the layer, gates before ups, makes of x [T, in_features]."""
        ...


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


def rope_interleaved(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """As `rope`, but neighbours are paired: elements 2i and 2i + 1 of a head (GPT-J's and DeepSeek's way)."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


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


class TorchOps:
    """`Ops` in PyTorch, for any device."""

    def rope_pair(
        self, q: torch.Tensor, k: torch.Tensor, cos_sin: torch.Tensor, *, interleaved: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rotate = rope_interleaved if interleaved else rope
        return rotate(q, cos_sin), rotate(k[:, None], cos_sin)[:, 0]

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return rms_norm(x, weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, residual, weight, eps)

    def split_norm_rope(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        cos_sin: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = split_heads(qkv, shape)
        q, k = qk_norm_rope(q, k, cos_sin, q_weight, k_weight, eps)
        return q, k, v

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return silu_and_mul(gate_up)

    def gated_linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        return self.silu_and_mul(layer(x))


class NativeOps(TorchOps):
    """`Ops` through the C++ kernels: on a CPU."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._kernels.rms_norm(x.contiguous(), weight, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._kernels.add_rms_norm(x, residual, weight, eps), residual

    def split_norm_rope(
        self,
        qkv: torch.Tensor,
        shape: HeadShape,
        cos_sin: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self._kernels.qk_norm_rope(
            qkv, q_weight, k_weight, cos_sin, shape.num_heads, shape.num_kv_heads, shape.head_dim, eps
        )
        return split_heads(qkv, shape)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._kernels.silu_and_mul(gate_up)

    def gated_linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        return self.silu_and_mul(layer(x))


def split_heads(qkv: torch.Tensor, shape: HeadShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[T, (num_heads + 2 num_kv_heads) * head_dim] -> views [T, heads, head_dim] of q, of k and of v."""
    heads = qkv.view(qkv.shape[0], -1, shape.head_dim)
    q, k, v = torch.split_with_sizes(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
    return q, k, v
