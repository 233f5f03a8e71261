"""DeepSeek's and Qwen's sparse models: their config.json, the memory they take, their checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from known_models import DEEPSEEK_V2_LITE, DEEPSEEK_V3, YARN
from models_support import VOCAB, DenseContext, load, random_settings, read, reference_model, refusal, run
from safetensors.torch import load_file, save_file

from miniserve.attention.spec import LatentDims
from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.description import MoEConfig
from miniserve.models.loader import dummy_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, described_model, weight_bytes

torch.set_num_threads(1)
QWEN3_30B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "torch_dtype": "bfloat16",
}
V2_LITE: dict[str, Any] = DEEPSEEK_V2_LITE | {
    "rope_theta": 10000,
    "topk_method": "greedy",
    "scoring_func": "softmax",
}
V3: dict[str, Any] = {key: value for key, value in DEEPSEEK_V3.items() if key != "quantization_config"} | {
    "rope_theta": 10000,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 1,
}


def test_deepseek_v3_is_read(tmp_path: Path) -> None:
    config = read(tmp_path, V3)
    assert config.latent == LatentDims(kv_lora_rank=512, rope_dim=64, nope_dim=128, v_head_dim=128)
    assert config.q_lora_rank == 1536 and config.rope_interleaved
    assert config.moe == MoEConfig(
        num_experts=256,
        top_k=8,
        intermediate_size=2048,
        sparse_layers=(False,) * 3 + (True,) * 58,
        scoring="sigmoid",
        normalize=True,
        scaling=2.5,
        num_groups=8,
        top_groups=4,
        correction_bias=True,
        shared_size=2048,
    )
    assert (config.head_dim, config.rotary_dim, config.num_draft_layers) == (192, 64, 1)
    assert config.max_position_embeddings == 163840


def test_v2_routes_without_groups_unless_told(tmp_path: Path) -> None:
    lite = read(tmp_path, V2_LITE | {"n_group": 8, "topk_group": 3})
    assert lite.latent is not None
    assert lite.q_lora_rank is None
    assert lite.moe is not None
    assert (lite.moe.num_groups, lite.moe.scoring, lite.moe.shared_size) == (1, "softmax", 2816)
    grouped = read(tmp_path, V2_LITE | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3})
    assert grouped.moe is not None
    assert (grouped.moe.num_groups, grouped.moe.top_groups, grouped.moe.correction_bias) == (8, 3, False)


def test_yarn_raises_the_scale_of_latent_attention_alone(tmp_path: Path) -> None:
    # The figures that DeepSeek's own code gives: 192 ** -0.5 * (0.1 * mscale_all_dim * ln 40 + 1) ** 2.
    assert read(tmp_path, V2_LITE).attention_scale == pytest.approx(0.114721, rel=1e-5)
    assert read(tmp_path, V3).attention_scale == pytest.approx(0.135234, rel=1e-5)
    assert read(tmp_path, V3 | {"rope_scaling": YARN | {"mscale": 1.0}}).attention_scale == 192**-0.5
    assert read(tmp_path, V3 | {"rope_scaling": None}).attention_scale == 192**-0.5
    plain = QWEN3_30B | {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}
    assert read(tmp_path, plain).attention_scale == 128**-0.5


def test_which_layers_are_sparse(tmp_path: Path) -> None:
    def sparse(content: dict[str, Any]) -> str:
        moe = read(tmp_path, content | {"num_hidden_layers": 6}).moe
        return "" if moe is None else "".join("x" if layer else "." for layer in moe.sparse_layers)

    assert sparse(QWEN3_30B) == "xxxxxx"
    assert sparse(QWEN3_30B | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}) == ".x...x"
    assert sparse(QWEN3_30B | {"num_experts": 0}) == ""
    assert sparse(V3) == "...xxx"
    assert sparse(V3 | {"moe_layer_freq": 2, "first_k_dense_replace": 1}) == "..x.x."
    assert sparse(V2_LITE | {"first_k_dense_replace": 6}) == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (V3 | {"quantization_config": {"quant_method": "awq"}}, "quantised weights (awq)"),
        (V3 | {"topk_method": "greedy"}, "topk_method 'greedy' is not supported in a deepseek_v3 config"),
        (V3 | {"scoring_func": "softmax"}, "scoring_func 'softmax' is not supported in a deepseek_v3 config"),
        (V2_LITE | {"scoring_func": "sigmoid"}, "scoring_func 'sigmoid' is not supported in a deepseek_v2 config"),
        (V2_LITE | {"topk_method": "noaux_tc"}, "topk_method 'noaux_tc' is not supported in a DeepSeek-V2 config"),
        (V2_LITE | {"norm_topk_prob": True}, "norm_topk_prob in a DeepSeek-V2 config is not supported"),
        (V3 | {"num_key_value_heads": 8}, "num_key_value_heads 8 is not supported with latent attention"),
        (V3 | {"n_group": 7}, "256 experts cannot be divided into 7 groups"),
        (V3 | {"topk_group": 9}, "topk_group must be from 1 to 8"),
        (V3 | {"topk_group": 1, "num_experts_per_tok": 33}, "num_experts_per_tok must be from 1 to 32"),
        (V3 | {"n_group": 256, "topk_group": 16}, "n_group with one expert each"),
        (QWEN3_30B | {"num_experts_per_tok": 129}, "num_experts_per_tok must be from 1 to 128"),
        (QWEN3_30B | {"decoder_sparse_step": 0}, "decoder_sparse_step 0 is not supported"),
    ],
)
def test_what_is_not_supported_is_named(content: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "billions"),
    [(QWEN3_30B, 30.53), (V2_LITE, 15.71), (V3, 671.03)],
    ids=["Qwen3-30B-A3B", "DeepSeek-V2-Lite", "DeepSeek-V3"],
)
def test_known_models_are_described_without_memory(content: dict[str, Any], billions: float, tmp_path: Path) -> None:
    config = read(tmp_path, content)
    model = build_model(
        config,
        BuildOptions(dtype=torch.bfloat16, kv_dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=64),
    )
    assert len(model.attention_specs) == config.num_layers
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    routers = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    expected = 2 * (sum(p.numel() for p in model.parameters()) + routers)
    assert weight_bytes(described_model(config, torch.bfloat16), "cuda") == expected
    spec = model.attention_specs[0]
    assert (spec.num_kv_heads, spec.head_dim) == ((4, 128) if config.latent is None else (1, 576))


def test_a_checkpoints_layers_for_guessing_tokens_are_left_out(tmp_path: Path) -> None:
    settings = random_settings("DeepseekV3ForCausalLM", 3)
    layers = settings["num_hidden_layers"]
    reference = reference_model("DeepseekV3ForCausalLM", settings)
    reference.save_pretrained(tmp_path)
    name = f"model.layers.{layers}.eh_proj.weight"
    save_file(load_file(tmp_path / "model.safetensors") | {name: torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"not part of this architecture: model.layers.\d.eh_proj.weight"):
        load(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"num_nextn_predict_layers": 1}))
    ids = torch.arange(9)
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(run(load(tmp_path), DenseContext(), [(0, ids)]), expected, rtol=1e-4, atol=1e-4)


def test_a_missing_and_a_misshaped_expert_are_named(tmp_path: Path) -> None:
    reference_model("Qwen3MoeForCausalLM", random_settings("Qwen3MoeForCausalLM", 2)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    names = sorted(name for name in tensors if name.endswith("experts.1.up_proj.weight"))
    gone, bent = names[0], names[0].replace("up_proj", "down_proj")
    tensors[bent] = torch.ones(2, 3)
    del tensors[gone]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load(tmp_path)
    assert f"missing: {gone};" in str(caught.value)
    assert f"{bent} has shape [2, 3]" in str(caught.value)


@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"])
def test_experts_stacked_as_transformers_keeps_them_are_loaded(architecture: str, tmp_path: Path) -> None:
    reference = reference_model(architecture, random_settings(architecture, 3))
    reference.save_pretrained(tmp_path, save_original_format=False)
    tensors, ids = load_file(tmp_path / "model.safetensors"), torch.arange(20)
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(run(load(tmp_path), DenseContext(), [(0, ids)]), expected, rtol=1e-4, atol=1e-4)

    stacked = next(name for name in tensors if name.endswith("experts.down_proj"))
    apart = {f"{stacked[:-9]}{i}.down_proj.weight": each.clone() for i, each in enumerate(tensors[stacked])}
    save_file(tensors | apart, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"not part of this architecture: {stacked[:-9]}0.down_proj.weight"):
        load(tmp_path)
    del tensors[stacked]
    save_file(tensors | apart, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"missing: {stacked}; not part of this architecture: {stacked[:-9]}0.down"):
        load(tmp_path)


def test_dummy_weights_of_a_sparse_model_run(tmp_path: Path) -> None:
    for architecture in ("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"):
        reference_model(architecture, random_settings(architecture, 1)).save_pretrained(tmp_path)
        config = load_model_config(tmp_path)
        logits = []
        for _ in range(2):
            model = build_model(
                config, BuildOptions(dtype=torch.float32, kv_dtype=torch.float32, device=torch.device("cpu"))
            )
            dummy_weights(model, seed=7)
            logits.append(run(model, DenseContext(), [(0, torch.arange(VOCAB) % 40)]))
        assert logits[0].isfinite().all()
        assert torch.equal(*logits)
