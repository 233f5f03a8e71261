"""Norms, rope, activation, routing and the experts, against torch written out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from aiter_naive import error
from aiter_standin import installed
from torch.nn import functional


@pytest.fixture(scope="module")
def aiter() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_norms(aiter: ModuleType) -> None:
    x, residual, weight = randn(5, 64), randn(5, 64, seed=1), randn(64, seed=2)
    for norm in (aiter.rms_norm, aiter.rmsnorm2d_fwd):
        assert error(norm(x, weight, 1e-6), functional.rms_norm(x.double(), (64,), weight.double(), 1e-6)) < 5e-3
    out, total = torch.empty_like(x), torch.empty_like(x)
    aiter.rmsnorm2d_fwd_with_add(out, x, residual, total, weight, 1e-6)
    assert error(total, x.double() + residual.double()) < 5e-3
    assert error(out, functional.rms_norm(x.double() + residual.double(), (64,), weight.double(), 1e-6)) < 5e-3
    with pytest.raises(AssertionError, match="weight dtype must match"):
        aiter.rms_norm(x, weight.float(), 1e-6)


def test_silu_and_mul_writes_its_first_argument(aiter: ModuleType) -> None:
    x, out = randn(5, 64), torch.empty(5, 32).bfloat16()
    aiter.silu_and_mul(out, x)
    assert error(out, functional.silu(x[:, :32].double()) * x[:, 32:].double()) < 5e-3
    with pytest.raises(AssertionError, match="out must have shape"):
        aiter.silu_and_mul(x, out)
    with pytest.raises(RuntimeError, match="must match input type"):
        aiter.silu_and_mul(out.float(), x)


@pytest.mark.parametrize("style", [0, 1])
@pytest.mark.parametrize("nope_first", [True, False])
def test_rope_of_part_of_a_head(aiter: ModuleType, style: int, nope_first: bool) -> None:
    x, positions = randn(6, 1, 4, 96), torch.arange(6)[:, None] * 2
    angles = torch.arange(20)[:, None] / torch.arange(1, 33)
    cos, sin = (t.view(20, 1, 1, 32) for t in (angles.cos(), angles.sin()))
    first, second = aiter.rope_cached_positions_2c_fwd(x, x[:, :, :1], cos, sin, positions, style, True, nope_first)
    kept, turned = (slice(0, 32), slice(32, 96)) if nope_first else (slice(64, 96), slice(0, 64))
    part = x[..., turned].double()
    pairs = (part[..., :32], part[..., 32:]) if style == 0 else (part[..., ::2], part[..., 1::2])
    phase = torch.polar(torch.ones(()).double(), angles.double())[positions][:, :, None]
    product = torch.complex(*pairs) * phase
    joined = (
        torch.cat([product.real, product.imag], -1)
        if style == 0
        else torch.stack([product.real, product.imag], -1).flatten(-2)
    )
    assert error(first[..., turned], joined) < 5e-3 and torch.equal(first[..., kept], x[..., kept])
    assert torch.equal(second, first[:, :, :1])
    aiter.rope_cached_positions_2c_fwd_inplace(x, x[:, :, :1].clone(), cos, sin, positions, style, True, nope_first)
    assert torch.equal(x, first)
    with pytest.raises(aiter._standin.ContractViolation, match="outside cos and sin"):
        aiter.rope_cached_positions_fwd(x, cos, sin, positions + 15, style, True, nope_first)


def routed(
    function: Callable[..., None], gates: torch.Tensor, topk: int, *rest: Any
) -> dict[int, list[tuple[int, float]]]:
    """Row -> [(expert, weight)], sorted."""
    weights, ids = torch.empty(len(gates), topk), torch.empty(len(gates), topk, dtype=torch.int32)
    function(gates, weights, ids, *rest)
    pairs = (zip(i, w, strict=True) for i, w in zip(ids.tolist(), weights.tolist(), strict=True))
    return {row: sorted(pair) for row, pair in enumerate(pairs)}


@pytest.mark.parametrize("renorm", [True, False])
def test_routing_row_by_row(aiter: ModuleType, renorm: bool) -> None:
    gates, bias = randn(7, 32).float(), randn(32, seed=1).float()

    def softmax(g: torch.Tensor, w: torch.Tensor, i: torch.Tensor) -> None:
        aiter.topk_softmax(w, i, torch.empty_like(i), g, renorm)

    def biased(g: torch.Tensor, w: torch.Tensor, i: torch.Tensor) -> None:
        aiter.biased_grouped_topk(g, bias, w, i, 4, 2, renorm, 2.5)

    def grouped(g: torch.Tensor, w: torch.Tensor, i: torch.Tensor) -> None:
        aiter.grouped_topk(g, w, i, 4, 2, renorm, True, 2.5)

    for function, members, factor in ((softmax, 0, 1.0), (biased, 2, 2.5), (grouped, 1, 2.5)):
        got = routed(function, gates, 6)
        for row, logits in enumerate(gates):
            scores = logits.sigmoid() if function is biased else logits.softmax(0)
            choice = scores + bias if function is biased else scores
            experts = list(range(32))
            if members:
                ranked = sorted(range(4), key=lambda g: -choice[g * 8 : g * 8 + 8].sort().values[-members:].sum())
                experts = [e for e in experts if e // 8 in ranked[:2]]
            chosen = sorted(experts, key=lambda e: -float(choice[e]))[:6]
            total = sum(float(scores[e]) for e in chosen) if renorm else 1.0
            expected = sorted((e, float(scores[e]) / total * factor) for e in chosen)
            assert [e for e, _ in got[row]] == [e for e, _ in expected]
            assert [w for _, w in got[row]] == pytest.approx([w for _, w in expected], rel=1e-4)


def test_routing_refusals(aiter: ModuleType) -> None:
    gates, weights, ids = randn(7, 30), torch.empty(7, 6), torch.empty(7, 6, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="Unsupported num_expert_group: 3"):
        aiter.grouped_topk(gates, weights, ids, 3, 1, True)
    with pytest.raises(RuntimeError, match="topk_grp must be in"):
        aiter.grouped_topk(gates, weights, ids, 2, 3, True)
    with pytest.raises(aiter._standin.ContractViolation, match=r"correction_bias must be torch.bfloat16"):
        aiter.biased_grouped_topk(gates, torch.zeros(30), weights, ids, 2, 1, True)
    with pytest.raises(aiter._standin.ContractViolation, match=r"topk_ids must be torch.int32"):
        aiter.grouped_topk(gates, weights, ids.long(), 2, 1, True)


def experts(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros(x.shape[0], w2.shape[1], dtype=torch.float64)
    for row in range(x.shape[0]):
        for weight, expert in zip(weights[row].tolist(), ids[row].tolist(), strict=True):
            gate, up = (w1[expert].double() @ x[row].double()).chunk(2)
            out[row] += weight * (w2[expert].double() @ (functional.silu(gate) * up))
    return out


def test_fused_moe(aiter: ModuleType) -> None:
    from aiter.fused_moe import fused_moe
    from aiter.ops.shuffle import shuffle_weight

    x, w1, w2 = randn(5, 64), randn(6, 64, 64, seed=1), randn(6, 64, 32, seed=2)
    ids = torch.tensor([[0, 3], [1, 5], [3, 4], [2, 0], [5, 4]], dtype=torch.int32)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(3))
    first, second = shuffle_weight(w1), shuffle_weight(w2)
    assert first.is_shuffled and not torch.equal(first, w1)
    assert torch.equal(first[0, 0, :16], torch.cat([w1[0, 0, :8], w1[0, 1, :8]]))  # rows of 16 bytes interleave
    assert error(fused_moe(x, first, second, weights, ids), experts(x, w1, w2, weights, ids)) < 5e-3
    mask = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.int32)
    own = [shuffle_weight(w[mask.bool()]) for w in (w1, w2)]
    local = experts(x, w1, w2, weights * mask[ids.long()], ids)
    assert error(fused_moe(x, *own, weights, ids, expert_mask=mask), local) < 5e-3
    for lost in ((torch.nn.Parameter(first), second), (w1, second)):
        with pytest.raises(aiter._standin.ContractViolation, match="shuffle_weight, or lost its mark"):
            fused_moe(x, *lost, weights, ids)
    with pytest.raises(aiter._standin.ContractViolation, match="an unknown expert"):
        fused_moe(x, first, second, weights, ids + 1)


@pytest.mark.parametrize("kind", ["per_128x128", "per_Token"])
def test_fused_moe_quantised(aiter: ModuleType, kind: str) -> None:
    from aiter.fused_moe import fused_moe
    from aiter.ops.shuffle import shuffle_weight

    x, fp8 = randn(5, 192), aiter.dtypes.fp8
    ids, weights = torch.tensor([[0, 1]] * 5, dtype=torch.int32), torch.full((5, 2), 0.5)
    codes = [randn(2, 256, 192, seed=1).to(fp8), randn(2, 192, 128, seed=2).to(fp8)]
    shapes = [(2, 2, 2), (2, 2, 1)] if kind == "per_128x128" else [(2, 256, 1), (2, 192, 1)]
    scales = [torch.rand(shape, generator=torch.Generator().manual_seed(4)) for shape in shapes]
    full = []
    for code, scale in zip(codes, scales, strict=True):
        row, column = (torch.arange(n) // 128 for n in code.shape[1:])
        full.append(code.double() * (scale[:, row][:, :, column] if kind == "per_128x128" else scale))
    call = {"quant_type": aiter.QuantType[kind], "w1_scale": scales[0], "w2_scale": scales[1]}
    got = fused_moe(x, *map(shuffle_weight, codes), weights, ids, **call)
    assert error(got, experts(x, *full, weights, ids)) < 6e-2, "what is multiplied is rounded too"
    with pytest.raises(aiter._standin.ContractViolation, match="weight scale must have shape"):
        fused_moe(x, *map(shuffle_weight, codes), weights, ids, **(call | {"w1_scale": scales[1]}))


def test_gemm_a8w8_blockscale(aiter: ModuleType) -> None:
    fp8 = aiter.dtypes.fp8
    x, w = randn(5, 256).to(fp8), randn(200, 256, seed=1).to(fp8)
    x_scale, w_scale = torch.rand(5, 2) + 0.1, torch.rand(2, 2) + 0.1
    wide = w.double() * w_scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)
    want = x.double() * x_scale.repeat_interleave(128, 1) @ wide.T
    assert error(aiter.gemm_a8w8_blockscale(x, w, x_scale, w_scale), want) < 5e-3
    other = torch.float8_e4m3fn if fp8 == torch.float8_e4m3fnuz else torch.float8_e4m3fnuz
    for wrong in (
        (x.view(other), w, x_scale, w_scale),
        (x, w, x_scale.T.contiguous().T, w_scale),
        (x, w, x_scale, torch.rand(4, 2)),
        (x[:, :192].contiguous(), w[:, :192].contiguous(), x_scale, w_scale),
    ):
        with pytest.raises(aiter._standin.ContractViolation):
            aiter.gemm_a8w8_blockscale(*wrong)
    with pytest.raises(AssertionError, match="not supported"):
        aiter.gemm_a8w8_blockscale(x, w, x_scale, w_scale, dtype=torch.float32)
