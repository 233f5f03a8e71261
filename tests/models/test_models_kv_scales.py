"""Scales for an fp8 KV cache out of a checkpoint: by every name, for every layer, or refused; told in a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import random_settings, reference_model
from safetensors.torch import load_file, save_file

from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.kv_scales import set_kv_scales
from miniserve.models.loader import load_weights, read_kv_scales
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
NAMES = [
    ("k_scale", "v_scale"),
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("qkqkv_proj.k_scale", "qkv_proj.v_scale"),
    ("k_cache.scale", "v_cache.scale"),
    ("kv_scale", "kv_scale"),
]


def checkpoint(path: Path, scales: dict[str, Any], architecture: str = "LlamaForCausalLM") -> Path:
    """Of two layers, with these tensors in each layer's self_attn, or in one by its whole name."""
    settings = random_settings(architecture, 1) | {"num_hidden_layers": 2}
    reference_model(architecture, settings).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name, value in scales.items():
        whole = [name] if "." in name and name.startswith("model.") else [_of(layer, name) for layer in range(2)]
        tensors |= {each: torch.tensor(value) for each in whole}
    save_file(tensors, path / "model.safetensors")
    return path


def _of(layer: int, name: str) -> str:
    return f"model.layers.{layer}.self_attn.{name}"


def loaded(path: Path, kv_dtype: torch.dtype) -> tuple[CausalLM, list[str]]:
    model = build_model(
        load_model_config(path), BuildOptions(dtype=torch.float32, kv_dtype=kv_dtype, device=torch.device("cpu"))
    )
    load_weights(model, path)
    return model, set_kv_scales(model, read_kv_scales(model, path))


def scales_of(model: CausalLM) -> list[tuple[float, float]]:
    attns: list[Any] = [layer.self_attn.attn for layer in model.model.layers]  # type: ignore[union-attr]
    assert all(attn.k_scale.dtype == torch.float32 and attn.k_scale.shape == (1,) for attn in attns)
    return [(float(attn.k_scale), float(attn.v_scale)) for attn in attns]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize(("kv_dtype", "factor"), [(FN, 1), (FNUZ, 2)])
def test_scales_go_by_many_names(tmp_path: Path, names: tuple[str, str], kv_dtype: torch.dtype, factor: int) -> None:
    model, told = loaded(checkpoint(tmp_path, {names[0]: 0.5, names[1]: [0.25]}), kv_dtype)
    key = 0.25 if names[0] == names[1] else 0.5
    assert scales_of(model) == [(factor * key, factor * 0.25)] * 2
    twice = ", twice what it states, for float8_e4m3fnuz" if factor == 2 else ""
    assert told == [f"KV scales: the checkpoint's, {factor * 0.25:.3g} to {factor * key:.3g}{twice}"]


def test_each_layer_has_its_own(tmp_path: Path) -> None:
    own = {_of(layer, f"{side}_scale"): 1.0 + layer for layer in range(2) for side in "kv"}
    assert scales_of(loaded(checkpoint(tmp_path, own), FN)[0]) == [(1.0, 1.0), (2.0, 2.0)]


def test_scales_of_queries_and_probabilities_are_known_and_not_used(tmp_path: Path) -> None:
    """Quark's and others'."""
    more = dict.fromkeys(("q_scale", "q.scale", "q_proj.output_scale", "prob_output_scale"), 3.0)
    path = checkpoint(tmp_path / "a", {"k_scale": 0.5, "v_scale": 0.25} | more)
    assert scales_of(loaded(path, FN)[0]) == [(0.5, 0.25)] * 2
    assert loaded(checkpoint(tmp_path / "b", more), FN)[1] == ["KV scales: 1, as the checkpoint states none"]


def test_a_latent_has_one(tmp_path: Path) -> None:
    model, _ = loaded(checkpoint(tmp_path, {"k_scale": 0.5, "v_scale": 0.1}, "DeepseekV2ForCausalLM"), FNUZ)
    assert [float(layer.self_attn.attn.kv_scale) for layer in model.model.layers] == [1.0, 1.0]  # type: ignore[union-attr]


def test_without_scales_or_without_use_for_them(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "with", {"k_scale": float("nan"), "v_scale": 0.5})
    model, told = loaded(path, torch.float32)
    assert scales_of(model) == [(1.0, 1.0)] * 2
    assert told == ["KV scales: those of the checkpoint are not used, as the KV cache is float32"]
    model, told = loaded(checkpoint(tmp_path / "without", {}), FN)
    assert (scales_of(model), told) == ([(1.0, 1.0)] * 2, ["KV scales: 1, as the checkpoint states none"])
    assert loaded(tmp_path / "without", torch.float32)[1] == []


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ({"k_scale": 0.0, "v_scale": 1.0}, "layers.0.self_attn.k_scale is 0; a KV scale must be one positive number"),
        ({"k_scale": 1.0, "v_scale": -1.0}, "layers.0.self_attn.v_scale is -1; "),
        ({"k_scale": float("inf"), "v_scale": 1.0}, "k_scale is inf; "),
        ({"k_scale": [1.0, 1.0], "v_scale": 1.0}, r"k_scale is of shape \[2\]; "),
        ({"k_scale": 1.0}, "are not whole: it has no model.layers.0.self_attn.v_scale, though others"),
        ({_of(0, "kv_scale"): 1.0}, "are not whole: it has no model.layers.1.self_attn.k_scale, though others"),
        ({"k_scale": 1.0, "kv_scale": 1.0}, "two of them, model.layers.0.self_attn.k_scale and model.layers.0"),
        ({_of(7, "k_scale"): 1.0}, "not part of this architecture: model.layers.7.self_attn.k_scale"),
    ],
)
def test_scales_that_cannot_be_meant_are_refused(tmp_path: Path, scales: dict[str, Any], said: str) -> None:
    path = checkpoint(tmp_path, scales)
    with pytest.raises(UserError, match=said):
        loaded(path, FN)


def test_a_checkpoint_quantised_for_its_cache_alone_is_served(tmp_path: Path) -> None:
    checkpoint(tmp_path, {"k_scale": 0.5, "v_scale": 0.25})
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme}
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    assert scales_of(loaded(tmp_path, FN)[0]) == [(0.5, 0.25)] * 2
