"""Programs that run Triton kernels of a checkout of aiter (AITER_SRC) in Triton's interpreter on a CPU: what they start
with, and how a test runs one. A process of its own each, as Triton is told of its interpreter when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent


def agreements(program: str) -> list[str]:
    """The lines "agrees: …" of a program beside this file; skips the test where there is no aiter or no Triton."""
    if not os.environ.get("AITER_SRC"):
        pytest.skip("AITER_SRC names no checkout of github.com/ROCm/aiter to run")
    pytest.importorskip("triton")
    paths = [str(HERE.parent / "attention"), str(HERE), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, str(HERE / program)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if line.startswith("agrees:")]


def make_importable(arch: str) -> None:
    """Let aiter's Triton modules be imported: they ask for just so much of an AMD GPU as is pretended here."""
    os.environ |= {"TRITON_INTERPRET": "1", "AITER_TRITON_ONLY": "1"}
    import torch
    import triton

    target = triton.backends.compiler.GPUTarget("hip", arch, 64)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_device_interface=lambda: torch.cuda,
            get_active_torch_device=lambda: torch.device("cpu"),
        )
    )
    properties = SimpleNamespace(multi_processor_count=304)
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *_: properties
    sys.path.insert(0, os.environ["AITER_SRC"])
