"""Shared by this room's tests: transformers checkpoints of random small models, and the plainest StepContext."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from miniserve.attention.spec import AttentionLayer, LatentLayer
from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.description import ModelConfig
from miniserve.models.loader import load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model

VOCAB = 101
CLASSES = {
    "LlamaForCausalLM": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "MistralForCausalLM": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "Qwen2ForCausalLM": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "Qwen3ForCausalLM": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "Qwen3MoeForCausalLM": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "DeepseekV2ForCausalLM": (transformers.DeepseekV2Config, transformers.DeepseekV2ForCausalLM),
    "DeepseekV3ForCausalLM": (transformers.DeepseekV3Config, transformers.DeepseekV3ForCausalLM),
}
DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LATENT = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
LENGTH = 64  # max_position_embeddings of the small models: their trained length, or YaRN's and llama3's stretched one


HEAD_DIMS = (64, 80, 128, 256)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


def rope_settings(rope_type: str, rng: random.Random) -> dict[str, Any]:
    settings: dict[str, Any] = {"rope_type": rope_type, "rope_theta": rng.choice([10000.0, 500000.0])}
    if rope_type != "default":
        settings["factor"] = rng.choice([2.0, 4.0])
    if rope_type == "yarn":
        settings |= {"factor": 4.0, "original_max_position_embeddings": LENGTH // 4}
        settings |= rng.choice([{}, {"attention_factor": 1.3}, {"mscale": 0.7, "mscale_all_dim": 1.1}])
        settings |= rng.choice([{}, {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}])
    if rope_type == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": LENGTH // 2}
    return settings


def random_settings(architecture: str, number: int) -> dict[str, Any]:
    """Settings of a small model, drawn over everything the architecture can vary.

    The first twenty numbers pair every head_dim with every rope type; beyond them head_dim is left to be derived.
    """
    rng = random.Random(f"{architecture}{number}")
    num_kv_heads = rng.choice([1, 2, 3])
    num_heads = num_kv_heads * rng.choice([1, 2, 4])
    layers = rng.choice([1, 2, 3])
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": num_heads * rng.choice([8, 12]),
        "intermediate_size": rng.choice([40, 64, 97]),
        "num_hidden_layers": layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": HEAD_DIMS[number % 4],
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": rng.choice([1e-5, 1e-6]),
        "tie_word_embeddings": rng.random() < 0.5,
        "rope_parameters": rope_settings(ROPE_TYPES[number % 5], rng),
        "hidden_act": rng.choice(["silu", "swish"]),
    }
    if architecture in LATENT:
        return latent_settings(architecture, settings, rng)
    if architecture == "LlamaForCausalLM":
        settings |= {"attention_bias": rng.random() < 0.5, "mlp_bias": rng.random() < 0.5}
    elif architecture == "MistralForCausalLM":
        settings["sliding_window"] = rng.choice([None, 5, 16])
    else:
        settings |= {
            "use_sliding_window": rng.random() < 0.6,
            "sliding_window": rng.choice([5, 16]),
            "max_window_layers": rng.randrange(layers + 1),
        }
    if architecture == "Qwen3MoeForCausalLM":
        settings |= {
            "num_experts": rng.choice([4, 7]),
            "num_experts_per_tok": rng.choice([1, 2, 3]),
            "moe_intermediate_size": rng.choice([24, 33]),
            "norm_topk_prob": rng.random() < 0.5,
            "decoder_sparse_step": rng.choice([1, 1, 2]),
            "mlp_only_layers": rng.choice([[], [0], [layers - 1]]),
        }
    if architecture.startswith("Qwen3"):  # which have a head_dim of their own always
        settings["attention_bias"] = rng.random() < 0.5
    elif number >= len(HEAD_DIMS) * len(ROPE_TYPES):
        settings["hidden_size"] = num_heads * 20
        del settings["head_dim"]
    return settings


def latent_settings(architecture: str, settings: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """DeepSeek's: the latent and the heads' sizes, and every way of routing."""
    del settings["head_dim"]
    rope = settings["rope_parameters"]
    if rope["rope_type"] == "yarn" and rng.random() < 0.7:  # which scales the scores too
        rope |= {"mscale": 0.7, "mscale_all_dim": 1.1}
    groups = rng.choice([1, 2, 3])
    heads = settings["num_attention_heads"]
    settings |= {
        "num_key_value_heads": heads,
        "hidden_size": heads * 12,
        "q_lora_rank": rng.choice([None, 20]),
        "kv_lora_rank": rng.choice([16, 40]),
        "qk_nope_head_dim": rng.choice([8, 24]),
        "qk_rope_head_dim": rng.choice([4, 16]),
        "v_head_dim": rng.choice([8, 20]),
        "attention_bias": rng.random() < 0.3,
        "first_k_dense_replace": rng.randrange(min(2, settings["num_hidden_layers"])),
        "n_routed_experts": 6 * groups // rng.choice([1, 2]),
        "num_experts_per_tok": rng.choice([1, 2, 3]),
        "moe_intermediate_size": rng.choice([24, 33]),
        "n_shared_experts": rng.choice([1, 2]),
        "routed_scaling_factor": rng.choice([1.0, 2.5]),
        "n_group": groups,
        "topk_group": rng.randint(1, groups),
    }
    if architecture == "DeepseekV2ForCausalLM":
        method = rng.choice(["greedy", "group_limited_greedy"])
        return settings | {"topk_method": method, "mlp_bias": rng.random() < 0.3}
    draws = {"norm_topk_prob": rng.random() < 0.5, "rope_interleave": rng.random() < 0.7}
    return settings | draws | {"num_nextn_predict_layers": 0}


def reference_model(architecture: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model in float32 whose every parameter, biases and norms too, is random and matters."""
    config_class, model_class = CLASSES[architecture]
    model = model_class(config_class(**settings)).eval()
    model.set_attn_implementation("eager")
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the default one takes no odd widths
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2, generator=generator)
        else:
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.data.normal_(0.0, scale, generator=generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.2, generator=generator)
    return model


def read(path: Path, content: dict[str, Any]) -> ModelConfig:
    (path / "config.json").write_text(json.dumps(content))
    return load_model_config(path)


def refusal(path: Path, content: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        read(path, content)
    return str(caught.value)


def load(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Our model of a checkpoint, through the whole way: config.json, meta device, safetensors."""
    model = build_model(load_model_config(path), BuildOptions(dtype=dtype, kv_dtype=dtype, device=torch.device("cpu")))
    load_weights(model, path)
    return model


class DenseContext:
    """A plain `StepContext`: every sequence keeps its keys and values in a list, attention is a full matrix.

    `begin` says which sequence each of a step's consecutive chunks belongs to and returns the step's positions.
    """

    fuses_rope = False
    read = None

    def __init__(self) -> None:
        self.keys: dict[tuple[int, int], torch.Tensor] = {}
        self.values: dict[tuple[int, int], torch.Tensor] = {}
        self.lengths: dict[int, int] = {}
        self.chunks: list[tuple[int, int]] = []

    def for_last_layer(self) -> DenseContext:
        return self

    def begin(self, chunks: list[tuple[int, int]]) -> torch.Tensor:
        """chunks: (sequence, number of tokens), in the order of the step's tokens."""
        self.chunks = chunks
        positions = []
        for sequence, count in chunks:
            start = self.lengths.get(sequence, 0)
            positions += range(start, start + count)
            self.lengths[sequence] = start + count
        return torch.tensor(positions, dtype=torch.int64)

    def attend(self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outputs = [_attention(layer, q[rows], *self._store(key, k[rows], v[rows])) for key, rows in self._parts(layer)]
        return torch.cat(outputs)

    def attend_latent(
        self, layer: LatentLayer, q_nope: torch.Tensor, q_pe: torch.Tensor, kv_c: torch.Tensor, k_pe: torch.Tensor
    ) -> torch.Tensor:
        """One token of a sequence meets the latents themselves, several meet the keys and values made of them."""
        outputs = []
        for key, rows in self._parts(layer):
            latents, ropes = self._store(key, kv_c[rows], k_pe[rows])
            if rows.stop - rows.start == 1:
                q = torch.cat([layer.absorb(q_nope[rows]), q_pe[rows]], -1)
                keys = torch.cat([latents, ropes], -1)[:, None].expand(-1, q.shape[1], -1)
                out = _softmax(q, keys, latents[:, None].expand(-1, q.shape[1], -1), layer.spec.scale)
                outputs.append(layer.project_out(out))
            else:
                q = torch.cat([q_nope[rows], q_pe[rows]], -1)
                k_nope, v = layer.expand(latents)
                keys = torch.cat([k_nope, ropes[:, None].expand(-1, q.shape[1], -1)], -1)
                outputs.append(_softmax(q, keys, v, layer.spec.scale).flatten(1))
        return torch.cat(outputs)

    def _parts(self, layer: AttentionLayer | LatentLayer) -> Iterator[tuple[tuple[int, int], slice]]:
        start = 0
        for sequence, count in self.chunks:
            yield (layer.layer_index, sequence), slice(start, start + count)
            start += count

    def _store(self, key: tuple[int, int], k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys[key] = torch.cat([self.keys[key], k]) if key in self.keys else k
        self.values[key] = torch.cat([self.values[key], v]) if key in self.values else v
        return self.keys[key], self.values[key]


def _attention(layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    spec = layer.spec
    assert q.shape[1:] == (spec.num_heads, spec.head_dim)
    assert k.shape[1:] == v.shape[1:] == (spec.num_kv_heads, spec.head_dim)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    repeats = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    return _softmax(q, k, v, spec.scale, spec.sliding_window).flatten(1)


def _softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None = None
) -> torch.Tensor:
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    at = torch.arange(k.shape[0])
    query_at = at[-q.shape[0] :, None]
    hidden = at > query_at
    if window is not None:
        hidden |= at <= query_at - window
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v.float()).to(q.dtype)


@torch.inference_mode()
def run(model: CausalLM, ctx: DenseContext, chunks: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """One step over (sequence, token ids) chunks. Returns the logits of every token, float32 [T, vocab]."""
    positions = ctx.begin([(sequence, len(ids)) for sequence, ids in chunks])
    return model.compute_logits(model(torch.cat([ids for _, ids in chunks]), positions, ctx)).float()
