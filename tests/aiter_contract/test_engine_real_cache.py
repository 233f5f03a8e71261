"""aiter's real Triton rope and cache writes, in Triton's interpreter, beside the engine's rope and layouts."""

from __future__ import annotations

from real_aiter import agreements


def test_the_real_rope_and_cache_writes_agree() -> None:
    assert len(agreements("real_cache.py")) == 46
