"""What a model is: a frozen description in one vocabulary for every architecture. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.models.quantization import Quantization
from miniserve.parallel.shard import Shard

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the whole head, or over the part that `LatentDims` sets aside for it. Lengths in
    tokens; what `config_rope.ROPE_KEYS` names for a type is read, the rest keeps its default. mscale, mscale_all_dim:
    YaRN's, of which the second also scales the scores of latent attention.

    dynamic: transformers derives the frequencies from the longest sequence of the call, which has no meaning where
    sequences of different lengths share a step. Up to the model's max_position_embeddings they are the plain ones; that
    is what is built, and longer contexts are refused.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True


def yarn_magnitude(factor: float, mscale: float) -> float:
    """By which YaRN (Peng et al. 2023) raises queries and keys; 1 where it does not stretch."""
    return 1.0 if factor <= 1 or not mscale else 0.1 * mscale * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """Routed experts: which layers have them (sparse_layers, one entry per layer), and how a token finds its own.

    scoring: softmax or sigmoid of the router's logits. correction_bias: added to the scores to choose experts, not to
    weigh them. num_groups, top_groups: experts are chosen from the top_groups best of num_groups groups. normalize:
    a token's weights are made to sum to 1; then come times `scaling`. shared_size: the width of the MLP that every
    token passes beside its experts, 0 for none.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    sparse_layers: tuple[bool, ...]
    scoring: str = "softmax"
    normalize: bool = False
    scaling: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    correction_bias: bool = False
    shared_size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionConfig:
    """Gated linear attention (Qwen3-Next's Gated DeltaNet), and which layers have it in place of softmax attention:
    one entry per layer. It keeps a state of fixed size and no KV cache."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    layers: tuple[bool, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder. Sizes in elements, lengths in tokens.

    intermediate_size: of the layers that are not sparse. head_dim: of queries and keys. max_position_embeddings: the
    longest context the model may be served with, rope scaling included. sliding_windows: one entry per layer, None
    where the layer sees everything. latent, moe: None for plain attention, for plain MLPs. Of latent attention alone:
    q_lora_rank, None where queries are projected in one step; rope_interleaved, whether rotary pairs are neighbours
    (2i, 2i + 1), not (i, i + rope_dim / 2). num_draft_layers: layers
    that a checkpoint has after these, for guessing further tokens; they are not built. dtype: the one the weights are
    stored in: bfloat16, float16 or float32. notes: what users should know of how the files were read, a sentence each.
    quantization: how matrices are stored in fewer bits, None where none are.

    missing: why the engine cannot run the model, a sentence each; such a model can be explained, not loaded. Only such
    models set these: sinks; gated, attention's output has a gate, which makes q_proj twice as wide; rotary_factor, the
    share of a head that rope turns; linear.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...]
    latent: LatentDims | None = None
    q_lora_rank: int | None = None
    rope_interleaved: bool = True
    moe: MoEConfig | None = None
    num_draft_layers: int = 0
    dtype: str = "float32"
    notes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    quantization: Quantization | None = None
    sinks: bool = False
    gated: bool = False
    rotary_factor: float = 1.0
    linear: LinearAttentionConfig | None = None

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that rope turns."""
        return int(self.head_dim * self.rotary_factor) if self.latent is None else self.latent.rope_dim

    @property
    def attention_scale(self) -> float:
        """What multiplies q·k. YaRN raises it where latent attention states mscale_all_dim (DeepSeek-V2's code)."""
        scale: float = self.head_dim**-0.5
        if self.latent is None:
            return scale
        return scale * yarn_magnitude(self.rope.factor, self.rope.mscale_all_dim) ** 2

    def has_kv_cache(self, layer: int) -> bool:
        """Whether the layer is one of softmax attention."""
        return self.linear is None or not self.linear.layers[layer]

    def attention_spec(
        self, layer: int, dtype: torch.dtype, kv_dtype: torch.dtype, shard: Shard | None = None
    ) -> AttentionSpec:
        """Of a layer that has a KV cache, with the heads of `shard`. dtype: of the layer; kv_dtype: of the cache."""
        latent = self.latent
        heads, kv_heads = (shard or Shard()).heads(
            self.num_heads, self.num_kv_heads if latent is None else self.num_heads
        )
        return AttentionSpec(
            num_heads=heads.size,
            num_kv_heads=kv_heads.size if latent is None else 1,
            head_dim=self.head_dim if latent is None else latent.kv_lora_rank + latent.rope_dim,
            scale=self.attention_scale,
            dtype=dtype,
            kv_dtype=kv_dtype,
            sliding_window=self.sliding_windows[layer],
            sinks=self.sinks,
            latent=latent,
            qk_norm=self.qk_norm,
            rotary_dim=None if self.rotary_factor == 1.0 else self.rotary_dim,
        )

    def most_ranks(self, *, expert_parallel: bool) -> int:
        """So many ranks can share the model that each has some of everything that is divided."""
        parts = [self.num_heads, self.vocab_size]
        if self.moe is None or not all(self.moe.sparse_layers):
            parts.append(self.intermediate_size)
        if self.moe is not None:
            parts.append(self.moe.num_experts if expert_parallel else self.moe.intermediate_size)
            parts += [self.moe.shared_size] if self.moe.shared_size else []
        return min(parts)

    def widest_mlp(self, shard: Shard, *, expert_parallel: bool) -> int:
        """The largest width that a token's MLP has on a rank in any layer, all its experts together."""
        moe, widest = self.moe, shard.part(self.intermediate_size).size
        if moe is None:
            return widest
        width = moe.intermediate_size if expert_parallel else shard.part(moe.intermediate_size).size
        return max(widest, moe.top_k * width + shard.part(moe.shared_size).size)
