"""aiter's real unified attention, in Triton's interpreter, over the engine's layouts and metadata."""

from __future__ import annotations

from real_aiter import agreements


def test_the_real_kernel_agrees() -> None:
    assert len(agreements("real_unified.py")) == 20
