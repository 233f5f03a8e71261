"""config.json becomes a ModelConfig, or a sentence that names what is not supported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import read, refusal
from safetensors.torch import save_file

from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.config_families import ARCHITECTURES
from miniserve.models.description import ModelConfig, RopeConfig
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, described_model, weight_bytes

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
PLAIN = LLAMA | {"rope_scaling": None, "max_position_embeddings": 4096}
QWEN3 = PLAIN | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 4, "head_dim": 128}
QWEN2 = QWEN3 | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
MISTRAL = PLAIN | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}


def test_a_real_llama_is_read_from_its_older_form(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=RopeConfig(
            rope_type="llama3",
            theta=500000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        sliding_windows=(None,) * 32,
        dtype="bfloat16",
    )


def test_both_forms_of_the_rope_settings_mean_the_same(tmp_path: Path) -> None:
    new = {key: value for key, value in LLAMA.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    oldest = LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}
    assert read(tmp_path, new) == read(tmp_path, LLAMA)
    assert read(tmp_path, oldest).rope == RopeConfig(rope_type="linear", theta=500000.0, factor=2)


def test_what_stands_beside_the_rope_settings_counts_as_it_does_in_transformers(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    inside = read(tmp_path, PLAIN | {"rope_scaling": yarn | {"original_max_position_embeddings": 1024}})
    assert read(tmp_path, PLAIN | {"rope_scaling": yarn, "original_max_position_embeddings": 1024}) == inside
    # As transformers decides it, what stands beside counts more for this length, and less for rope_theta.
    both = PLAIN | {"rope_scaling": yarn | {"original_max_position_embeddings": 7}}
    assert read(tmp_path, both | {"original_max_position_embeddings": 1024}) == inside
    theta = yarn | {"rope_theta": 500000, "original_max_position_embeddings": 1024}
    assert read(tmp_path, PLAIN | {"rope_theta": 10000.0, "rope_parameters": theta, "rope_scaling": None}) == inside
    assert read(tmp_path, PLAIN | {"rope_scaling": yarn | {"truncate": None}}).rope.truncate is False


def test_numbers_nulls_and_dtypes_are_read_as_they_are_meant(tmp_path: Path) -> None:
    plain = read(tmp_path, PLAIN | {"rms_norm_eps": 1.0})
    changes: list[dict[str, Any]] = [
        {"rms_norm_eps": 1, "initializer_range": 0},
        {"max_position_embeddings": 4096.0, "vocab_size": 128256.0, "num_key_value_heads": 8.0, "head_dim": 128.0},
        {"torch_dtype": "torch.bfloat16"},
        {"torch_dtype": None, "dtype": "torch.bfloat16"},
        {"attention_bias": None, "hidden_act": None, "tie_word_embeddings": None, "rope_theta": 500000},
        {"rope_theta": None, "rope_scaling": {"rope_type": None, "rope_theta": 500000.0}},
    ]
    for each in changes:
        assert read(tmp_path, PLAIN | {"rms_norm_eps": 1.0} | each) == plain, each
    assert read(tmp_path, MISTRAL | {"sliding_window": False, "num_hidden_layers": 1}).sliding_windows == (None,)
    assert read(tmp_path, MISTRAL | {"sliding_window": 9.0, "num_hidden_layers": 1}).sliding_windows == (9,)


@pytest.mark.parametrize(
    ("content", "windows"),
    [
        (LLAMA | {"sliding_window": 9}, [None]),
        (MISTRAL | {"sliding_window": 9.0}, [9]),
        (MISTRAL | {"sliding_window": False}, [None]),
        (QWEN2 | {"sliding_window": 9, "max_window_layers": 3}, [None]),
        (QWEN2 | {"sliding_window": 9, "max_window_layers": 3.0, "use_sliding_window": True}, [None, None, None, 9]),
        (QWEN3 | {"sliding_window": 9, "max_window_layers": None, "use_sliding_window": True}, [None]),
    ],
)
def test_windows_are_those_of_each_family(content: dict[str, Any], windows: list[int | None], tmp_path: Path) -> None:
    config = read(tmp_path, content)
    assert list(config.sliding_windows) == (windows * config.num_layers if len(windows) == 1 else windows)


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 4096),
        ({"rope_type": "linear", "factor": 4.0}, 16384),
        ({"rope_type": "dynamic", "factor": 4.0}, 4096),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}, 8192),
        ({"rope_type": "yarn", "factor": 4.0}, 16384),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 512}, 4096),
    ],
)  # fmt: skip
def test_the_longest_context_follows_the_scaling(rope: dict[str, Any] | None, longest: int, tmp_path: Path) -> None:
    assert read(tmp_path, PLAIN | {"rope_scaling": rope}).max_position_embeddings == longest


def test_biases_norms_and_windows_of_each_architecture(tmp_path: Path) -> None:
    llama = read(tmp_path, PLAIN | {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 2})
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias, llama.qk_norm) == (True, True, True, False)
    mistral = read(tmp_path, MISTRAL | {"sliding_window": 4096, "num_hidden_layers": 2})
    assert mistral.sliding_windows == (4096, 4096)
    assert read(tmp_path, MISTRAL | {"sliding_window": None, "num_hidden_layers": 1}).sliding_windows == (None,)
    qwen2 = read(tmp_path, QWEN2 | {"use_sliding_window": True, "sliding_window": 99, "max_window_layers": 3})
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias, qwen2.qk_norm) == (True, False, False, False)
    assert qwen2.sliding_windows == (None, None, None, 99)
    off = read(tmp_path, QWEN2 | {"use_sliding_window": False, "sliding_window": 99, "max_window_layers": 3})
    assert off.sliding_windows == (None,) * 4
    qwen3 = read(tmp_path, QWEN3 | {"attention_bias": True})
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.mlp_bias, qwen3.qk_norm) == (True, True, False, True)
    kinds = ["sliding_attention", "full_attention"] * 2
    mixed = read(tmp_path, QWEN3 | {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds})
    assert mixed.sliding_windows == (7, None, 7, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "does not support: choose a model of one of LlamaForCausalLM, "),
        ({"architectures": None}, "model that names no architecture"),
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM with model_type 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; supported: silu, swish."),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised weights (gptq)"),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}}, "quantised weights (fp8 with fmt 'e5m2')"),
        ({"quantization_config": ["gptq"]}, "quantised weights (unknown)"),
        ({"vocab_size": -1}, "vocab_size -1 is not supported; it must be from 1"),
        ({"max_position_embeddings": 10**12}, "max_position_embeddings 1000000000000 is not supported"),
        ({"head_dim": 10**12}, "head_dim 1000000000000 is not supported"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps nan is not supported"),
        ({"rope_theta": 0.0}, "rope_theta of rope type 'default' must be a positive number, not 0"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 64,
                           "long_factor": [1.0] * 64}},
         "rope type 'longrope' is not supported; supported: default, linear, dynamic, yarn, llama3."),
        ({"rope_scaling": {"rope_type": "linear"}}, "'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1.0}}, "factor of rope type 'linear' must be a positive"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "with 'beta_fast' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 512}}, "must be above its low_freq_factor"),
        ({"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope type 'yarn' must not be 1"),
        ({"rope_scaling": "yarn"}, "rope_scaling 'yarn' is not supported; it must be an object"),
        ({"rope_scaling": {"a": {}}, "rope_parameters": {"rope_type": "default"}}, "rope_scaling that differ between"),
        ({"per_layer_config": {"0": {"num_key_value_heads": 4}}}, "per_layer_config in config.json is not supported"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights in config.json is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor below 1 is not supported"),
        ({"num_key_value_heads": 5}, "is not a multiple of num_key_value_heads 5"),
        ({"head_dim": 3}, "head_dim 3 is odd"),
        ({"torch_dtype": "float64"}, "dtype float64 in config.json is not supported"),
        ({"hidden_size": "big"}, "cannot be used"),
        ({"num_attention_heads": 0}, "num_attention_heads 0 is not supported; it must be from 1"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, PLAIN | changes)


def test_windows_that_cannot_be_are_refused(tmp_path: Path) -> None:
    sliding = QWEN3 | {"layer_types": ["sliding_attention"] * 4, "sliding_window": 8}
    assert "sliding_window is not set" in refusal(tmp_path, sliding)
    assert "'chunked_attention' is not supported" in refusal(
        tmp_path, QWEN3 | {"layer_types": ["chunked_attention"] * 4}
    )
    assert "sliding_window 0 is not supported" in refusal(tmp_path, MISTRAL | {"sliding_window": 0})
    assert "layer_types in a Mistral config" in refusal(tmp_path, MISTRAL | {"layer_types": ["full_attention"] * 32})
    nested = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    assert "differ between layer types" in refusal(
        tmp_path, QWEN3 | {"rope_parameters": nested, "layer_types": ["full_attention"] * 4}
    )


def test_an_absent_or_broken_config_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json cannot be read"):
        load_model_config(tmp_path)
    for content in ("{", "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config.json"):
            load_model_config(tmp_path)


def test_the_stored_dtype_comes_from_the_tensors_where_the_config_is_silent(tmp_path: Path) -> None:
    silent = PLAIN | {"torch_dtype": None}
    assert read(tmp_path, silent).dtype == "bfloat16"
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "absent.safetensors"}}')
    assert read(tmp_path, silent).dtype == "bfloat16"
    save_file({"a": torch.zeros(2, dtype=torch.int64), "b": torch.zeros(2).half()}, tmp_path / "model.safetensors")
    assert read(tmp_path, silent).dtype == "float16"
    assert read(tmp_path, silent | {"dtype": "bfloat16"}).dtype == "bfloat16"


def test_a_context_that_is_too_long_is_refused_and_dynamic_scaling_says_why(tmp_path: Path) -> None:
    def build(config: ModelConfig, length: int) -> None:
        build_model(
            config,
            BuildOptions(
                dtype=torch.float32, kv_dtype=torch.float32, device=torch.device("meta"), max_model_len=length
            ),
        )

    build(read(tmp_path, PLAIN), 4096)
    with pytest.raises(UserError, match=r"--max-model-len 4097 is above .* use --max-model-len 4096 or less"):
        build(read(tmp_path, PLAIN), 4097)
    with pytest.raises(UserError, match=r"'dynamic' rope scaling changes .* --max-model-len 4096 or less"):
        build(read(tmp_path, PLAIN | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}), 4097)


@pytest.mark.parametrize(
    ("content", "billions"),
    [
        (LLAMA, 8.03),
        (QWEN3 | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
                  "vocab_size": 151936, "tie_word_embeddings": True, "torch_dtype": "bfloat16"}, 0.596),
        (QWEN3 | {"intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936}, 8.19),
    ],
    ids=["Llama-3.1-8B", "Qwen3-0.6B", "Qwen3-8B"],
)  # fmt: skip
def test_known_models_are_described_without_memory(content: dict[str, Any], billions: float, tmp_path: Path) -> None:
    config = read(tmp_path, content)
    model = build_model(
        config, BuildOptions(dtype=torch.bfloat16, kv_dtype=torch.bfloat16, device=torch.device("meta"))
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(model.attention_specs) == config.num_layers
    assert model.attention_specs[0].num_kv_heads == 8
    assert model.attention_specs[0].head_dim == 128
    assert weight_bytes(described_model(config, torch.bfloat16), "cuda") / 2e9 == pytest.approx(billions, rel=0.003)


def test_supported_architectures_are_those_that_are_tested() -> None:
    assert set(ARCHITECTURES) == {
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM",
        "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM",
    }  # fmt: skip


def test_reading_the_vocabulary_of_models_needs_no_torch() -> None:
    code = "import sys, miniserve.models.config; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
