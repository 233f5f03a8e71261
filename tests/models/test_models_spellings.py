"""A model's directory means to us what it means to transformers, however its config.json and its weights are written.

Random small models of every architecture, each with its settings and its tensors written another way. What transformers
does not read at all, though it can only mean one thing (1 for 1.0, null for a default), must give the model it was
written from.
"""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models_support import (
    CLASSES,
    LENGTH,
    VOCAB,
    DenseContext,
    load,
    random_settings,
    reference_model,
    run,
)
from safetensors.torch import load_file, save_file

from miniserve.models.config import load_model_config

torch.set_num_threads(1)
VARIANTS = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# What is written in place of these where it is what an architecture does without them.
NULLS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "hidden_act", "norm_topk_prob", "use_sliding_window")


@pytest.mark.parametrize("number", range(VARIANTS))
@pytest.mark.parametrize("architecture", CLASSES)
def test_logits_are_those_of_transformers(architecture: str, number: int, tmp_path: Path) -> None:
    rng = random.Random(f"{architecture} spelt {number}")
    settings = random_settings(architecture, number) | {"num_hidden_layers": rng.choice([1, 2])}
    if settings["rope_parameters"]["rope_type"] == "yarn" and rng.random() < 0.3:
        settings["rope_parameters"]["original_max_position_embeddings"] = LENGTH
    dtype = rng.choice(DTYPES)
    written = reference_model(architecture, settings, seed=number).to(dtype)
    shards = rng.choice(["20KB", "1GB"])
    written.save_pretrained(tmp_path, save_original_format=rng.random() < 0.5, max_shard_size=shards)
    respell_weights(tmp_path, settings, rng)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(respelt(config, rng)))

    ids = torch.randint(VOCAB, (LENGTH - 8,), generator=torch.Generator().manual_seed(number))
    assert load_model_config(tmp_path).dtype == str(dtype).removeprefix("torch.")
    ours = run(load(tmp_path), DenseContext(), [(0, ids)])
    with torch.no_grad():
        expected = as_transformers_reads(tmp_path, config)(ids[None]).logits[0]
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def as_transformers_reads(path: Path, config: dict[str, Any]) -> Any:
    """In float32. config: what config.json held before it was written another way, for what transformers refuses."""
    how: dict[str, Any] = {"attn_implementation": "eager", "dtype": torch.float32}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
    except Exception:
        (path / "config.json").write_text(json.dumps(config))
        model = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")
    return model.eval()


def respell_weights(path: Path, settings: dict[str, Any], rng: random.Random) -> None:
    """Of tied embeddings: the head as well, another head, or the head alone."""
    file = path / "model.safetensors"
    if not settings["tie_word_embeddings"] or not file.is_file():
        return
    tensors = load_file(file)
    way = rng.choice(["tied", "equal", "other", "head alone"])
    if way != "tied":
        tensors[HEAD] = tensors[EMBEDDING].flip(0) if way == "other" else tensors[EMBEDDING].clone()
    if way == "head alone":
        del tensors[EMBEDDING]
    save_file(tensors, file)


def respelt(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    found = respelt_rope(copy.deepcopy(config), rng)
    dtype = found.pop("dtype")
    found |= rng.choice([{"dtype": dtype}, {"dtype": f"torch.{dtype}"}, {"torch_dtype": dtype}, {}])
    if "num_local_experts" in found and rng.random() < 0.5:
        found["num_experts"] = found.pop("num_local_experts")
    for key, value in found.items():
        if key in NULLS and value in (False, "silu") and rng.random() < 0.5:
            found[key] = None
    if "sliding_window" in found and found["sliding_window"] is None and rng.random() < 0.5:
        found["sliding_window"] = False
    numbers = rng.choice([lambda value: value, as_float, as_int])
    return {key: numbers(value) for key, value in found.items()}


def as_float(value: Any) -> Any:
    return float(value) if type(value) is int else value


def as_int(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def respelt_rope(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    rope = config["rope_parameters"]
    if rng.random() < 0.2:
        return config | {"rope_theta": 123.0}  # that within counts
    del config["rope_parameters"]
    theta = rope.pop("rope_theta")
    config |= rng.choice([{"rope_theta": theta}, {"rope_theta": None}] if theta == 10000.0 else [{"rope_theta": theta}])
    if rope["rope_type"] == "default" and rng.random() < 0.7:
        return config | rng.choice([{"rope_scaling": None}, {}])
    rope |= rng.choice([{}, {"type": rope["rope_type"]}, {"type": "default"}])
    if "type" in rope and rng.random() < 0.7:
        rope["type"] = rope.pop("rope_type")
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type", rope.get("type")) == "yarn":
        if original * rope["factor"] == LENGTH and rng.random() < 0.3:
            rope["factor"] = None
        rope |= rng.choice([{}, {key: rope.get(key) for key in ("beta_fast", "attention_factor")}])
    if original == LENGTH and rng.random() < 0.5:
        del rope["original_max_position_embeddings"]
    elif original and rng.random() < 0.5:
        config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    return config | {rng.choice(["rope_scaling", "rope_parameters"]): rope}
