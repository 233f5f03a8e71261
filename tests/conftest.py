"""What must be settled before any test module is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    # Triton reads it when it is first imported, which libraries do on their own.
    os.environ.setdefault("TRITON_INTERPRET", "1")
