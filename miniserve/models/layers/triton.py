"""A decoder's operations and linear layers on a GPU, through the Triton kernels."""

from __future__ import annotations

import torch
from torch.nn import functional

from miniserve.kernels.triton.runtime import TritonKernels
from miniserve.models.layers.linear import Linear
from miniserve.models.layers.ops import HeadShape, split_heads


class TritonMethod:
    """The weight as it is, [out_features, in_features]: our kernel for few rows, the vendor's library for many."""

    def __init__(self, kernels: TritonKernels) -> None:
        self._kernels = kernels

    def finish(self, layer: Linear) -> None:
        pass

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        y = self._kernels.linear(x, layer.weight, layer.bias)
        return functional.linear(x, layer.weight, layer.bias) if y is None else y


class TritonOps:
    """`Ops` through the Triton kernels."""

    def __init__(self, kernels: TritonKernels) -> None:
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
        self._kernels.norm_rope(
            qkv,
            cos_sin,
            q_weight,
            k_weight,
            eps,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )
        return split_heads(qkv, shape)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._kernels.silu_and_mul(gate_up)

    def gated_linear(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        y = self._kernels.linear(x, layer.weight, layer.bias, gated=True)
        return self._kernels.silu_and_mul(functional.linear(x, layer.weight, layer.bias)) if y is None else y
