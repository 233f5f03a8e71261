"""The decoder that all models share; what differs between them is said by `ModelConfig`, layer by layer.

Names of modules are those of the checkpoints, but for kv_a_proj and where matrices are fused: qkv_proj, gate_up_proj,
qkv_a_proj.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from miniserve.attention.context import StepContext
from miniserve.models.description import ModelConfig
from miniserve.models.layers.attention import SelfAttention
from miniserve.models.layers.base import Module
from miniserve.models.layers.embedding import Embedding, TiedLMHead
from miniserve.models.layers.latent_attention import LatentSelfAttention
from miniserve.models.layers.linear import Linear
from miniserve.models.layers.linear_attention import LinearAttention
from miniserve.models.layers.mlp import MLP, SparseMLP
from miniserve.models.layers.norm import Normed, Residual
from miniserve.models.layers.rotary import RotaryEmbedding
from miniserve.models.options import BuildOptions


class DecoderLayer(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions, layer_index: int) -> None:
        super().__init__()
        self.input_layernorm = options.norm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _attention(config, options.within("self_attn"), layer_index)
        self.post_attention_layernorm = options.norm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _mlp(config, options.within("mlp"), layer_index)

    def forward(self, x: Residual, cos_sin: Tensor, ctx: StepContext) -> Residual:
        attended = self.self_attn(self.input_layernorm(x), cos_sin, ctx)
        x = x.reading(ctx.read) + attended
        x += self.mlp(self.post_attention_layernorm(x))
        return x


def _attention(
    config: ModelConfig, options: BuildOptions, layer_index: int
) -> SelfAttention | LatentSelfAttention | LinearAttention:
    if config.linear is not None and config.linear.layers[layer_index]:
        return LinearAttention(config, options, config.linear)
    if config.latent is None:
        return SelfAttention(config, options, layer_index)
    return LatentSelfAttention(config, options, config.latent, layer_index)


def _mlp(config: ModelConfig, options: BuildOptions, layer_index: int) -> MLP | SparseMLP:
    if config.moe is None or not config.moe.sparse_layers[layer_index]:
        return MLP(config, options, config.intermediate_size)
    return SparseMLP(config, options, config.moe)


class Decoder(Module):
    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, options.dtype, options.ops)
        layers = [DecoderLayer(config, options.within(f"layers.{index}"), index) for index in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = options.norm(config.hidden_size, config.rms_norm_eps)
        positions = options.max_model_len or config.max_position_embeddings
        self.rotary_emb = RotaryEmbedding(
            config.rope, config.rotary_dim, max_positions=positions, device=options.device, ops=options.ops
        )

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: StepContext) -> Tensor:
        cos_sin = self.rotary_emb(positions)  # first, so that it is settled by the look-up of embeddings (see `pdl.py`)
        x = Residual(self.embed_tokens(input_ids))
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, cos_sin, ctx)
        x = last(x, cos_sin, ctx.for_last_layer())
        hidden: Normed = self.norm(x)
        return hidden.read()


def _head(config: ModelConfig, options: BuildOptions, embedding: Embedding) -> Linear:
    words = options.shard.part(config.vocab_size)
    if config.tie_word_embeddings:
        method = options.method(config.hidden_size, words.size)
        return TiedLMHead(embedding, words, dtype=options.dtype, method=method)
    return options.linear(config.hidden_size, {"lm_head": words}, bias=False)


class CausalLM(Module):
    """The whole model, on the meta device until `loader` fills it. `attention_specs` has one entry per layer."""

    def __init__(self, config: ModelConfig, options: BuildOptions) -> None:
        super().__init__()
        self.config = config
        self.options = options = replace(options, quantization=config.quantization)
        self.model = Decoder(config, options.within("model"))
        self.attention_specs = [
            config.attention_spec(layer, options.dtype, options.kv_dtype, options.shard)
            for layer in range(config.num_layers)
        ]
        self.lm_head = _head(config, options, self.model.embed_tokens)

    def forward(self, input_ids: Tensor, positions: Tensor, ctx: StepContext) -> Tensor:
        """input_ids, positions: int64 [T] -> hidden states after the last norm, [T, hidden_size], or of the tokens that
        are read alone."""
        hidden: Tensor = self.model(input_ids, positions, ctx)
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [R, hidden_size] -> [R, vocab_size] in the model's dtype; of these this rank's part
        of the columns."""
        return self.lm_head(hidden)
