"""aiter's real Triton latent decode, in Triton's interpreter, over the engine's latents and block tables."""

from __future__ import annotations

from real_aiter import agreements


def test_the_real_latent_decode_agrees() -> None:
    assert len(agreements("real_mla.py")) == 12
