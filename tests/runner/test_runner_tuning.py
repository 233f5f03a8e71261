"""A measured order of paths: kept, found again for the same kind of model and platform and no other, and obeyed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miniserve.attention.platform import NAMED_PLATFORMS, Platform, detect_platform
from miniserve.attention.spec import AttentionSpec
from miniserve.config import tuning_dir
from miniserve.llm import LLM
from miniserve.runner.tuning import load_preferred, save_table, table_path

SPEC = AttentionSpec(16, 8, 128, 128**-0.5, torch.bfloat16, torch.bfloat16)
MI300X = NAMED_PLATFORMS["mi300x"]
ORDER = ["ROCM_AITER_FA:shuffled", "ROCM_ATTN:shuffled"]


def test_a_table_is_found_for_what_it_was_measured_on(tmp_path: Path) -> None:
    def found(
        platform: Platform = MI300X, specs: tuple[AttentionSpec, ...] = (SPEC,), block_size: int = 16
    ) -> tuple[str, ...]:
        return load_preferred(tmp_path, platform, specs, block_size)

    assert found() == ()
    save_table(table_path(tmp_path, MI300X, [SPEC], 16), ORDER, [])
    assert found() == tuple(ORDER)
    assert found(specs=(SPEC, SPEC)) == tuple(ORDER), "more layers of the same kind"
    assert found(specs=(replace(SPEC, sliding_window=64),)) == ()
    assert found(specs=(replace(SPEC, kv_dtype=torch.float8_e4m3fnuz),)) == ()
    assert found(block_size=32) == ()
    for other in (NAMED_PLATFORMS["mi355x"], NAMED_PLATFORMS["mi308x"], replace(MI300X, aiter_version=(0, 1, 21))):
        assert found(other) == ()


def test_the_engine_obeys_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attention() -> list[str]:
        return LLM(progress=False, max_model_len=64, max_num_seqs=2, device="cpu", dtype="float32").info.attention

    assert "measured" not in attention()[0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = AttentionSpec(4, 2, 128, 128**-0.5, torch.float32, torch.float32, qk_norm=True)
    platform = detect_platform(torch.device("cpu"), torch.float32)
    save_table(table_path(tuning_dir(), platform, [spec], 16), ["TORCH_ATTN:shuffled"], [])
    assert attention()[0] == "TORCH_ATTN over the shuffled KV layout: measured fastest by `miniserve tune`"
