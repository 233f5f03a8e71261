"""What must be known before any test module is imported, and what every test needs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# As many tests run at once as there are cores; the engines that they start inherit this too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which libraries do on their own.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C works here and in what a test starts, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
