"""What follows attention in a layer: one SwiGLU MLP, or routed experts with or without one that all tokens share."""

from __future__ import annotations

from torch import Tensor

from miniserve.models.description import ModelConfig, MoEConfig
from miniserve.models.layers.base import Module
from miniserve.models.layers.norm import Normed
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

    def forward(self, x: Normed) -> Tensor | PendingSum:
        """x: [T, hidden_size] -> what is to be added to the residual stream."""
        return self.ops.linear_to_add(self.down_proj, self.ops.gated_linear(self.gate_up_proj, x.read()))

    def whole(self, x: Tensor) -> Tensor:
        """As `forward`, [T, hidden_size], to be added to something else first."""
        return self.down_proj(self.ops.gated_linear(self.gate_up_proj, x))


class SparseMLP(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, moe: MoEConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.gate = Router(hidden, moe, options.router_ops)
        self.experts = options.within("experts").experts_of(moe, hidden)
        shared = options.within("shared_experts")
        self.shared_experts = MLP(config, shared, moe.shared_size) if moe.shared_size else None

    def forward(self, x: Normed) -> Tensor | PendingSum:
        """As `MLP.forward`."""
        topk_weights, topk_ids = self.gate(x)
        out: Tensor | PendingSum = self.experts(x.read(), topk_weights, topk_ids)
        return out if self.shared_experts is None else out + self.shared_experts.whole(x.read())
