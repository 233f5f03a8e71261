"""Routed experts through aiter: against the engine's plain method, and where they are left to others."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import stand_in

import miniserve
from miniserve.attention import aiter as adapter
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.llm import LLM
from miniserve.models.layers.aiter_moe import AiterMoE, describe_experts, find_experts
from miniserve.models.layers.experts import Experts, GroupedMoE
from miniserve.models.layers.linear import PLAIN
from miniserve.models.options import BuildOptions
from miniserve.parallel.shard import Part, Shard

torch.set_num_threads(1)
CPU = torch.device("cpu")
BF16 = torch.bfloat16
MI300X = NAMED_PLATFORMS["mi300x"]
MODEL = str(Path(miniserve.__file__).parent / "assets" / "tiny-deepseek")


def experts_of(hidden: int, middle: int, dtype: torch.dtype, method: Any, experts: int | Part = 6) -> Experts:
    layer = Experts(experts, hidden, middle, dtype=dtype, method=method)
    layer.allocate(CPU)
    layer.fill_dummy("layer", 1)
    for parameter in layer.parameters():
        parameter.data.mul_(5)
    layer.finish()
    return layer


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize(("hidden", "middle"), [(256, 128), (192, 96), (128, 64), (130, 200)])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_it_sums_each_tokens_experts(arch: str, dtype: torch.dtype, hidden: int, middle: int, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(num_tokens, hidden, generator=generator).to(dtype)
    weights = torch.rand(num_tokens, 2, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(num_tokens)])
    plain = GroupedMoE(PLAIN)
    want = experts_of(hidden, middle, dtype, plain)(x, weights, ids)
    with stand_in(arch, 4) as module:
        layer = experts_of(hidden, middle, dtype, AiterMoE(adapter.load_experts()))
        out = layer(x, weights, ids)
        assert ("fused_moe", "No") in module._standin.calls
    assert list(layer.parameters()) == [], "one copy of the weights"
    assert out.shape == want.shape
    assert out.dtype == dtype
    assert float((out.float() - want.float()).norm() / want.float().norm()) < 2e-2


def test_ranks_sum_the_experts_that_they_have() -> None:
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(9, 128, generator=generator).to(BF16), torch.rand(9, 2, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(9)])
    want = experts_of(128, 64, BF16, GroupedMoE(PLAIN))(x, weights, ids)
    with stand_in("gfx942", 4):
        parts = [
            experts_of(128, 64, BF16, AiterMoE(adapter.load_experts()), Shard(rank, 4).part(6))(x, weights, ids)
            for rank in range(4)
        ]
    assert float((sum(parts).float() - want.float()).norm() / want.float().norm()) < 2e-2


@pytest.mark.parametrize(("hidden", "middle"), [(7168, 2048), (4096, 1536), (4096, 192), (2048, 1408), (2048, 768)])
def test_the_sizes_of_known_models_need_no_padding(hidden: int, middle: int) -> None:
    """DeepSeek-V3, Qwen3-235B and an eighth of it, DeepSeek-V2-Lite, Qwen3-30B."""
    shapes: list[torch.Size] = []

    def shuffle(weight: torch.Tensor) -> torch.Tensor:
        shapes.append(weight.shape)
        return weight

    layer = Experts(
        1, hidden, middle, dtype=BF16, method=AiterMoE(adapter.AiterExperts(fused_moe=_none, shuffle_weight=shuffle))
    )
    layer.finish()
    assert shapes == [(1, 2 * middle, hidden), (1, hidden, middle)]


def _none(*given: object) -> torch.Tensor:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"aiter_version": (0, 1, 19)}, "it needs aiter v0.1.20 or newer, not v0.1.19, whose routing writes where"),
        ({"aiter_version": None, "aiter_unavailable": "aiter is not installed"}, "aiter is not installed"),
        ({"arch": "gfx1201"}, "it runs on gfx942 or gfx950, not on gfx1201"),
        ({"arch": "sm_90"}, "it runs on gfx942 or gfx950, not on sm_90"),
    ],
)
def test_17_a_routing_kernel_that_corrupts_memory_is_not_used(change: dict[str, Any], why: str) -> None:
    """Nor one that is not there; why is told."""
    with stand_in("gfx942", 4):
        assert not isinstance(find_experts(MI300X, BF16), str)
        found = find_experts(replace(MI300X, **change), BF16)
    assert isinstance(found, str) and found.startswith(why)
    assert describe_experts("PyTorch", found) == f"experts by PyTorch; not by aiter fused_moe: {found}"


def test_an_aiter_whose_experts_cannot_be_imported_leaves_them_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in("gfx942", 4), monkeypatch.context() as patch:
        patch.setitem(sys.modules, "aiter.fused_moe", None)
        assert "aiter.fused_moe cannot be imported" in str(find_experts(MI300X, BF16))


def test_float32_is_left_to_the_engine() -> None:
    with stand_in("gfx942", 4):
        for dtype in (BF16, torch.float16):
            experts = find_experts(MI300X, dtype)
            assert not isinstance(experts, str)
            options = BuildOptions(dtype=dtype, kv_dtype=dtype, device=CPU, max_model_len=8, experts=experts)
            assert options.moe_method(128, 128).name == "aiter fused_moe"
        assert find_experts(MI300X, torch.float32) == "it does not compute in float32"


def test_run_says_who_multiplies() -> None:
    with stand_in("gfx942", 4):
        for dtype, said in (
            ("bfloat16", "experts by aiter fused_moe"),
            ("float32", "one expert after the other; not by aiter fused_moe: it does not compute in float32"),
        ):
            told = LLM(MODEL, progress=False, max_model_len=64, max_num_seqs=2, device="cpu", dtype=dtype)
            assert told.info.attention[-1].endswith(said)
