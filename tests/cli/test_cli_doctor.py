"""`miniserve doctor` says what is there, and what a machine lacks with the command for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from miniserve.checks import doctor as checks
from miniserve.cli.doctor import doctor


def findings() -> dict[str, list[checks.Finding]]:
    found: dict[str, list[checks.Finding]] = {"ok": [], "note": [], "lack": []}
    for finding in checks.examine():
        found[finding.state].append(finding)
    return found


def test_what_this_machine_has() -> None:
    told = "\n".join(map(str, findings()["ok"]))
    for part in ("Python 3.", "cores", "billion parameters", "Attention: "):
        assert part in told


def test_without_pytorch_nothing_else_is_looked_at(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(typer.Exit) as end:
        doctor()
    assert end.value.exit_code == 1
    assert capsys.readouterr().out.endswith(
        "lack  PyTorch is not installed\n      -> pip install 'torch>=2.11,<2.14'\n"
    )


def test_a_gpu_that_pytorch_cannot_use_is_a_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    present = {"/dev/nvidiactl"}
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in present)
    for version, said in ((None, "without CUDA"), ("13.0", "cannot use it")):
        monkeypatch.setattr(torch.version, "cuda", version)
        (finding,) = checks._no_gpu()
        assert finding.state == "lack" and said in finding.text and finding.remedy
    present.clear()
    present.add("/dev/kfd")
    monkeypatch.setattr(torch.version, "hip", None)
    (finding,) = checks._no_gpu()
    assert "without ROCm" in finding.text and "rocm" in finding.remedy


def test_what_makes_it_slower_is_a_note_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("miniserve.kernels.native.unavailable_reason", lambda: "no compiler")
    monkeypatch.setattr(checks.resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    monkeypatch.setattr(checks, "_no_gpu", lambda: iter(()))
    with pytest.raises(typer.Exit) as end:
        doctor()
    told = capsys.readouterr().out
    assert end.value.exit_code == 0
    for remedy in ("apt-get install g++", "ulimit -n 4096", "make room there"):
        assert f"-> {remedy}" in told
