"""A checkpoint's KV scales through the whole engine: what writes by them reads by them, over every path and layout."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from engine_support import stand_in
from safetensors.torch import load_file, save_file

import miniserve
from miniserve.core import SamplingParams
from miniserve.llm import LLM

PROMPT = "Question: Ann has 4 apples and buys 3 more. How many apples does she have?\nAnswer:"
BUILT_IN = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"


def answer(model: Path, **options: str) -> tuple[str, list[str]]:
    engine = LLM(str(model), progress=False, max_model_len=256, max_num_seqs=4, device="cpu", **options)
    text = engine.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0.0, stop=["\n\n"]))[0].outputs[0].text
    return text, engine.info.attention


@pytest.fixture(scope="module")
def expected() -> str:
    return answer(BUILT_IN)[0]


@pytest.fixture(scope="module", params=[0.05, 1e-4])
def scaled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """The built-in model with scales; whether they are so small that all keys and values are cut off."""
    path = tmp_path_factory.mktemp("scaled") / "model"
    shutil.copytree(BUILT_IN, path)
    tensors = load_file(path / "model.safetensors")
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    one = tensors["model.norm.weight"].new_ones(1)
    for layer in layers:
        tensors[f"model.layers.{layer}.self_attn.k_scale"] = request.param * one
        tensors[f"model.layers.{layer}.self_attn.v_scale"] = 2 * request.param * one
    save_file(tensors, path / "model.safetensors")
    return path, request.param < 1e-2


@pytest.mark.parametrize(
    ("device", "backend", "layout"),
    [
        ("cpu", "TORCH_ATTN", "linear"),
        ("cpu", "TORCH_ATTN", "shuffled"),
        ("gfx942", "ROCM_AITER_FA", "linear"),
        ("gfx942", "ROCM_AITER_FA", "shuffled"),
        ("gfx950", "ROCM_AITER_GLUON", "shuffled"),
    ],
)
def test_one_scale_writes_and_reads(
    scaled: tuple[Path, bool], device: str, backend: str, layout: str, expected: str
) -> None:
    """Good scales change nothing that is said; scales that cut everything off change it, so they were used."""
    path, cut_off = scaled
    with stand_in(device, 4) if device != "cpu" else nullcontext():
        text, told = answer(path, kv_cache_dtype="fp8", attention_backend=backend, kv_layout=layout)
    assert (text == expected) != cut_off
    assert [line.partition(", ")[0] for line in told if "KV scales" in line] == ["KV scales: the checkpoint's"]
    assert any("twice what it states, for float8_e4m3fnuz" in line for line in told) == (device == "gfx942")


def test_another_cache_says_once_that_it_has_no_use_for_them(scaled: tuple[Path, bool], expected: str) -> None:
    text, told = answer(scaled[0])
    assert text == expected
    assert len([line for line in told if line.startswith("KV scales: those of the checkpoint are not used")]) == 1
