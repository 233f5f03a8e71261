"""A measured order of paths: kept, found again for the same model and platform, and for no other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miniserve.attention import tuning
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec
from miniserve.core import UserError

SPEC = AttentionSpec(16, 8, 128, 128**-0.5, torch.bfloat16, torch.bfloat16)
MI300X = NAMED_PLATFORMS["mi300x"]
TIMES = {"ROCM_ATTN:shuffled": 90.0, "ROCM_AITER_FA:linear": 70.5, "ROCM_AITER_FA:shuffled": 40.0}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_was_measured_decides() -> None:
    assert tuning.preferred(MI300X, [SPEC], 16) == ()
    path = tuning.save(MI300X, [SPEC], 16, TIMES)
    assert path.name.startswith("gfx942-")
    order = tuning.preferred(MI300X, [SPEC], 16)
    assert order == ("ROCM_AITER_FA:shuffled", "ROCM_AITER_FA:linear", "ROCM_ATTN:shuffled")
    choice = select([SPEC], MI300X, block_size=16, preferred=order)
    assert (choice.backend, choice.layout) == ("ROCM_AITER_FA", "shuffled")


def test_another_model_gpu_or_aiter_is_not_concerned() -> None:
    tuning.save(MI300X, [SPEC], 16, TIMES)
    assert tuning.preferred(MI300X, [SPEC], 32) == ()
    assert tuning.preferred(MI300X, [SPEC, SPEC], 16) == ()
    assert tuning.preferred(MI300X, [replace(SPEC, kv_dtype=torch.float8_e4m3fnuz)], 16) == ()
    for platform in (
        NAMED_PLATFORMS["mi355x"],
        replace(MI300X, aiter_version=(0, 1, 21)),
        NAMED_PLATFORMS["mi308x"],
    ):
        assert tuning.preferred(platform, [SPEC], 16) == ()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"microseconds": {"ROCM_ATTN": "fast"}}', '{"microseconds": 3}'])
def test_a_file_of_somebody_else_is_named(text: str) -> None:
    path = tuning.save(MI300X, [SPEC], 16, TIMES)
    path.write_text(text)
    with pytest.raises(UserError, match="delete it"):
        tuning.preferred(MI300X, [SPEC], 16)
