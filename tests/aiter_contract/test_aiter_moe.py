"""Products through aiter: against the engine's plain methods, and where they are left to others."""

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
from miniserve.models.description import MoEConfig
from miniserve.models.layers.aiter_linear import rounded_groups
from miniserve.models.layers.aiter_moe import AiterMoE
from miniserve.models.layers.contracts import (
    AITER_BLOCKSCALE,
    AITER_MOE,
    EXPERTS,
    LIBRARY_FP8,
    LINEAR,
    TRITON,
    TRITON_EXPERTS_FP8,
    TRITON_LINEAR_FP8,
    Product,
    find_products,
    find_route,
)
from miniserve.models.layers.experts import Experts, GroupedMoE
from miniserve.models.layers.linear import PLAIN, Linear
from miniserve.models.options import BuildOptions
from miniserve.models.quantization import Quantization, Rule, WeightFormat
from miniserve.parallel.group import Alone
from miniserve.parallel.shard import Part, Shard

torch.set_num_threads(1)
CPU = torch.device("cpu")
BF16 = torch.bfloat16
MI300X = NAMED_PLATFORMS["mi300x"]
BLOCKS = WeightFormat("blocks", "weight_scale_inv", (128, 128))
MOE = MoEConfig(num_experts=2, top_k=1, intermediate_size=128, sparse_layers=(True,))
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
        layer = experts_of(hidden, middle, dtype, AiterMoE(adapter.load_products()))
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
            experts_of(128, 64, BF16, AiterMoE(adapter.load_products()), Shard(rank, 4).part(6))(x, weights, ids)
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

    with stand_in("gfx942", 4):
        aiter = replace(adapter.load_products(), shuffle_weight=shuffle)
    layer = Experts(1, hidden, middle, dtype=BF16, method=AiterMoE(aiter))
    layer.finish()
    assert shapes == [(1, 2 * middle, hidden), (1, hidden, middle)]


SCALED = {"rows": WeightFormat("rows"), "tensor": WeightFormat("tensor"), "blocks": BLOCKS}


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("grain", SCALED)
@pytest.mark.parametrize(("hidden", "middle", "ranks"), [(256, 128, 1), (192, 96, 1), (256, 256, 2)])
def test_it_takes_weights_in_8_bits(arch: str, grain: str, hidden: int, middle: int, ranks: int) -> None:
    """Padded where sizes are not multiples of its blocks; as codes of the arch's own format."""
    generator = torch.Generator().manual_seed(2)
    x, weights = torch.randn(9, hidden, generator=generator).to(BF16), torch.rand(9, 2, generator=generator)
    ids = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(9)])
    platform = NAMED_PLATFORMS["mi300x" if arch == "gfx942" else "mi355x"]
    quantization = Quantization("fp8", (Rule(("*",), SCALED[grain]),))
    moe = replace(MOE, num_experts=6, top_k=2, intermediate_size=middle)

    def layer(**options: Any) -> Experts:
        built = BuildOptions(BF16, BF16, CPU, quantization=quantization, **options).experts_of(moe, hidden)
        built.allocate(CPU)
        built.fill_dummy("m.experts", 1)
        built.finish()
        return built

    want = layer()(x, weights, ids)
    with stand_in(arch, 4) as module:
        aiter = adapter.load_products()
        groups = [Alone(rank, ranks) for rank in range(ranks)]
        layers = [layer(aiter=aiter, platform=platform, group=group) for group in groups]
        got = sum(each(x, weights, ids).float() for each in layers)
        assert {call.route for call in module._standin.calls} == {"per_1x128" if grain == "blocks" else "per_Token"}
    assert all(list(each.parameters()) == [] for each in layers), "one copy of the weights"
    assert float((got - want.float()).norm() / want.float().norm()) < 6e-2


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_linear_layers_of_many_rows_in_8_bits(arch: str) -> None:
    platform = NAMED_PLATFORMS["mi300x" if arch == "gfx942" else "mi355x"]
    quantization = Quantization("fp8", (Rule(("*",), BLOCKS),))

    def layer(**options: Any) -> Linear:
        built = BuildOptions(BF16, BF16, CPU, quantization=quantization, **options)
        linear = built.linear(256, {"a": 256, "b": 200}, bias=True)
        linear.allocate(CPU)
        linear.fill_dummy("m.l", 1)
        linear.finish()
        return linear

    exact = layer()
    with stand_in(arch, 4) as module:
        tried = layer(aiter=adapter.load_products(), platform=platform)
        for rows, calls in ((1, 0), (64, 0), (65, 1), (300, 2)):
            x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).to(BF16)
            x[0, :128] = 0
            got, want = tried(x).float(), exact(x).float()
            assert float((got - want).norm() / want.norm()) < (6e-2 if calls else 1e-2)
            assert len(module._standin.calls) == calls


def test_activations_are_rounded_to_what_each_format_holds() -> None:
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)) * 1e3
    for dtype, largest in ((torch.float8_e4m3fn, 448.0), (torch.float8_e4m3fnuz, 224.0)):
        codes, scale = rounded_groups(x.bfloat16(), dtype)
        assert codes.dtype == dtype and codes.float().abs().max() == largest
        wide = codes.float() * scale.repeat_interleave(128, 1)
        assert float((wide - x).norm() / x.norm()) < 4e-2
        assert rounded_groups(torch.zeros(1, 128), dtype)[0].float().abs().max() == 0


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"aiter_version": (0, 1, 19)}, "it needs aiter v0.1.20 or newer, not v0.1.19, whose routing writes where"),
        ({"aiter_version": None, "aiter_unavailable": "aiter is not installed"}, "aiter is not installed"),
        ({"arch": "gfx1201"}, None),
        ({"arch": "sm_89"}, None),
    ],
)
def test_17_a_routing_kernel_that_corrupts_memory_is_not_used(change: dict[str, Any], why: str | None) -> None:
    """Nor one that is not there; why is told, but on hardware that it is not for."""
    for grain, ours in (("plain", TRITON), ("rows", TRITON_EXPERTS_FP8)):
        assert find_route(EXPERTS, Product(BF16, grain), MI300X, {}).kernels[0].name == AITER_MOE
        route = find_route(EXPERTS, Product(BF16, grain), replace(MI300X, **change), {})
        assert [kernel.name for kernel in route.kernels] == [ours]
        assert [name for name, _ in route.refused] == ([] if why is None else [AITER_MOE])
        assert route.sentence("PyTorch").startswith(ours + ("" if why is None else f"; not by {AITER_MOE}: {why}"))


@pytest.mark.parametrize(
    ("product", "ours", "told"),
    [
        (Product(torch.float32), TRITON, "it does not compute in float32"),
        (
            Product(BF16, "blocks", (64, 64), (64, 128)),
            TRITON_EXPERTS_FP8,
            "it takes scales of 128 × 128 blocks, not of 64 × 128",
        ),
    ],
)
def test_what_aiter_does_not_take_is_left_to_the_engine(product: Product, ours: str, told: str) -> None:
    route = find_route(EXPERTS, product, MI300X, {})
    assert ([kernel.name for kernel in route.kernels], route.refused) == ([ours], ((AITER_MOE, told),))


def test_rows_are_divided_between_kernels() -> None:
    blocks = Product(BF16, "blocks", (128, 128), (128, 128), columns=256)
    route = find_route(LINEAR, blocks, MI300X, {})
    assert route.sentence("") == f"{AITER_BLOCKSCALE} from 65 rows on, else {TRITON_LINEAR_FP8}"
    assert [route.kernel(rows).name for rows in (1, 64, 65)] == [TRITON_LINEAR_FP8, TRITON_LINEAR_FP8, AITER_BLOCKSCALE]
    told = find_route(LINEAR, replace(blocks, columns=192), MI300X, {}).sentence("")
    assert told == f"{TRITON_LINEAR_FP8}; not by {AITER_BLOCKSCALE}: it takes multiples of 128 columns, not 192"
    failed = find_route(LINEAR, blocks, MI300X, {AITER_BLOCKSCALE: "the self-check failed: x"})
    assert failed.sentence("") == f"{TRITON_LINEAR_FP8}; not by {AITER_BLOCKSCALE}: the self-check failed: x"
    fine = find_route(LINEAR, Product(BF16, "blocks", (16, 128), (16, 128)), NAMED_PLATFORMS["h100"], {})
    assert fine.sentence("PyTorch") == (
        f"PyTorch; not by {LIBRARY_FP8}: it takes scales of 128 × 128 blocks, not of 16 × 128; not by "
        f"{TRITON_LINEAR_FP8}: scales of 16 × 128 are too fine for it"
    )
    blocks = replace(blocks, rows=640, columns=1536)
    for product in (blocks, Product(BF16, "rows", rows=640, columns=400)):
        hopper = find_route(LINEAR, product, NAMED_PLATFORMS["h100"], {})
        assert hopper.sentence("") == f"{LIBRARY_FP8} from 65 rows on, else {TRITON_LINEAR_FP8}"
    for changes, told in (
        ({"columns": 640}, "it takes multiples of 512 columns, not 640"),
        ({"rows": 648}, "it takes multiples of 16 rows, not 648"),
        ({"wide": "x"}, "it rounds activations to 8 bits, and x"),
    ):
        refused = find_route(LINEAR, replace(blocks, **changes), NAMED_PLATFORMS["h100"], {})
        assert refused.sentence("") == f"{TRITON_LINEAR_FP8}; not by {LIBRARY_FP8}: {told}"
    kept = find_route(EXPERTS, Product(BF16, "blocks", (128, 128), (128, 128), wide="x"), MI300X, {})
    assert kept.sentence("") == f"{TRITON_EXPERTS_FP8}; not by {AITER_MOE}: it rounds activations to 8 bits, and x"


def test_an_aiter_whose_experts_cannot_be_imported_leaves_them_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in("gfx942", 4), monkeypatch.context() as patch:
        patch.setitem(sys.modules, "aiter.fused_moe", None)
        aiter, failed = find_products(MI300X)
    assert aiter is None and "aiter.fused_moe cannot be imported" in failed[AITER_MOE]
    told = find_route(EXPERTS, Product(BF16), MI300X, failed).sentence("")
    assert f"not by {AITER_MOE}: aiter.fused_moe cannot be imported" in told


def test_run_says_who_multiplies() -> None:
    with stand_in("gfx942", 4):
        for dtype, said in (
            ("bfloat16", "experts by aiter fused_moe"),
            ("float32", "one expert after the other; not by aiter fused_moe: it does not compute in float32"),
        ):
            told = LLM(MODEL, progress=False, max_model_len=64, max_num_seqs=2, device="cpu", dtype=dtype)
            assert any(line.endswith(said) for line in told.info.attention)
