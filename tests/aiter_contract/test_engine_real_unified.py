"""aiter's real unified attention, in Triton's interpreter, over the engine's layouts and metadata."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_the_real_kernel_agrees() -> None:
    if not os.environ.get("AITER_SRC"):
        pytest.skip("AITER_SRC names no checkout of github.com/ROCm/aiter to run")
    pytest.importorskip("triton")
    paths = [str(HERE.parent / "attention"), str(HERE)]
    done = subprocess.run(
        [sys.executable, str(HERE / "real_unified.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    agreed = [line for line in done.stdout.splitlines() if line.startswith("agrees:")]
    assert len(agreed) == 16, done.stdout
