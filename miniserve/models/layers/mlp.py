"""What follows attention in a layer: one SwiGLU MLP, or routed experts with or without one that all tokens share."""

from __future__ import annotations

from torch import Tensor

from miniserve.models.description import ModelConfig, MoEConfig
from miniserve.models.layers.base import Module
from miniserve.models.layers.norm import RMSNorm
from miniserve.models.layers.ops import PendingSum
from miniserve.models.layers.routing import Router
from miniserve.models.options import BuildOptions


class MLP(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, intermediate_size: int) -> None:
        super().__init__()
        hidden, middle = config.hidden_size, options.width(intermediate_size)
        self.ops = options.ops
        self.gate_up_proj = options.linear(hidden, {"gate_proj": middle, "up_proj": middle}, bias=config.mlp_bias)
        self.down_proj = options.linear(middle, {"down_proj": hidden}, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.ops.gated_linear(self.gate_up_proj, x))

    def after(self, norm: RMSNorm, x: Tensor | PendingSum, residual: Tensor) -> tuple[Tensor | PendingSum, Tensor]:
        """Adds x to the residual stream, both [T, hidden_size], and takes its norm as input. Returns what is then
        still to be added, and the stream."""
        x, residual = norm.add(x, residual)
        return self.ops.linear_to_add(self.down_proj, self.ops.gated_linear(self.gate_up_proj, x)), residual


class SparseMLP(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, moe: MoEConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate = Router(hidden, moe, options.routing)
        self.experts = options.within("experts").experts_of(moe, hidden)
        shared = options.within("shared_experts")
        self.shared_experts = MLP(config, shared, moe.shared_size) if moe.shared_size else None

    def after(self, norm: RMSNorm, x: Tensor | PendingSum, residual: Tensor) -> tuple[Tensor | PendingSum, Tensor]:
        """As `MLP.after`."""
        x, residual, topk_weights, topk_ids = self.gate(norm, x, residual)
        out: Tensor | PendingSum = self.experts(x, topk_weights, topk_ids)
        return out if self.shared_experts is None else out + self.shared_experts(x), residual
