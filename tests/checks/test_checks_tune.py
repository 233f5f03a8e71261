"""`miniserve tune`: it times what there is, ranks it over all batch sizes, and what it keeps decides afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.checks import tune as tuner
from miniserve.checks.check_paths import AttentionPath, Machine, PathResults, find_machine
from miniserve.checks.tune import Timing, rank, time_path
from miniserve.cli.tune import tune
from miniserve.config import EngineConfig, cache_dir, tuning_dir
from miniserve.core import UserError
from miniserve.llm import LLM
from miniserve.runner.tuning import load_preferred, table_path


@pytest.fixture(autouse=True)
def _short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = sorted(cache_dir().glob("cpu-*.so"))  # so that the CPU's kernels are not compiled again
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache_dir().mkdir()
    for library in kept:
        (cache_dir() / library.name).symlink_to(library)
    monkeypatch.setattr(tuner, "_MEASURE", 0.0)


def timing(name: str, *seconds: float) -> Timing:
    return Timing(AttentionPath(name, "linear", "auto"), 64, dict(zip((1, 8), seconds, strict=True)))


def test_the_best_over_all_batch_sizes_comes_first() -> None:
    timings = [timing("A", 1.0, 9.0), timing("B", 2.0, 2.0), timing("C", 3.0, 2.5), timing("D", 1.5, 4.0)]
    assert [each.path.backend for each in rank(timings)] == ["B", "D", "C", "A"]


def test_a_path_is_timed_for_every_layer_and_batch_size() -> None:
    machine = find_machine(EngineConfig(device="cpu"))
    found = time_path(machine, AttentionPath("TORCH_ATTN", "shuffled", "fp8"), [1, 3], 40)
    assert list(found.seconds) == [1, 3] and all(seconds > 0 for seconds in found.seconds.values())


def test_latent_paths_are_timed_too() -> None:
    spec = AttentionSpec(4, 1, 24, 0.2, torch.float32, torch.float32, latent=LatentDims(16, 8, 12, 10))
    base = find_machine(EngineConfig(device="cpu"))
    machine = Machine(specs=(spec, spec), platform=base.platform, device=base.device, block_size=16)
    (path,) = machine.paths(("auto",))
    assert (path.backend, path.layout) == ("TORCH_MLA", "latent")
    assert time_path(machine, path, [2], 20).seconds[2] > 0


def test_what_is_kept_decides_for_the_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {"TORCH_ATTN:linear": 1.0}
    monkeypatch.setattr(
        tuner,
        "time_path",
        lambda machine, path, batches, context: Timing(
            path, context, dict.fromkeys(batches, slow.get(f"{path.backend}:{path.layout}", 2.0))
        ),
    )
    tune(batch=[1], context=32, device="cpu", dtype="float32")
    told = capsys.readouterr().out
    assert told.startswith("TORCH_ATTN over linear: 1000.000 ms at batch 1\n")
    machine = find_machine(EngineConfig(device="cpu", dtype="float32"))
    table = table_path(tuning_dir(), machine.platform, machine.specs, 16)
    assert f"saved to {table}\n" in told
    assert json.loads(table.read_text())["measured"][0]["seconds"] == {"1": 1.0}
    assert load_preferred(tuning_dir(), machine.platform, machine.specs, 16)[0] == "TORCH_ATTN:linear"
    assert load_preferred(tuning_dir(), machine.platform, machine.specs, 32) == ()
    attention = LLM(device="cpu", dtype="float32", progress=False).info.attention
    assert attention[0] == "TORCH_ATTN over the linear KV layout: measured fastest by `miniserve tune`"
    asked = LLM(device="cpu", dtype="float32", attention_backend="CPU_ATTN", progress=False).info.attention
    assert asked[0].startswith("CPU_ATTN over the") and "measured" not in asked[0]


def test_a_path_that_is_wrong_or_fails_is_not_preferred(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Machine.check

    def check(machine: Machine, path: AttentionPath) -> PathResults:
        results = whole(machine, path)
        if path.layout == "shuffled":
            raise RuntimeError("no such kernel\nand so on")
        return (
            results
            if path.backend == "TORCH_ATTN"
            else replace(results, checks=[replace(results.checks[0], error=0.5)])
        )

    monkeypatch.setattr(Machine, "check", check)
    tune(batch=[1], context=32, device="cpu", dtype="float32")
    told = capsys.readouterr()
    assert [line.partition(":")[0] for line in told.out.splitlines()[:-1]] == ["TORCH_ATTN over linear"]
    assert "skipped: RuntimeError: no such kernel\n" in told.err
    assert "skipped: CPU_ATTN over the linear KV layout, layer 0, prefill: 50.00% off" in told.err
    monkeypatch.setattr(tuner, "fault", lambda machine, path: "wrong")
    with pytest.raises(UserError, match="No attention path gives correct results here"):
        tune(batch=[1], context=32, device="cpu", dtype="float32")


def test_a_step_without_rows_is_not_timed() -> None:
    with pytest.raises(UserError, match="--batch and --context must be 1 or more"):
        tune(batch=[0])
