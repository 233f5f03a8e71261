"""Routing and routed experts against their formulas, written out token by token."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from miniserve.kernels import native
from miniserve.models.description import MoEConfig
from miniserve.models.layers.experts import Experts, GroupedMoE, MoEMethod, choose_moe_method
from miniserve.models.layers.linear import PLAIN as PLAIN_WEIGHTS
from miniserve.models.layers.norm import Residual, RMSNorm
from miniserve.models.layers.ops import Ops
from miniserve.models.layers.routing import Router, route
from miniserve.parallel.group import Alone

torch.set_num_threads(1)
CPU = torch.device("cpu")
KERNELS = None if native.unavailable_reason() else native.NativeKernels()
PLAIN = MoEConfig(num_experts=12, top_k=3, intermediate_size=16, sparse_layers=(True,))


def by_hand(logits: list[float], moe: MoEConfig, bias: list[float]) -> dict[int, float]:
    """One token's experts and weights, from sorted lists."""
    row = torch.tensor(logits)
    scores = (row.softmax(0) if moe.scoring == "softmax" else row.sigmoid()).tolist()
    choice = [score + shift for score, shift in zip(scores, bias, strict=True)]
    size = moe.num_experts // moe.num_groups
    groups = [range(g * size, (g + 1) * size) for g in range(moe.num_groups)]
    best = 2 if moe.correction_bias else 1
    groups.sort(key=lambda group: -sum(sorted((choice[e] for e in group), reverse=True)[:best]))
    candidates = [e for group in groups[: moe.top_groups] for e in group]
    chosen = sorted(candidates, key=lambda e: -choice[e])[: moe.top_k]
    total = sum(scores[e] for e in chosen) if moe.normalize else 1.0
    return {e: scores[e] / total * moe.scaling for e in chosen}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("num_groups", "top_groups"), [(1, 1), (3, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("correction_bias", [False, True])
def test_routing_is_what_sorting_by_hand_gives(
    scoring: str, num_groups: int, top_groups: int, normalize: bool, correction_bias: bool
) -> None:
    moe = dataclasses.replace(
        PLAIN, scoring=scoring, num_groups=num_groups, top_groups=top_groups, normalize=normalize, scaling=2.5,
        correction_bias=correction_bias,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(num_groups)
    logits = torch.randn(40, 12, generator=generator)
    bias = torch.randn(12, generator=generator) * 0.5 if correction_bias else torch.zeros(12)
    weights, ids = route(logits, moe, bias if correction_bias else None)
    assert weights.dtype == torch.float32
    for row, found_ids, found_weights in zip(logits.tolist(), ids.tolist(), weights.tolist(), strict=True):
        expected = by_hand(row, moe, bias.tolist())
        assert sorted(found_ids) == sorted(expected)
        assert found_weights == pytest.approx([expected[e] for e in found_ids], rel=1e-5)


def test_a_bias_chooses_but_does_not_weigh() -> None:
    moe = dataclasses.replace(PLAIN, num_experts=4, top_k=1, scoring="sigmoid", correction_bias=True)
    weights, ids = route(torch.zeros(1, 4), moe, torch.tensor([0.0, -1.0, 3.0, 1.0]))
    assert ids.tolist() == [[2]]
    assert weights.tolist() == [[0.5]]


def test_experts_that_all_score_nothing_get_finite_weights() -> None:
    moe = dataclasses.replace(PLAIN, scoring="sigmoid", normalize=True)
    weights, _ = route(torch.full((2, 12), -300.0), moe, None)
    assert weights.isfinite().all()


def test_the_router_multiplies_in_float32_whatever_the_model_computes_in() -> None:
    router = Router(8, dataclasses.replace(PLAIN, num_experts=2, top_k=1), Ops())
    router.allocate(CPU)
    # The experts differ in the ninth bit, which bfloat16 does not have.
    router.weight.data.copy_(torch.stack([torch.full((8,), 1.0), torch.full((8,), 1.0 + 2**-9)]))
    norm = RMSNorm(8, 1e-6, torch.bfloat16, Ops(), Alone())
    norm.allocate(CPU)
    norm.weight.data.fill_(1.0)
    x = Residual(torch.ones(1, 8, dtype=torch.bfloat16)) + torch.ones(1, 8, dtype=torch.bfloat16)
    _, ids = router(norm(x))
    assert (x.stream == 2).all()
    assert ids.tolist() == [[1]]


def methods(dtype: torch.dtype) -> list[MoEMethod]:
    plain = GroupedMoE(PLAIN_WEIGHTS)
    chosen = [choose_moe_method(dtype, CPU, 64, 32, kernels) for kernels in (None, KERNELS)]
    return [plain, *chosen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 50])
def test_every_method_sums_each_tokens_experts(dtype: torch.dtype, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(num_tokens, 64, generator=generator).to(dtype)
    weights, ids = route(torch.randn(num_tokens, 12, generator=generator), PLAIN, None)
    for method in methods(dtype):
        layer = Experts(12, 64, 32, dtype=dtype, method=method)
        layer.allocate(CPU)
        layer.fill_dummy("layer", 4)
        w1, w2 = layer.w1.data.float() * 10, layer.w2.data.float() * 10
        layer.w1.data.mul_(10)
        layer.w2.data.mul_(10)
        expected = torch.zeros(num_tokens, 64)
        for token in range(num_tokens):
            for weight, expert in zip(weights[token], ids[token], strict=True):
                gate, up = (w1[expert] @ x[token].float()).chunk(2)
                expected[token] += weight * (w2[expert] @ (functional.silu(gate) * up))
        layer.finish()
        out = layer(x, weights, ids)
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)


def test_finishing_leaves_one_copy_of_the_weights() -> None:
    for method in methods(torch.float32):
        layer = Experts(3, 64, 32, dtype=torch.float32, method=method)
        layer.allocate(CPU)
        layer.finish()
        assert list(layer.parameters()) == []
