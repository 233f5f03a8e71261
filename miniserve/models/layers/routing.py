"""Which experts a token goes to, and with what weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miniserve.models.description import MoEConfig
from miniserve.models.layers.base import Layer

if TYPE_CHECKING:
    from miniserve.models.layers.norm import Normed
    from miniserve.models.layers.ops import Ops

Chosen = tuple[Tensor, Tensor]  # as `route` gives it


def route(logits: Tensor, moe: MoEConfig, correction_bias: Tensor | None) -> Chosen:
    """logits: float32 [T, num_experts] -> weights float32 and expert ids int64, both [T, top_k].

    Softmax or sigmoid scores; the choice may be limited to the best groups of experts, a group being as good as its
    best expert (DeepSeek-V2, section 2.2.2) or, where a correction bias takes part in the choice, as its best two
    (DeepSeek-V3, section 2.1.2).
    """
    scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias
    if moe.top_groups < moe.num_groups:
        groups = choice.unflatten(-1, (moe.num_groups, -1))
        worth = groups.amax(-1) if correction_bias is None else groups.topk(2, dim=-1).values.sum(-1)
        best = worth.topk(moe.top_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
        choice = groups.masked_fill(closed[..., None], float("-inf")).flatten(1)
    ids = choice.topk(moe.top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    if moe.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * moe.scaling if moe.scaling != 1.0 else weights, ids


class Router(Layer):
    """The gate of a layer with routed experts. Its weights are float32: a rounded logit may choose another expert."""

    weight: Tensor
    e_score_correction_bias: Tensor | None

    def __init__(self, hidden_size: int, moe: MoEConfig, ops: Ops) -> None:
        super().__init__()
        self.moe = moe
        self.ops = ops
        self.declare("weight", (moe.num_experts, hidden_size), torch.float32)
        if moe.correction_bias:
            self.declare("e_score_correction_bias", (moe.num_experts,), torch.float32)
        else:
            self.register_parameter("e_score_correction_bias", None)

    def forward(self, x: Normed) -> Chosen:
        """x: [T, hidden_size]."""
        return self.ops.choose_experts(self, x)
