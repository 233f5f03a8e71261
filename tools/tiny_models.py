"""The built-in models' architectures, and what training one with routed experts takes beside a loss.

`deepseek` has the attention of DeepSeek-V3 in its true widths where kernels depend on them (a latent of 512 + 64, 16
heads) and is small everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 2048
MAX_POSITIONS = 2048
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CORRECTION = "e_score_correction_bias"


def build_qwen3(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=ROPE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def build_deepseek(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """One dense layer, then three of eight experts in four groups, two of them for a token, and a shared one."""
    config = DeepseekV3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        first_k_dense_replace=1,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        n_shared_experts=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=0,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=ROPE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = DeepseekV3ForCausalLM(config)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = TrainingExperts(layer.mlp.experts)
    return model


ARCHITECTURES: dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]] = {
    "deepseek": build_deepseek,
    "qwen3": build_qwen3,
}


class TrainingExperts(nn.Module):
    """A model's routed experts, every one over every token: more arithmetic, but three matrix products that a compiler
    can take, where the model's own forward picks rows by data. Counts each expert's tokens in `load`.

    Takes over the parameters gate_up_proj [E, 2 I, hidden] and down_proj [E, hidden, I] under their names.
    """

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.register_buffer("load", torch.zeros(self.gate_up_proj.shape[0]), persistent=False)

    def forward(self, x: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """x [T, hidden], topk_ids and topk_weights [T, K] -> [T, hidden]."""
        shares = topk_weights.new_zeros(x.shape[0], self.load.shape[0]).scatter(1, topk_ids, topk_weights)
        with torch.no_grad():
            self.load += (shares > 0).sum(0)
        gate, up = F.linear(x, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.load.shape[0], -1)).chunk(2, -1)
        middle = (F.silu(gate) * up * shares[..., None]).flatten(1)
        return F.linear(middle, self.down_proj.transpose(0, 1).flatten(1)).to(x.dtype)


def routed_layers(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The MLPs of the model that have a router (`gate`) and `TrainingExperts`."""
    return (module for module in model.modules() if isinstance(getattr(module, "experts", None), TrainingExperts))


@torch.no_grad()
def balance_experts(model: PreTrainedModel, speed: float) -> None:
    """Keep experts in use without a loss term (DeepSeek-V3, section 2.1.2): after a step, the routing bias of an expert
    rises by `speed` where it got fewer tokens than the mean, and falls where it got more."""
    for layer in routed_layers(model):
        load = layer.experts.load
        getattr(layer.gate, CORRECTION).add_(torch.sign(load.mean() - load), alpha=speed)
        load.zero_()


def convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """`model.to(dtype)`, but for the routing biases, which are float32 in every checkpoint of this family."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith(CORRECTION)}
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name in kept:
            buffer.data = kept[name].to(buffer.device)
