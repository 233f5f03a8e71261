"""Gated linear attention: its weights, so that `explain` can count them. The engine cannot run it yet."""

from __future__ import annotations

from miniserve.models.description import LinearAttentionConfig, ModelConfig
from miniserve.models.layers.base import Module
from miniserve.models.options import BuildOptions


class LinearAttention(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, linear: LinearAttentionConfig) -> None:
        super().__init__()
        key_heads = options.shard.part(linear.num_key_heads)  # each with the value heads that it serves
        values = linear.num_value_heads // linear.num_key_heads
        key_size, value_size = linear.key_head_dim, values * linear.value_head_dim
        qkvz, ba = key_heads.times(2 * (key_size + value_size)), key_heads.times(2 * values)
        self.in_proj = options.linear(config.hidden_size, {"in_proj_qkvz": qkvz, "in_proj_ba": ba}, bias=False)
        conv = key_heads.times(2 * key_size + value_size)
        self.conv1d = options.linear(linear.conv_kernel, {"conv1d": conv}, bias=False)
        self.out_proj = options.linear(key_heads.times(value_size), {"out_proj": config.hidden_size}, bias=False)
