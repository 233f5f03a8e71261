"""`quantization_config` in the dialects of the field: formats by name, exceptions, and what is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from miniserve.models.quantization import Quantization, WeightFormat, read_quantization
from tools.quantise import KINDS

BLOCKS = WeightFormat("blocks", "weight_scale_inv", (128, 128))
TENSOR, ROWS = WeightFormat("tensor"), WeightFormat("rows")
Q_PROJ, EXPERT = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.11.gate_proj"
GATE = "model.layers.1.mlp.gate"


def read(**config: Any) -> Quantization:
    found = read_quantization({"quantization_config": config})
    assert found is not None
    return found


def compressed(**changes: Any) -> dict[str, Any]:
    """RedHatAI's …-FP8-dynamic."""
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
        "output_activations": None,
    }
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
    return config | {"config_groups": {"group_0": group | changes}}


def quark(**changes: Any) -> dict[str, Any]:
    """amd/Llama-3.x-…-FP8-KV."""
    static = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor", "ch_axis": None, "group_size": None}
    layer = {"weight": static, "input_tensors": static, "output_tensors": None, "bias": None}
    return {
        "quant_method": "quark",
        "global_quant_config": layer,
        "layer_quant_config": {name: layer | {"output_tensors": static} for name in ("*k_proj", "*v_proj")},
        "layer_type_quant_config": {},
        "exclude": ["lm_head"],
        "export": {"kv_cache_group": ["*k_proj", "*v_proj"], "pack_method": "reorder"},
    } | changes


def test_fp8_by_blocks_with_each_name_of_its_exceptions() -> None:
    """Qwen names each layer's, DeepSeek none, MiniMax calls them otherwise."""
    for key in ("modules_to_not_convert", "ignored_layers"):
        found = read(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128], **{key: [GATE, "lm_head"]})
        assert [found.format_of(name) for name in (Q_PROJ, EXPERT, GATE, "lm_head")] == [BLOCKS, BLOCKS, None, None]
        assert found.format_of(GATE.replace(".1.", ".11.")) == BLOCKS, "no prefix of another layer's number"
        assert found.format_of(f"{GATE}_proj") == BLOCKS
    deepseek = read(quant_method="fp8", activation_scheme="dynamic", scale_fmt="ue8m0", weight_block_size=[128, 128])
    assert (deepseek.format_of(Q_PROJ), deepseek.format_of("lm_head")) == (BLOCKS, None)
    assert not deepseek.static_inputs


@pytest.mark.parametrize(
    "pattern", ["model.layers.1", "model.layers.1.*", "self_attn.q_proj", "q_proj", "*q_proj", "re:.*q_proj$", Q_PROJ]
)
def test_an_exception_is_a_name_a_part_of_one_a_glob_or_an_expression(pattern: str) -> None:
    found = read(quant_method="fp8", modules_to_not_convert=[pattern], activation_scheme="static")
    assert found.format_of(Q_PROJ) is None
    assert found.format_of("model.layers.10.self_attn.k_proj") == TENSOR
    assert found.static_inputs


def test_compressed_tensors() -> None:
    found = read(**compressed())
    assert (found.format_of(Q_PROJ), found.format_of("lm_head"), found.static_inputs) == (ROWS, None, False)
    weights = compressed()["config_groups"]["group_0"]["weights"]
    static = read(**compressed(weights=weights | {"strategy": "tensor"}, input_activations=weights))
    assert (static.format_of(EXPERT), static.static_inputs) == (TENSOR, True)
    block = read(**compressed(weights=weights | {"strategy": "block", "block_structure": [64, 128]}))
    assert block.format_of(EXPERT) == WeightFormat("blocks", "weight_scale", (64, 128))
    assert read(**compressed(input_activations=None)).format_of(EXPERT) == replace(ROWS, inputs=False)
    named = compressed(targets=["re:.*experts.*", Q_PROJ])
    named["config_groups"] = {"kv": {"targets": ["LlamaAttention"], "weights": None}} | named["config_groups"]
    assert [read(**named).format_of(name) for name in (Q_PROJ, EXPERT, GATE)] == [ROWS, ROWS, None]


def test_quark_with_scales_of_the_cache() -> None:
    found = read(**quark())
    assert [found.format_of(name) for name in (Q_PROJ, Q_PROJ.replace("q_", "k_"), "lm_head")] == [TENSOR, TENSOR, None]
    assert found.kv_scales and found.static_inputs
    rows = {"weight": {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_channel", "ch_axis": 0}}
    ptpc = read(**quark(global_quant_config=rows, layer_quant_config={"*q_proj": {"weight": None}}, export={}))
    weights_alone = replace(ROWS, inputs=False)
    assert (ptpc.format_of(EXPERT), ptpc.format_of(Q_PROJ), ptpc.kv_scales) == (weights_alone, None, False)


def test_every_kind_that_the_tool_makes_is_known() -> None:
    for name, kind in KINDS.items():
        found = read(**kind.config)
        grain = {"tensor": TENSOR, "rows": ROWS, "blocks": WeightFormat("blocks", kind.scale, kind.block)}[kind.grain]
        assert found.unknown is None, name
        assert [found.format_of(each) for each in (Q_PROJ, EXPERT, "lm_head")] == [grain, grain, None], name
        assert (found.static_inputs, found.kv_scales) == (kind.static, kind.kv), name


def test_a_config_without_quantised_weights() -> None:
    assert read_quantization({}) is None
    found = read(quant_method="compressed-tensors", config_groups={}, kv_cache_scheme={"num_bits": 8})
    assert (found.format_of(Q_PROJ), found.kv_scales, found.unknown) == (None, True, None)


INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FLOAT = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
MXFP4 = {"weight": {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"bits": 4}, "unknown"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fp8 with fmt 'e5m2'"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 with expert_dtype 'fp4'"),
        ({"quant_method": "fp8", "activation_scheme": "magic"}, "fp8 with activation_scheme magic"),
        ({"quant_method": "fp8", "modules_to_convert": ["embed"]}, "fp8 with modules_to_convert ['embed']"),
        ({"quant_method": "fp8", "weight_block_size": [100, 128]}, "blocks of [100, 128]"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "blocks of 128"),
        ({"quant_method": "fp8", "modules_to_not_convert": "lm_head"}, "modules_to_not_convert 'lm_head'"),
        ({"quant_method": "fp8", "ignored_layers": ["re:("]}, "ignored_layers ['re:(']"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors without config_groups"),
        (compressed(weights=INT8), "compressed-tensors with int 8 weights"),
        (compressed(weights=FLOAT | {"num_bits": 4}), "compressed-tensors with float 4 weights"),
        (compressed(weights=FLOAT | {"strategy": "group"}), "compressed-tensors with weights of strategy group, symme"),
        (compressed(weights=FLOAT | {"symmetric": False}), "compressed-tensors with weights of strategy channel, sy"),
        (compressed(input_activations=INT8), "compressed-tensors with int 8 activations"),
        (compressed(output_activations=FLOAT), "compressed-tensors with quantised outputs"),
        (compressed() | {"transform_config": {"R1": {}}}, "compressed-tensors with transform_config {'R1': {}}"),
        (compressed() | {"sparsity_config": {"format": "sparse-24"}}, "compressed-tensors with sparse weights"),
        (quark(global_quant_config=MXFP4), "quark with fp4 per_group weights"),
        (quark(global_quant_config=None), "quark with a configuration None"),
        (quark(export={}), "quark with quantised outputs or biases"),
        (quark(layer_type_quant_config={"Linear": {}}), "quark with layer_type_quant_config {'Linear': {}}"),
    ],
)
def test_what_is_not_known_is_named(config: dict[str, Any], said: str) -> None:
    found = read(**config)
    assert found.unknown is not None and found.unknown.startswith(said)
    assert found.format_of(Q_PROJ) is None
