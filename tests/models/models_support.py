"""Shared by this room's tests: transformers checkpoints of random small models, and the plainest StepContext."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers

from miniserve.attention.spec import AttentionLayer
from miniserve.models.config import load_model_config
from miniserve.models.dense import CausalLM
from miniserve.models.loader import load_weights
from miniserve.models.registry import build_model

VOCAB = 101
CLASSES = {
    "LlamaForCausalLM": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "MistralForCausalLM": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "Qwen2ForCausalLM": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "Qwen3ForCausalLM": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
}
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
    if architecture == "Qwen3ForCausalLM":  # which has a head_dim of its own always
        settings["attention_bias"] = rng.random() < 0.5
    elif number >= len(HEAD_DIMS) * len(ROPE_TYPES):
        settings["hidden_size"] = num_heads * 20
        del settings["head_dim"]
    return settings


def reference_model(architecture: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model in float32 whose every parameter, biases and norms too, is random and matters."""
    config_class, model_class = CLASSES[architecture]
    model = model_class(config_class(**settings)).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0, 0.2, generator=generator)
        else:
            scale = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.data.normal_(0.0, scale, generator=generator)
    return model


def load(path: Path, dtype: torch.dtype = torch.float32) -> CausalLM:
    """Our model of a checkpoint, through the whole way: config.json, meta device, safetensors."""
    model = build_model(load_model_config(path), dtype=dtype, kv_dtype=dtype, device="cpu")
    load_weights(model, path)
    return model


class DenseContext:
    """The plainest StepContext: every sequence keeps its keys and values in a list, attention is a full matrix.

    `begin` says which sequence each of a step's consecutive chunks belongs to and returns the step's positions.
    """

    def __init__(self) -> None:
        self.keys: dict[tuple[int, int], torch.Tensor] = {}
        self.values: dict[tuple[int, int], torch.Tensor] = {}
        self.lengths: dict[int, int] = {}
        self.chunks: list[tuple[int, int]] = []

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
        outputs, start = [], 0
        for sequence, count in self.chunks:
            rows = slice(start, start + count)
            key = (layer.layer_index, sequence)
            self.keys[key] = torch.cat([self.keys[key], k[rows]]) if key in self.keys else k[rows]
            self.values[key] = torch.cat([self.values[key], v[rows]]) if key in self.values else v[rows]
            outputs.append(_attention(layer, q[rows], self.keys[key], self.values[key]))
            start += count
        return torch.cat(outputs)


def _attention(layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    spec = layer.spec
    assert q.shape[1:] == (spec.num_heads, spec.head_dim)
    assert k.shape[1:] == v.shape[1:] == (spec.num_kv_heads, spec.head_dim)
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    repeats = spec.num_heads // spec.num_kv_heads
    k, v = k.repeat_interleave(repeats, 1).float(), v.repeat_interleave(repeats, 1).float()
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * spec.scale
    at = torch.arange(k.shape[0])
    query_at = at[-q.shape[0] :, None]
    hidden = at > query_at
    if spec.sliding_window is not None:
        hidden |= at <= query_at - spec.sliding_window
    probabilities = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v).flatten(1).to(q.dtype)


@torch.inference_mode()
def run(model: CausalLM, ctx: DenseContext, chunks: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """One step over (sequence, token ids) chunks. Returns the logits of every token, float32 [T, vocab]."""
    positions = ctx.begin([(sequence, len(ids)) for sequence, ids in chunks])
    return model.compute_logits(model(torch.cat([ids for _, ids in chunks]), positions, ctx))
