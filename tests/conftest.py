"""What must be known before any test module is imported, and what every test needs."""

from __future__ import annotations

import os
import signal

# As many tests run at once as there are cores; the engines that they start inherit this too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The many processes that tests start keep the package compiled: anew it takes each of them most of a second.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which libraries do on their own.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Signals work in what a test starts, and Ctrl-C here, also where a shell's script or nohup had them ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)  # as good as ignored, but not inherited
