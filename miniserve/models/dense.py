"""The dense decoder that Llama, Mistral, Qwen2 and Qwen3 share; what differs between them is said by `ModelConfig`.

Names of modules are those of the checkpoints, except where matrices are fused: qkv_proj, gate_up_proj.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from miniserve.attention.spec import AttentionSpec, StepContext
from miniserve.kernels.native import NativeKernels
from miniserve.models.config import ModelConfig
from miniserve.models.layers.base import Module
from miniserve.models.layers.embedding import Embedding, LMHead, TiedLMHead
from miniserve.models.layers.linear import Linear, LinearMethod, choose_method
from miniserve.models.layers.norm import RMSNorm
from miniserve.models.layers.ops import HeadShape, NativeOps, Ops, TorchOps
from miniserve.models.layers.rotary import RotaryEmbedding

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """What a model is built for. max_model_len in tokens; device is where its weights will lie; native are the CPU's
    kernels and triton the GPU's, None to do without."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    device: torch.device
    max_model_len: int
    native: NativeKernels | None = None
    triton: TritonKernels | None = None

    @property
    def ops(self) -> Ops:
        if self.triton is not None:
            from miniserve.models.layers.triton import TritonOps

            return TritonOps(self.triton)
        return TorchOps() if self.native is None else NativeOps(self.native)

    def method(self, in_features: int, out_features: int) -> LinearMethod:
        return choose_method(self.dtype, self.device, in_features, out_features, self.native, self.triton)

    def linear(self, in_features: int, outputs: Mapping[str, int], *, bias: bool) -> Linear:
        method = self.method(in_features, sum(outputs.values()))
        return Linear(in_features, outputs, bias=bias, dtype=self.dtype, method=method)

    def norm(self, size: int, eps: float) -> RMSNorm:
        return RMSNorm(size, eps, self.dtype, self.ops)


@dataclass(slots=True)
class Attention:
    """What a layer shows of itself to the attention backend (an `AttentionLayer`)."""

    layer_index: int
    spec: AttentionSpec
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    sinks: torch.Tensor | None = None


def _attention_spec(config: ModelConfig, options: BuildOptions, layer_index: int) -> AttentionSpec:
    return AttentionSpec(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.head_dim**-0.5,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        sliding_window=config.sliding_windows[layer_index],
    )


class SelfAttention(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, layer_index: int) -> None:
        super().__init__()
        self.shape = HeadShape(config.num_heads, config.num_kv_heads, config.head_dim)
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = options.linear(
            config.hidden_size, {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}, bias=config.qkv_bias
        )
        self.o_proj = options.linear(q_size, {"o_proj": config.hidden_size}, bias=config.o_bias)
        self.ops, self.eps = options.ops, config.rms_norm_eps
        self.q_norm = options.norm(config.head_dim, self.eps) if config.qk_norm else None
        self.k_norm = options.norm(config.head_dim, self.eps) if config.qk_norm else None
        one = torch.ones(1, device=options.device)
        self.attn = Attention(layer_index, _attention_spec(config, options, layer_index), one, one)

    def forward(self, x: torch.Tensor, cos_sin: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        q, k, v = self.ops.split_norm_rope(
            self.qkv_proj(x),
            self.shape,
            cos_sin,
            self.q_norm.weight if self.q_norm is not None else None,
            self.k_norm.weight if self.k_norm is not None else None,
            self.eps,
        )
        out = ctx.attend(self.attn, q, k, v)
        projected: torch.Tensor = self.o_proj(out)
        return projected


class MLP(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__()
        hidden, middle = config.hidden_size, config.intermediate_size
        self.ops = options.ops
        self.gate_up_proj = options.linear(hidden, {"gate_proj": middle, "up_proj": middle}, bias=config.mlp_bias)
        self.down_proj = options.linear(middle, {"down_proj": hidden}, bias=config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.down_proj(self.ops.gated_linear(self.gate_up_proj, x))
        return projected


class DecoderLayer(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = options.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, options, layer_index)
        self.post_attention_layernorm = options.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, options)

    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None, cos_sin: torch.Tensor, ctx: StepContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x: what is still to be added to the residual stream (in the first layer: the stream itself)."""
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm.add(x, residual)
        x = self.self_attn(x, cos_sin, ctx)
        x, residual = self.post_attention_layernorm.add(x, residual)
        return self.mlp(x), residual


class Decoder(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, options.dtype)
        self.layers = nn.ModuleList(DecoderLayer(config, options, index) for index in range(config.num_layers))
        self.norm = options.norm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(
            config.rope, config.head_dim, max_positions=options.max_model_len, device=options.device
        )

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        x: torch.Tensor = self.embed_tokens(input_ids)
        residual: torch.Tensor | None = None
        cos_sin = self.rotary_emb(positions)
        for layer in self.layers:
            x, residual = layer(x, residual, cos_sin, ctx)
        return self.norm(x) if residual is None else self.norm.add(x, residual)[0]


class CausalLM(Module):
    """The whole model, on the meta device until `loader` fills it. `attention_specs` has one entry per layer."""

    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__()
        self.config = config
        self.options = options
        self.attention_specs = [_attention_spec(config, options, index) for index in range(config.num_layers)]
        self.model = Decoder(config, options)
        method = options.method(config.hidden_size, config.vocab_size)
        self.lm_head: LMHead
        if config.tie_word_embeddings:
            self.lm_head = TiedLMHead(self.model.embed_tokens, dtype=options.dtype, method=method)
        else:
            self.lm_head = LMHead(config.vocab_size, config.hidden_size, dtype=options.dtype, method=method)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, ctx: StepContext) -> torch.Tensor:
        """input_ids, positions: int64 [T] -> hidden states after the last norm, [T, hidden_size]."""
        hidden: torch.Tensor = self.model(input_ids, positions, ctx)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, hidden_size] -> float32 [R, vocab_size]."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits
