"""The weight loader: each tensor to its place, every misfit named, no second copy of the model in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import DenseContext, load, random_settings, reference_model, run
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.layers.base import Layer
from miniserve.models.layers.linear import can_pack
from miniserve.models.loader import dummy_weights, load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, described_model, weight_bytes

torch.set_num_threads(1)
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


def checkpoint(path: Path, architecture: str = "LlamaForCausalLM", shard: str = "1GB", **changes: Any) -> Any:
    settings = random_settings(architecture, 1) | {"num_hidden_layers": 2} | changes
    reference = reference_model(architecture, settings)
    reference.save_pretrained(path, max_shard_size=shard)
    return reference


def edit(path: Path, **changes: torch.Tensor | None) -> None:
    """Rewrite the single file with tensors replaced, added, or (None) taken out."""
    tensors = load_file(path / "model.safetensors") | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, path / "model.safetensors")


def assert_logits(path: Path, ids: torch.Tensor) -> None:
    """Those that transformers loads the same directory for."""
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = reference(ids[None]).logits[0]
    torch.testing.assert_close(run(load(path), DenseContext(), [(0, ids)]), expected, rtol=1e-4, atol=1e-4)


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    return str(caught.value)


def test_missing_surplus_and_misshaped_tensors_are_all_named(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    shape = list(load_file(tmp_path / "model.safetensors")[K_PROJ].shape)
    edit(
        tmp_path, **{K_PROJ: torch.zeros(5, 7), "model.norm.weight": None, "model.layers.0.extra.weight": torch.ones(1)}
    )
    error = refusal(tmp_path)
    assert "missing: model.norm.weight;" in error
    assert "not part of this architecture: model.layers.0.extra.weight;" in error
    assert f"{K_PROJ} has shape [5, 7], config.json asks for {shape}" in error


def test_a_long_list_of_misfits_is_cut(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    edit(tmp_path, **{f"extra.{i}": torch.ones(1) for i in range(12)})
    assert "extra.0, extra.1, extra.10, extra.11, extra.2 and 7 more" in refusal(tmp_path)


def test_surplus_biases_are_refused_rather_than_dropped(tmp_path: Path) -> None:
    checkpoint(tmp_path, "MistralForCausalLM", num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    name = K_PROJ.replace("weight", "bias")
    edit(tmp_path, **{name: torch.ones(64)})
    assert f"not part of this architecture: {name}." in refusal(tmp_path)


def test_other_storage_types_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    weight = load_file(tmp_path / "model.safetensors")[K_PROJ]
    edit(tmp_path, **{K_PROJ: weight.to(torch.float8_e4m3fn)})
    assert f"{K_PROJ} is stored as F8_E4M3, supported are BF16, F16, F32" in refusal(tmp_path)


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    checkpoint(tmp_path, tie_word_embeddings=False)
    edit(tmp_path, **{"lm_head.weight": None})
    assert "missing: lm_head.weight." in refusal(tmp_path)


def test_a_tied_head_stored_all_the_same_and_old_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    checkpoint(tmp_path, tie_word_embeddings=True)
    ids = torch.arange(20)
    expected = run(load(tmp_path), DenseContext(), [(0, ids)])
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].double().float()
    edit(tmp_path, **{"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)})
    assert load_model_config(tmp_path).tie_word_embeddings
    assert torch.equal(run(load(tmp_path), DenseContext(), [(0, ids)]), expected)


def test_a_stored_head_that_differs_is_used_though_the_config_ties_it(tmp_path: Path) -> None:
    checkpoint(tmp_path, tie_word_embeddings=True)
    head = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1  # in the last of the rows that are compared
    edit(tmp_path, **{"lm_head.weight": head})
    config, ids = load_model_config(tmp_path), torch.arange(20)
    assert not config.tie_word_embeddings
    assert "lm_head.weight differs from the embeddings, so it is used" in config.notes[0]
    assert load_model_config(tmp_path, weights=False).tie_word_embeddings
    assert_logits(tmp_path, ids)
    edit(tmp_path, **{"lm_head.weight": head[:3].clone()})
    assert "lm_head.weight has shape [3, " in refusal(tmp_path)


def test_embeddings_stored_as_their_tied_head_alone_are_found(tmp_path: Path) -> None:
    checkpoint(tmp_path, tie_word_embeddings=True)
    ids = torch.arange(20)
    expected = run(load(tmp_path), DenseContext(), [(0, ids)])
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, **{"lm_head.weight": embedding, "model.embed_tokens.weight": None})
    assert torch.equal(run(load(tmp_path), DenseContext(), [(0, ids)]), expected)
    assert_logits(tmp_path, ids)
    edit(tmp_path, **{"lm_head.weight": None})
    assert "missing: model.embed_tokens.weight." in refusal(tmp_path)


def test_a_single_file_is_loaded_before_an_index_and_what_is_passed_over_is_said(tmp_path: Path) -> None:
    checkpoint(tmp_path, shard="20KB")
    assert load_model_config(tmp_path).notes == ()
    new = checkpoint(tmp_path / "new", tie_word_embeddings=False)
    (tmp_path / "new" / "model.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / "new" / "config.json").rename(tmp_path / "config.json")
    assert torch.equal(load(tmp_path).model.norm.weight, new.model.norm.weight)
    assert_logits(tmp_path, torch.arange(20))
    (said,) = load_model_config(tmp_path).notes
    assert said.startswith("weights: model.safetensors; passed over: model-00001-of-")
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    load(tmp_path)
    assert load_model_config(tmp_path).notes == (
        "weights: model.safetensors; passed over: model.safetensors.index.json",
    )


def test_of_a_tensor_in_two_shards_the_last_is_loaded_and_that_is_said(tmp_path: Path) -> None:
    checkpoint(tmp_path, shard="20KB")
    last = sorted(tmp_path.glob("model-*.safetensors"))[-1]
    other = torch.randn(load_model_config(tmp_path).hidden_size)
    name = "model.layers.0.input_layernorm.weight"
    save_file(load_file(last) | {name: other}, last)
    assert torch.equal(load(tmp_path).model.layers[0].input_layernorm.weight, other)
    assert_logits(tmp_path, torch.arange(20))
    assert load_model_config(tmp_path).notes == (
        f"weights: of tensors that several files have the last file's is loaded: {name}",
    )


def test_sharded_and_single_files_give_the_same_model(tmp_path: Path) -> None:
    checkpoint(tmp_path / "one")
    checkpoint(tmp_path / "many", shard="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    ids = torch.arange(20)
    one, many = (run(load(tmp_path / name), DenseContext(), [(0, ids)]) for name in ("one", "many"))
    assert torch.equal(one, many)


def test_files_that_are_absent_or_broken_are_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, shard="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert shard.name in refusal(tmp_path)
    assert "not a readable safetensors file" in refusal(tmp_path)
    shard.unlink()
    assert f"names: {shard.name};" in refusal(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        index.write_text(content)
        assert f"{index} names no files" in refusal(tmp_path)
    index.unlink()
    assert "neither model.safetensors nor model.safetensors.index.json (it has model-00001-of-" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pickled PyTorch weights (.bin, .pt or .pth)" in refusal(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_refused_and_their_tensors_named(value: float, tmp_path: Path) -> None:
    checkpoint(tmp_path)
    broken = load_file(tmp_path / "model.safetensors")[K_PROJ]
    broken[-1, -1] = value
    edit(tmp_path, **{K_PROJ: broken})
    error = refusal(tmp_path)
    assert f"have NaN or infinite values: {K_PROJ}; download the model again." in error, "only it of the fused layer"


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    large = load_file(tmp_path / "model.safetensors")[K_PROJ]
    large[0, 0] = 1e5
    edit(tmp_path, **{K_PROJ: large})
    load(tmp_path, torch.bfloat16)
    with pytest.raises(UserError, match=f"{K_PROJ}; use --dtype bfloat16, as float16 ends at 65504, or download"):
        load(tmp_path, torch.float16)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_are_converted_to_the_dtype_asked_for(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    reference = checkpoint(tmp_path, tie_word_embeddings=False).to(stored)
    reference.save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    assert config.dtype == str(stored).removeprefix("torch.")
    model = load(tmp_path, dtype)
    assert torch.equal(model.model.embed_tokens.weight, reference.model.embed_tokens.weight.to(dtype))
    assert torch.equal(
        model.model.layers[1].input_layernorm.weight, reference.model.layers[1].input_layernorm.weight.to(dtype)
    )
    assert run(model, DenseContext(), [(0, torch.arange(4))]).dtype == torch.float32


def test_progress_is_told_in_bytes_up_to_the_whole(tmp_path: Path) -> None:
    checkpoint(tmp_path, tie_word_embeddings=False)
    config = load_model_config(tmp_path)
    model = build_model(config, BuildOptions(dtype=torch.bfloat16, kv_dtype=torch.bfloat16, device=torch.device("cpu")))
    seen: list[tuple[int, int]] = []
    load_weights(model, tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = weight_bytes(described_model(config, torch.bfloat16))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_dummy_weights_are_reproducible_and_run(tmp_path: Path) -> None:
    checkpoint(tmp_path, "Qwen3ForCausalLM", tie_word_embeddings=True)
    config = load_model_config(tmp_path)

    def logits(seed: int) -> torch.Tensor:
        model = build_model(
            config, BuildOptions(dtype=torch.bfloat16, kv_dtype=torch.bfloat16, device=torch.device("cpu"))
        )
        dummy_weights(model, seed)
        assert (model.model.norm.weight == 1).all()
        assert 0.015 < float(model.model.embed_tokens.weight.float().std()) < 0.025
        return run(model, DenseContext(), [(0, torch.arange(12))])

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    assert logits(1).isfinite().all()


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_weight_bytes_counts_every_parameter(architecture: str, tmp_path: Path) -> None:
    for tied in (False, True):
        reference = checkpoint(tmp_path / str(tied), architecture, tie_word_embeddings=tied, num_hidden_layers=3)
        config = load_model_config(tmp_path / str(tied))
        stored = sum(parameter.numel() for parameter in reference.parameters())
        copy = reference.lm_head.weight.numel() if tied else 0
        assert weight_bytes(described_model(config, torch.bfloat16), "cuda") == stored * 2
        on_cpu = stored + (copy if can_pack(torch.bfloat16) else 0)
        assert weight_bytes(described_model(config, torch.bfloat16), "cpu") == on_cpu * 2


MEASURE = """
import resource, sys, torch
from miniserve.models.config import load_model_config
from miniserve.models.loader import load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, described_model, weight_bytes
torch.set_num_threads(1)
config = load_model_config(sys.argv[1])
model = build_model(config, BuildOptions(torch.bfloat16, torch.bfloat16, torch.device("cpu")))
torch.ones(8, 8, dtype=torch.bfloat16) @ torch.ones(8, 8, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_weights(model, sys.argv[1])
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(grown, weight_bytes(described_model(config, torch.bfloat16)))
"""


def test_loading_never_holds_a_second_copy(tmp_path: Path) -> None:
    """Peak resident memory, mapped file pages included, grows by the weights and no more than one layer beside them."""
    config = MistralConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=10, num_attention_heads=8
    )
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(tmp_path)
    bfloat16 = torch.bfloat16
    model = build_model(
        load_model_config(tmp_path), BuildOptions(dtype=bfloat16, kv_dtype=bfloat16, device=torch.device("cpu"))
    )
    pieces = [
        piece for name, layer in model.named_modules() if isinstance(layer, Layer) for piece in layer.pieces(name)
    ]
    save_file(
        {piece.name: torch.zeros(piece.shape, dtype=bfloat16) for piece in pieces}, tmp_path / "model.safetensors"
    )
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, weights = map(int, done.stdout.split())
    assert weights > 180e6
    assert grown < weights + 40e6


def test_an_index_that_lists_fewer_files_than_lie_there_is_followed(tmp_path: Path) -> None:
    """Some repositories keep a second, consolidated copy beside the shards."""
    checkpoint(tmp_path, shard="20KB")
    (tmp_path / "consolidated.safetensors").write_bytes(b"not ours")
    load(tmp_path)
    assert load_model_config(tmp_path).notes == (
        "weights: the files that model.safetensors.index.json names; passed over: consolidated.safetensors",
    )
