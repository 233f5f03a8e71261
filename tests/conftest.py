"""What must be settled before any test module is imported."""

from __future__ import annotations

import os

# As many tests run at once as there are cores; the engines that they start inherit this too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which libraries do on their own.
    os.environ.setdefault("TRITON_INTERPRET", "1")
