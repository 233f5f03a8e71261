"""Multi-head attention with grouped KV heads: projections, norms of q and k, rope, and what a backend reads of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miniserve.attention.context import StepContext
from miniserve.attention.spec import AttentionSpec, QKRope
from miniserve.models.description import ModelConfig
from miniserve.models.layers.base import Module
from miniserve.models.layers.norm import Normed
from miniserve.models.layers.ops import PendingSum
from miniserve.models.options import BuildOptions


@dataclass(slots=True)
class Attention:
    """What a layer shows of itself to the attention backend (an `AttentionLayer`)."""

    layer_index: int
    spec: AttentionSpec
    k_scale: Tensor
    v_scale: Tensor
    sinks: Tensor | None = None


class SelfAttention(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, layer_index: int) -> None:
        super().__init__()
        heads, kv_heads = options.shard.heads(config.num_heads, config.num_kv_heads)
        kv = kv_heads.times(config.head_dim)
        outputs = {"q_proj": heads.times(config.head_dim * (2 if config.gated else 1)), "k_proj": kv, "v_proj": kv}
        self.qkv_proj = options.linear(config.hidden_size, outputs, bias=config.qkv_bias)
        self.o_proj = options.linear(heads.times(config.head_dim), {"o_proj": config.hidden_size}, bias=config.o_bias)
        self.ops, self.eps = options.ops, config.rms_norm_eps
        self.q_norm = options.norm(config.head_dim, self.eps) if config.qk_norm else None
        self.k_norm = options.norm(config.head_dim, self.eps) if config.qk_norm else None
        one = torch.ones(1, device=options.device)
        spec = config.attention_spec(layer_index, options.dtype, options.kv_dtype, options.shard)
        self.attn = Attention(layer_index, spec, one, one)

    def forward(self, x: Normed, cos_sin: Tensor, ctx: StepContext) -> Tensor | PendingSum:
        qkv = self.qkv_proj(x.read())
        q_weight = self.q_norm.weight if self.q_norm is not None else None
        k_weight = self.k_norm.weight if self.k_norm is not None else None
        rope = QKRope(cos_sin, q_weight, k_weight, self.eps)
        if ctx.fuses_rope:
            out = ctx.attend_qkv(self.attn, qkv, rope)
        else:
            out = ctx.attend(self.attn, *self.ops.split_norm_rope(qkv, self.attn.spec, rope))
        return self.ops.linear_to_add(self.o_proj, out)
