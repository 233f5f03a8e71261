"""`miniserve check`: every path here passes, a wrong one is named, tokens are judged, and the report says it all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from engine_support import stand_in
from typer.main import get_command

from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.checks.check_paths import AttentionPath, find_machine, made_up_layer
from miniserve.checks.check_tokens import Comparison, Verdict, judge
from miniserve.cli.check import check
from miniserve.cli.main import app
from miniserve.config import EngineConfig
from miniserve.core import UserError


def run_check(**flags: Any) -> int:
    command: Any = get_command(app)
    with pytest.raises(typer.Exit) as end:
        check(ctx=command.get_command(None, "check").make_context("check", []), **flags)
    return end.value.exit_code


def test_the_chosen_path_and_its_tokens_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.md"
    assert run_check(dtype="float32", device="cpu", attention_backend="TORCH_ATTN", report=report) == 0
    told = capsys.readouterr().out
    assert "ok   TORCH_ATTN over linear, KV cache auto: 3 checks" in told
    assert told.count("all 32 tokens match transformers") == 4
    written = report.read_text()
    assert written.startswith("# miniserve check: passed\n") and f"- torch: {torch.__version__}" in written
    assert "- arch: cpu" in written and told in written


def test_all_paths_of_a_gpu_are_those_that_can_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    with stand_in("gfx942", 16):
        assert run_check(device="cpu", every=True, tokens=False, report=report) == 0
    found = json.loads(report.read_text())
    paths = {(path["backend"], path["layout"], path["kv_cache_dtype"]) for path in found["attention"]}
    assert {path[0] for path in paths} == {
        "ROCM_ATTN",
        "ROCM_AITER_FA",
        "ROCM_AITER_UNIFIED_ATTN",
        "ROCM_AITER_GLUON",
        "TRITON_ATTN",
        "TORCH_ATTN",
    }
    assert {path[1:] for path in paths} == {(a, b) for a in ("linear", "shuffled") for b in ("auto", "fp8")}
    assert found["ok"] and found["tokens"] is None and found["device"]["arch"] == "gfx942"
    assert found["machine"]["versions"]["torch"] == torch.__version__


def test_a_wrong_path_fails_and_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = TorchBackend.decode
    monkeypatch.setattr(TorchBackend, "decode", lambda *given: right(*given) * 1.5)
    assert run_check(device="cpu", attention_backend="TORCH_ATTN", kv_layout="shuffled") == 1
    told = capsys.readouterr().out
    assert told.startswith("FAIL TORCH_ATTN over shuffled, KV cache auto: 3 checks")
    assert "TORCH_ATTN over the shuffled KV layout, layer 0, decode: 50" in told
    assert "transformers" not in told  # no engine was started over it


@pytest.mark.parametrize(("tile_bug", "right"), [(True, False), (False, True)])
def test_the_asm_kernel_is_judged_apart(tile_bug: bool, right: bool, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 64,
        "max_position_embeddings": 1024,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with stand_in("gfx942", 16) as module, module._standin.emulate(arch="gfx942", cu_num=16, tile_bug=tile_bug):
        machine = find_machine(EngineConfig(model=str(tmp_path), device="cpu"))
        results = machine.check(AttentionPath("ROCM_AITER_FA", "shuffled", "auto"))
        others = machine.check(AttentionPath("ROCM_AITER_FA", "linear", "auto"))
    assert results.ok and results.asm_lengths is right
    assert others.ok and others.asm_lengths is None


def test_attention_is_that_of_a_rank() -> None:
    one, rank = (find_machine(EngineConfig(device="cpu", tensor_parallel_size=size)).specs[0] for size in (1, 2))
    assert (2 * rank.num_heads, 2 * rank.num_kv_heads) == (one.num_heads, one.num_kv_heads)
    with pytest.raises(UserError, match="--tensor-parallel-size 99 is more than"):
        check(device="cpu", tensor_parallel_size=99)


def test_a_path_that_cannot_be_had_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"with --attention-backend ROCM_ATTN"):
        check(device="cpu", attention_backend="ROCM_ATTN")


def test_a_report_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    for name in ("missing/report.md", "missing/report.json"):
        with pytest.raises(UserError, match="Cannot write"):
            check(device="cpu", tokens=False, report=tmp_path / name)


def test_latent_layers_are_made_up_too(tmp_path: Path) -> None:
    from miniserve.attention.spec import AttentionSpec, LatentDims

    spec = AttentionSpec(4, 1, 24, 0.2, torch.float32, torch.float32, latent=LatentDims(16, 8, 12, 10))
    layer: Any = made_up_layer(spec, torch.device("cpu"))
    q, kv_c = torch.randn(3, 4, 12), torch.randn(5, 16)
    k, v = layer.expand(kv_c)
    torch.testing.assert_close(layer.absorb(q) @ kv_c.T, torch.einsum("thn,khn->thk", q, k))
    weights = torch.rand(3, 4, 5)
    latent = torch.einsum("thk,kc->thc", weights, kv_c)
    torch.testing.assert_close(layer.project_out(latent), torch.einsum("thk,khv->thv", weights, v).flatten(1))


# --- tokens ----------------------------------------------------------------------------------------------------------


def model_that_says(logits: list[list[float]]) -> Any:
    """Gives these logits for the last tokens of whatever it is asked, one row each, and zeros before."""

    def forward(ids: torch.Tensor) -> Any:
        rows = torch.zeros(1, ids.shape[1], 4)
        rows[0, -len(logits) - 1 : -1] = torch.tensor(logits)
        return SimpleNamespace(logits=rows)

    return forward


def test_tokens_are_judged_by_the_first_that_differs_and_the_worst_of_all() -> None:
    logits = [[0.0, 4.0, 1.0, 3.0], [4.0, 3.5, 0.5, 0.0], [8.0, 0.0, 0.0, 0.0]]
    same = judge(model_that_says(logits), [1, 2], [1, 0, 0], torch.device("cpu"))
    assert (same.diverges_at, same.gap, same.margin, same.worst) == (None, 0.0, 0.5, 0.0)
    near = judge(model_that_says(logits), [1, 2], [1, 1, 0], torch.device("cpu"))
    assert (near.diverges_at, near.gap, near.margin) == (1, 0.5, 0.5)
    assert near.worst == pytest.approx(0.5 / (4 - 2))
    wrong = judge(model_that_says(logits), [1, 2], [1, 1, 3], torch.device("cpu"))
    assert (wrong.diverges_at, wrong.gap) == (1, 0.5)
    assert wrong.worst == pytest.approx(8 / (8 - 2))


def test_an_answer_fails_by_its_worst_token() -> None:
    near, wrong = (Comparison("P", 3, 9, Verdict(1, 0.1, 0.1, worst), 0.04) for worst in (0.01, 0.2))
    assert near.ok and not wrong.ok
    assert "token 1 of 9 is the first that differs: its logit is 0.1 below" in wrong.sentence()
    assert wrong.to_json()["verdict"]["worst"] == 0.2 and wrong.to_json()["ok"] is False
