"""`miniserve explain`, held to its answers for well-known models, each line of which was compared with the facts.

`python tests/cli/test_cli_explain.py` writes the snapshots anew; read the difference before it is kept.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import cli_terminal as cli
import pytest
import torch
from known_models import MODELS

import miniserve
from miniserve.checks.explanation import explain as checks_explain
from miniserve.cli.explain import explain, kind_text, ranges
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.engine.build import build_engine
from miniserve.models.config import describe_model, load_model_config
from miniserve.models.config_families import ARCHITECTURES
from miniserve.models.description import ModelConfig
from miniserve.models.hub import locate
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, described_model, weight_bytes
from miniserve.parallel.shard import Shard
from miniserve.runner.tuning import save_table, table_path

RUN = ARCHITECTURES.values()
SNAPSHOTS = Path(__file__).parent / "snapshots"
# The flags that each model is asked with, beside each device.
QUESTIONS: dict[str, list[dict[str, Any]]] = {
    "Qwen3-235B-A22B": [{}, {"tensor_parallel_size": 1}, {"tensor_parallel_size": 4}, {"tensor_parallel_size": 8}],
    "Qwen3-235B-A22B-FP8": [
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 4, "kv_cache_dtype": "fp8"},
        {"tensor_parallel_size": 1, "kv_cache_dtype": "fp8"},
    ],
    "Llama-3.1-8B": [{}, {"kv_cache_dtype": "fp8"}, {"kv_cache_dtype": "fp8", "attention_backend": "ROCM_AITER_FA"}],
    "Llama-3.1-70B": [
        {"tensor_parallel_size": 1, "kv_cache_dtype": "fp8"},
        {"tensor_parallel_size": 8, "kv_cache_dtype": "fp8"},
    ],
    "Llama-3.1-405B-FP8-KV": [{"tensor_parallel_size": 8}, {"tensor_parallel_size": 8, "kv_cache_dtype": "fp8"}],
    "Qwen3.5-397B-A17B": [
        {"tensor_parallel_size": 1},
        {"tensor_parallel_size": 8},
        {"tensor_parallel_size": 8, "kv_layout": "shuffled"},
    ],
    "DeepSeek-V3": [
        {"tensor_parallel_size": 1},
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 8},
        {"tensor_parallel_size": 8, "kv_cache_dtype": "fp8"},
    ],
    "DeepSeek-V2-Lite": [{}, {"kv_cache_dtype": "fp8"}],
    "gpt-oss-120b": [
        {"tensor_parallel_size": 1},
        {"tensor_parallel_size": 8},
        {"tensor_parallel_size": 1, "kv_layout": "shuffled"},
    ],
}


@pytest.fixture(autouse=True)
def _no_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_model(directory: Path, name: str) -> str:
    (directory / name).mkdir(exist_ok=True)
    (directory / name / "config.json").write_text(json.dumps(MODELS[name]))
    return str(directory / name)


def described(directory: Path, content: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(content))
    return describe_model(directory, "m")


def answer(path: str, **flags: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        explain(model=path, **flags)
    return out.getvalue()


def snapshot(directory: Path, name: str) -> str:
    path, parts = write_model(directory, name), []
    for flags in QUESTIONS[name]:
        for device in ("mi300x", "mi355x"):
            asked = {"device": device} | flags
            command = " ".join(f"--{key.replace('_', '-')} {value}" for key, value in asked.items())
            parts.append(f"$ miniserve explain {name} {command}\n{answer(path, **asked)}")
    return "\n".join(parts)


@pytest.mark.parametrize("name", MODELS)
def test_the_answers_are_those_reviewed(name: str, tmp_path: Path) -> None:
    assert snapshot(tmp_path, name) == (SNAPSHOTS / f"explain-{name}.txt").read_text()


def test_json_says_the_same(tmp_path: Path) -> None:
    found = json.loads(answer(write_model(tmp_path, "gpt-oss-120b"), device="mi300x", as_json=True))
    assert found["chosen"]["backend"] == "ROCM_AITER_UNIFIED_ATTN"
    assert found["layers"][0]["layers"] == list(range(0, 36, 2))
    assert {path["backend"] for path in found["impossible"]} >= {"ROCM_ATTN", "ROCM_AITER_FA"}
    assert found["memory_bytes"]["kv_per_token"] == 36 * 2 * 8 * 64 * 2


def test_a_pool_is_bounded_to_what_its_kernel_reaches(tmp_path: Path) -> None:
    """4 GiB of latents, 1,152 bytes a token in bfloat16 and half of that in fp8; not where bfloat16 is right."""
    path = write_model(tmp_path, "DeepSeek-V2-Lite")
    for device, dtype, tokens in (("mi300x", "auto", 3728256), ("mi300x", "fp8", 7456528), ("mi355x", "fp8", 7456528)):
        found = json.loads(answer(path, device=device, kv_cache_dtype=dtype, as_json=True))
        assert found["kv_tokens"] == tokens
        assert "as mla_decode_fwd reaches 4 GiB" in found["kv_tokens_bounded"]
    found = json.loads(answer(path, device="mi355x", as_json=True))
    assert found["kv_tokens"] > 7e6 and found["kv_tokens_bounded"] is None


@pytest.mark.parametrize("layout", ["linear", "shuffled"])
def test_head_dim_256_is_never_told_to_reach_the_asm_kernel(layout: str, tmp_path: Path) -> None:
    text = answer(write_model(tmp_path, "Qwen3.5-397B-A17B"), device="mi300x", kv_layout=layout)
    assert "ASM" not in text


def test_a_tuning_table_decides_and_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path, "Llama-3.1-8B")
    from miniserve.attention.platform import NAMED_PLATFORMS
    from miniserve.config import tuning_dir

    spec = described(tmp_path, MODELS["Llama-3.1-8B"]).attention_spec(0, torch.bfloat16, torch.bfloat16)
    table = table_path(tuning_dir(), NAMED_PLATFORMS["mi300x"], [spec], 16)
    save_table(table, ["ROCM_AITER_FA:linear"], [])
    assert "ROCM_AITER_FA over the linear KV layout: measured fastest by `miniserve tune`" in answer(
        path, device="mi300x"
    )
    assert "measured" not in answer(path, device="mi355x")
    table.write_text("{")
    assert "measured" not in answer(path, device="mi300x")


@pytest.mark.parametrize(("device", "rounding"), [("h200", "the vendor's library in 8 bits"), ("mi300x", "aiter gemm")])
def test_who_rounds_activations_is_said_and_can_be_told_not_to(device: str, rounding: str, tmp_path: Path) -> None:
    path = write_model(tmp_path, "Qwen3-235B-A22B-FP8")
    for wished in (True, False):
        text = answer(path, device=device, tensor_parallel_size=4, fp8_activations=wished)
        assert (f"qkv_proj, o_proj by {rounding}" in text) == wished
        assert ("it rounds activations to 8 bits, and --no-fp8-activations keeps their 16" in text) != wished


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            {"tensor_parallel_size": 65},
            "--tensor-parallel-size 65 is more than this model can be shared by; at most 64 can.",
        ),
        ({"enable_expert_parallel": True, "tensor_parallel_size": 1}, "--enable-expert-parallel is for several ranks"),
        ({"device": "mi9"}, "--device 'mi9' is not known; choose one of auto, mi300x"),
        ({"attention_backend": "CPU_ATTN", "device": "mi300x"}, "it runs on cpu, not on gfx942"),
        ({"kv_layout": "round"}, "--kv-layout 'round' is not known"),
        ({"attention_backend": "ROCM_ATTN", "device": "mi300x", "aiter": False}, "aiter is turned off (--no-aiter)"),
    ],
)
def test_what_cannot_be_had_is_a_sentence(flags: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as error:
        explain(model=write_model(tmp_path, "Qwen3-235B-A22B"), **flags)
    assert said in str(error.value)


def test_kv_heads_are_divided_or_kept_on_several_gpus(tmp_path: Path) -> None:
    model = described(tmp_path, MODELS["Qwen3-235B-A22B"])
    specs = [model.attention_spec(0, torch.bfloat16, torch.bfloat16, Shard(0, size)) for size in (1, 2, 3, 4, 6, 8, 16)]
    heads = [(64, 4), (32, 2), (32, 2), (16, 1), (16, 1), (8, 1), (4, 1)]
    assert [(spec.num_heads, spec.num_kv_heads) for spec in specs] == heads
    on_cpu = answer(write_model(tmp_path, "Qwen3-235B-A22B"), tensor_parallel_size=6, device="cpu")
    assert "4 KV heads on 6 ranks" in on_cpu and "memory of each rank" in on_cpu and "6 GPUs" not in on_cpu
    assert "cache is kept on 1 or 2 of them" in answer(
        write_model(tmp_path, "Qwen3-235B-A22B"), tensor_parallel_size=6, device="h200"
    )


def test_auto_is_the_fewest_gpus_that_the_model_fits_and_experts_may_be_whole(tmp_path: Path) -> None:
    path = write_model(tmp_path, "Qwen3-235B-A22B")
    found = json.loads(answer(path, device="h200", as_json=True))
    assert (found["tensor_parallel_size"], found["enable_expert_parallel"]) == (4, False)
    assert "weights need --tensor-parallel-size 4" in answer(path, device="h200", tensor_parallel_size=3)
    # 128 experts on 5 ranks: the first has 26, which is more than a fifth.
    uneven = [
        json.loads(answer(path, device="h200", tensor_parallel_size=5, enable_expert_parallel=whole, as_json=True))
        for whole in (False, True)
    ]
    by_width, by_expert = (each["memory_bytes"]["weights"] for each in uneven)
    assert by_expert > 1.01 * by_width


def test_a_step_has_a_floor_with_its_sums(tmp_path: Path) -> None:
    path = write_model(tmp_path, "Qwen3-235B-A22B")
    one, eight = (
        json.loads(answer(path, device="h200", tensor_parallel_size=size, as_json=True))["step_floor_s"]
        for size in (1, 8)
    )
    assert eight["1"]["sums"] == pytest.approx(188 * 7.3e-6) and "sums" not in one["1"]
    # 5.7 GB at 1 row, 62.7 GB at 64 (with some KV): the figures of the plan for eight GPUs.
    assert eight["1"]["weights"] * 4.8e12 == pytest.approx(5.7e9, rel=0.02)
    assert (eight["64"]["weights"] + eight["64"]["KV"]) * 4.8e12 == pytest.approx(61e9, rel=0.03)
    assert json.loads(answer(path, device="cpu", tensor_parallel_size=8, as_json=True))["step_floor_s"] == {}


def test_an_unknown_model_type_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"m is a FooForCausalLM \(model_type 'foo'\), whose config.json is not under"):
        described(tmp_path, {"architectures": ["FooForCausalLM"], "model_type": "foo"})
    for wrong in ({"hidden_size": "x"}, {"num_attention_heads": 0}, {"head_dim": -1}, {"vocab_size": 1.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            described(tmp_path, MODELS["Llama-3.1-8B"] | wrong)
    odd = described(tmp_path, MODELS["Llama-3.1-8B"] | {"quantization_config": "fp8"}).quantization
    assert odd is not None and odd.unknown == "unknown" and not odd.kv_scales


def test_what_is_missing_is_said_and_not_loaded(tmp_path: Path) -> None:
    """A text model in a larger one, with settings of its own and of the whole, as Qwen3.5 is published."""
    text = MODELS["Qwen3.5-397B-A17B"]["text_config"] | {
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        }
    }
    model = described(
        tmp_path,
        MODELS["Qwen3.5-397B-A17B"]
        | {"text_config": text, "tie_word_embeddings": False, "quantization_config": {"quant_method": "awq"}},
    )
    assert model.missing == (
        "the engine has no Qwen3_5MoeForConditionalGeneration model yet",
        "the engine does not load quantised weights (awq) yet",
    )
    assert model.rope.theta == 1e7
    spec = model.attention_spec(3, torch.bfloat16, torch.bfloat16)
    assert (spec.head_dim, spec.rotary_dim, spec.qk_norm, spec.sinks) == (256, 64, True, False)
    assert [model.has_kv_cache(layer) for layer in range(5)] == [False, False, False, True, False]
    with pytest.raises(UserError, match="layer_types without full_attention"):
        described(tmp_path, MODELS["Qwen3.5-397B-A17B"] | {"text_config": text | {"num_hidden_layers": 3}})
    with pytest.raises(UserError, match="Qwen3_5MoeForConditionalGeneration, which miniserve does not support"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("name", ["tiny-qwen3", *(name for name in MODELS if MODELS[name]["model_type"] in RUN)])
def test_weights_are_the_bytes_of_the_layers_that_the_engine_builds(name: str, tmp_path: Path) -> None:
    """Those of quantised checkpoints as if they were not."""
    path = locate(None).path
    if name in MODELS:
        path = tmp_path
        described(path, {key: value for key, value in MODELS[name].items() if key != "quantization_config"})
    found = json.loads(answer(str(path), device="h200", tensor_parallel_size=1, as_json=True))
    config = load_model_config(path)
    model = build_model(config, BuildOptions(torch.bfloat16, torch.bfloat16, torch.device("meta"), max_model_len=16))
    assert config.missing == ()
    assert found["memory_bytes"]["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert found["layers"] == [
        {"layers": list(range(config.num_layers)), "attention": kind_text(model.attention_specs[0])}
    ]


@pytest.mark.parametrize(
    ("name", "gib"),
    # The checkpoints' sizes on the hub: 60.8 GiB by its card, and parameters times bytes.
    [("gpt-oss-120b", 60.8), ("Qwen3.5-397B-A17B", 396.5e9 * 2 / 2**30), ("Qwen3-235B-A22B", 235.1e9 * 2 / 2**30)],
)
def test_weights_are_as_large_as_published(name: str, gib: float, tmp_path: Path) -> None:
    found = weight_bytes(described_model(described(tmp_path, MODELS[name]), torch.bfloat16), "cuda")
    assert found / 2**30 == pytest.approx(gib, rel=0.01)


def test_weights_quantised_in_an_unknown_way_are_not_guessed(tmp_path: Path) -> None:
    described(tmp_path, MODELS["Llama-3.1-8B"] | {"quantization_config": {"quant_method": "gptq"}})
    assert json.loads(answer(str(tmp_path), device="mi300x", as_json=True))["memory_bytes"]["weights"] is None


@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-deepseek"])
def test_who_multiplies_on_a_cpu_is_what_run_says(model: str) -> None:
    path = Path(miniserve.__file__).parent / "assets" / model
    config = EngineConfig(device="cpu", kv_cache_memory=64 << 20, max_model_len=64, self_check=False)
    _, info = build_engine(config, path, model)
    products = checks_explain(model, load_model_config(path), config, "auto").products
    assert products and set(products) <= set(info.attention)


def test_ranges_of_layers() -> None:
    assert ranges((3,)) == "layer 3"
    assert ranges(tuple(range(94))) == "layers 0-93"
    assert ranges((3, 7)) == "layers 3, 7"
    assert ranges((3, 7, 11, 15)) == "layers 3, 7, 11, … 15 (4)"


def test_the_command_reads_config_json_alone_and_needs_no_gpu(tmp_path: Path) -> None:
    done = cli.run("explain", write_model(tmp_path, "Llama-3.1-8B"), "--device", "h100", "--tp", "2")
    assert done.returncode == 0, done.stderr
    assert "chosen: TRITON_ATTN over the linear KV layout" in done.stdout
    assert "on h100: sm_90, 132 compute units, 79.6 GiB" in done.stdout


if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        for model in MODELS:
            (SNAPSHOTS / f"explain-{model}.txt").write_text(snapshot(Path(place), model))
