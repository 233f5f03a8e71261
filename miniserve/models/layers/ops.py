"""The small operations of a decoder: in PyTorch, as plain functions (the reference), and as the CPU's fused kernels.

Each rounds to the model's dtype where transformers does, so that in float32 they differ only by summation order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.attention.spec import AttentionSpec, LatentRope, QKRope
from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.linear import Linear
from miniserve.models.layers.routing import Chosen, Router, route
from miniserve.parallel.group import Group

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels
    from miniserve.models.layers.norm import Normed


@dataclass(frozen=True, slots=True)
class PendingSum:
    """What routed experts or an MLP add to the residual stream, in parts that the norm that follows sums on its way.

    parts: float32 or the model's dtype [T * K, size], a token's after one another; shared: what all tokens share,
    [T, size].
    """

    kernels: TritonKernels
    parts: Tensor
    shared: Tensor | None = None

    def __add__(self, shared: Tensor) -> PendingSum:
        return replace(self, shared=shared)

    def total(self, residual: Tensor) -> Tensor:
        """The sum of all parts, of the shape and dtype of `residual`, without it."""
        total: Tensor = self.parts.unflatten(0, (len(residual), -1)).sum(1, dtype=torch.float32)
        return (total if self.shared is None else total + self.shared).to(residual.dtype)

    def add_rms_norm(self, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """As `Ops.add_rms_norm`, with all parts for x."""
        return self.kernels.add_pairs_norm(self.parts, self.shared, residual, weight, eps), residual


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension (Zhang & Sennrich 2019), computed in float32.

    x: [..., size], weight: [size]. Returns x's shape and dtype; the product with `weight` is taken in that dtype.
    """
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate each head by its position: the first half of a head is paired with its second half (Su et al. 2021).

    x: [T, heads, head_dim]; cos_sin: float32 [T, head_dim], the cosines then the sines. Computed in float32; returns
    x's shape and dtype.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_interleaved(x: Tensor, cos_sin: Tensor) -> Tensor:
    """As `rope`, but neighbours are paired: elements 2i and 2i + 1 of a head (GPT-J's and DeepSeek's way)."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)


def qk_norm_rope(q: Tensor, k: Tensor, how: QKRope) -> tuple[Tensor, Tensor]:
    """Norm every head of q and k where the model has weights for it, then `rope` both.

    q: [T, num_heads, head_dim], k: [T, num_kv_heads, head_dim] (may be strided views of one tensor).
    Returns new tensors of the same shapes.
    """
    if how.q_weight is not None and how.k_weight is not None:
        q, k = rms_norm(q, how.q_weight, how.eps), rms_norm(k, how.k_weight, how.eps)
    return rope(q, how.cos_sin), rope(k, how.cos_sin)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU's middle: silu(gate) * up. gate_up: [T, 2 * size], gate first. Returns [T, size]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


class Ops:
    """What a decoder computes between its matrix products, in PyTorch for any device; others override what they do
    faster. x, residual: [T, size], contiguous."""

    def look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of table [n, dim] at ids int64 [T] -> [T, dim]."""
        return functional.embedding(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """As the function `rms_norm`."""
        return rms_norm(x, weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Add x to the residual stream (in the model's dtype), perhaps in place, then norm it.

        Returns (normed, new residual).
        """
        residual = residual + x
        return rms_norm(residual, weight, eps), residual

    def reduce_norm(
        self, x: Tensor | PendingSum, residual: Tensor, weight: Tensor, eps: float, group: Group
    ) -> tuple[Tensor, Tensor]:
        """As `add_rms_norm`, of the sum of what the ranks of `group` have for x."""
        total = group.reduce(x if isinstance(x, Tensor) else x.total(residual))
        return self.add_rms_norm(total, residual, weight, eps)

    def split_norm_rope(self, qkv: Tensor, spec: AttentionSpec, rope: QKRope) -> tuple[Tensor, Tensor, Tensor]:
        """qkv [T, (num_heads + 2 num_kv_heads) * head_dim], contiguous, may be overwritten -> q [T, num_heads,
        head_dim] and k, v [T, num_kv_heads, head_dim], q and k normed and rotated as `qk_norm_rope` does."""
        q, k, v = split_heads(qkv, spec)
        return *qk_norm_rope(q, k, rope), v

    def norm_rope_latent(
        self, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, how: LatentRope
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q_pe [T, heads, dim] and k_pe [T, dim], rotated as `rope` or `rope_interleaved` does, and kv_c [T, size],
        normed. All three may be views and may be overwritten."""
        rotate = rope_interleaved if how.interleaved else rope
        normed = self.rms_norm(kv_c, how.weight, how.eps)
        return rotate(q_pe, how.cos_sin), normed, rotate(k_pe[:, None], how.cos_sin)[:, 0]

    def head_linear(self, x: Tensor, weights: Tensor) -> Tensor:
        """x [T, heads, n], each head by its matrix of weights [heads, n, m] -> [T, heads, m], contiguous. Both may be
        views."""
        out = x.new_empty(*x.shape[:2], weights.shape[2])
        # Into its place at once: the product of many matrices has the heads first, and turning it would be a copy.
        torch.bmm(x.transpose(0, 1), weights, out=out.transpose(0, 1))
        return out

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """As the function `silu_and_mul`."""
        return silu_and_mul(gate_up)

    def gated_linear(self, layer: Linear, x: Tensor) -> Tensor:
        """`silu_and_mul` of what the layer, gates before ups, makes of x [T, in_features]."""
        return self.silu_and_mul(layer(x))

    def linear_to_add(self, layer: Linear, x: Tensor) -> Tensor | PendingSum:
        """What the layer makes of x [T, in_features], which a norm then adds to the residual stream."""
        return layer(x)

    def choose_experts(self, router: Router, x: Normed) -> Chosen:
        """What `route` gives for the router's logits of x [T, hidden_size]; the norm may be computed on the way."""
        logits = functional.linear(x.read().float(), router.weight)
        return route(logits, router.moe, router.e_score_correction_bias)


class NativeOps(Ops):
    """Through the C++ kernels: on a CPU."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def look_up(self, ids: Tensor, table: Tensor) -> Tensor:
        return self._kernels.gather_rows(ids, table)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self._kernels.rms_norm(x.contiguous(), weight, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return self._kernels.add_rms_norm(x, residual, weight, eps), residual

    def split_norm_rope(self, qkv: Tensor, spec: AttentionSpec, rope: QKRope) -> tuple[Tensor, Tensor, Tensor]:
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        self._kernels.qk_norm_rope(qkv, rope.q_weight, rope.k_weight, rope.cos_sin, *heads, rope.eps)
        return split_heads(qkv, spec)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        return self._kernels.silu_and_mul(gate_up)


def split_heads(qkv: Tensor, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """[T, (num_heads + 2 num_kv_heads) * head_dim] -> views [T, heads, head_dim] of q, of k and of v."""
    heads = qkv.view(qkv.shape[0], -1, spec.head_dim)
    q, k, v = torch.split_with_sizes(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
    return q, k, v
