"""Gated linear attention: its weights, so that `explain` can count them. The engine cannot run it yet."""

from __future__ import annotations

from miniserve.models.description import LinearAttentionConfig, ModelConfig
from miniserve.models.layers.base import Module
from miniserve.models.options import BuildOptions


class LinearAttention(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, linear: LinearAttentionConfig) -> None:
        super().__init__()
        key_size = linear.num_key_heads * linear.key_head_dim
        value_size = linear.num_value_heads * linear.value_head_dim
        outputs = {"in_proj_qkvz": 2 * (key_size + value_size), "in_proj_ba": 2 * linear.num_value_heads}
        self.in_proj = options.linear(config.hidden_size, outputs, bias=False)
        self.conv1d = options.linear(linear.conv_kernel, {"conv1d": 2 * key_size + value_size}, bias=False)
        self.out_proj = options.linear(value_size, {"out_proj": config.hidden_size}, bias=False)
