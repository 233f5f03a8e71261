"""The choice of experts in Triton beside PyTorch's: from logits, and from hidden states with the router's weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import DEVICE, DTYPES, every_other, normal, on_gpu, relative_error

from miniserve.kernels.triton import routing as triton_routing
from miniserve.models.description import MoEConfig
from miniserve.models.layers import routing

Case = tuple[str, int, int, bool, int, int]
CASES: list[Case] = [
    ("softmax", 1, 1, False, 12, 4),
    ("softmax", 4, 2, False, 16, 4),
    ("sigmoid", 4, 2, True, 16, 4),
    ("sigmoid", 1, 1, True, 5, 2),
]
cases = pytest.mark.parametrize(("scoring", "groups", "top_groups", "bias", "experts", "k"), CASES)


def setting(
    scoring: str, groups: int, top_groups: int, bias: bool, experts: int, k: int, normalize: bool
) -> tuple[MoEConfig, torch.Tensor | None, dict[str, Any]]:
    """The choice as PyTorch's function takes it, the correction of scores, and the choice as the kernels' does."""
    shared = {"top_k": k, "num_groups": groups, "top_groups": top_groups, "normalize": normalize, "scaling": 2.5}
    config = MoEConfig(
        num_experts=experts,
        intermediate_size=8,
        shared_size=0,
        sparse_layers=(True,),
        scoring=scoring,
        correction_bias=bias,
        **shared,
    )
    return config, normal(9, experts) if bias else None, {**shared, "sigmoid": scoring == "sigmoid"}


def assert_same(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor], experts: int) -> None:
    """Of each token's experts and weights; their order does not matter."""
    rows = [torch.zeros(len(ids), experts, device=DEVICE).scatter_(1, ids.long(), w) for w, ids in (got, want)]
    assert relative_error(*rows) < 1e-5


@cases
@pytest.mark.parametrize("normalize", [False, True])
def test_from_logits(
    scoring: str, groups: int, top_groups: int, bias: bool, experts: int, k: int, normalize: bool
) -> None:
    config, correction, choice = setting(scoring, groups, top_groups, bias, experts, k, normalize)
    logits = normal(0, 9, experts)
    got = triton_routing.route(logits[None], correction, **choice)
    assert_same(got, routing.route(logits, config, correction), experts)


@every_other("case,size,dtype", CASES, [(1, 300), (16, 300), (37, 300), (37, 2112), (257, 136)], DTYPES)
def test_from_hidden_states(case: Case, size: tuple[int, int], dtype: torch.dtype) -> None:
    config, correction, choice = setting(*case, normalize=True)
    (tokens, hidden), experts = size, config.num_experts
    x, weight = normal(0, tokens, hidden, dtype=dtype), normal(1, experts, hidden) / 17
    want = routing.route(x.double() @ weight.double().T, config, correction)
    got = triton_routing.route(triton_routing.logit_parts(x, weight), correction, **choice)
    assert_same(got, (want[0].float(), want[1]), experts)


def test_many_tokens_are_multiplied_by_the_matrix_units_where_those_are_exact() -> None:
    for tokens, bfloat16, float16 in ((16, False, False), (17, True, True), (256, True, True), (257, True, False)):
        assert triton_routing.has_parts(normal(0, tokens, 1, dtype=torch.bfloat16)) is bfloat16
        assert triton_routing.has_parts(normal(0, tokens, 1, dtype=torch.float16)) is float16


# Hidden sizes and choices of Qwen3-30B-A3B, DeepSeek-V2-Lite and DeepSeek-V3.
_SIZES: list[tuple[int, Case]] = [
    (2048, ("softmax", 1, 1, False, 128, 8)),
    (2048, ("softmax", 1, 1, False, 64, 6)),
    (7168, ("sigmoid", 8, 4, True, 256, 8)),
]


@pytest.mark.parametrize("tokens", [17, 256, 257, 1000, 4096, 8192])
@pytest.mark.parametrize(("hidden", "case"), _SIZES)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=on_gpu)])
def test_many_tokens_get_the_experts_that_float64_chooses(
    hidden: int, case: Case, tokens: int, dtype: torch.dtype
) -> None:
    """But where the last one chosen is as good as the first one not, within float32's rounding."""
    config, correction, choice = setting(*case, normalize=True)
    # Rows of a wider tensor, as padding would leave them.
    x = normal(0, tokens, hidden + 64, dtype=dtype)[:, :hidden]
    weight = normal(1, config.num_experts, hidden) / hidden**0.5
    exact = x.double() @ weight.double().T
    parts = triton_routing.logit_parts(x, weight)
    error = float((parts.sum(0) - exact).abs().max())
    print(f"logits of {tokens} x {hidden}: {error:.1e} off")
    assert error < 2e-5
    weights, ids = triton_routing.route(parts, correction, **choice)
    best, best_ids = routing.route(exact, config, correction)
    rows = [
        torch.zeros(tokens, config.num_experts, dtype=torch.float64, device=DEVICE).scatter_(1, which.long(), each)
        for each, which in ((weights.double(), ids), (best, best_ids))
    ]
    wrong = (rows[0] - rows[1]).abs().amax(1) > 1e-3 * config.scaling / config.top_k
    near = least_margin(exact, config, correction) < 4 * error
    assert not (wrong & ~near).any()
    assert int(near.sum()) <= max(2, tokens // 50)  # else the test would see nothing


def least_margin(logits: torch.Tensor, config: MoEConfig, correction: torch.Tensor | None) -> torch.Tensor:
    """How much better than the best of the rest the last one chosen is, of groups or of experts, [T]."""
    scores = logits.softmax(-1) if config.scoring == "softmax" else logits.sigmoid()
    choice = scores if correction is None else scores + correction
    margin = torch.full_like(choice[:, 0], torch.inf)
    if config.top_groups < config.num_groups:
        groups = choice.unflatten(-1, (config.num_groups, -1))
        worth = groups.topk(1 if correction is None else 2, dim=-1).values.sum(-1)
        best = worth.topk(config.top_groups + 1, dim=-1)
        margin = best.values[:, -2] - best.values[:, -1]
        closed = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best.indices[:, :-1], False)
        choice = groups.masked_fill(closed[..., None], float("-inf")).flatten(1)
    best = choice.topk(config.top_k + 1, dim=-1)
    return torch.minimum(margin, (best.values[:, -2] - best.values[:, -1]) / best.values[:, -2].abs())


@pytest.mark.parametrize("biased", [False, True])
def test_a_token_that_is_not_a_number_still_gets_different_experts_that_exist(biased: bool) -> None:
    """Also one with all bits set, which as an integer is the lowest there is."""
    _, _, choice = setting("sigmoid" if biased else "softmax", 1, 1, biased, 12, 4, True)
    bias = torch.full((12,), -1, dtype=torch.int32, device=DEVICE).view(torch.float32) if biased else None
    logits = torch.full((2, 12), 0.0 if biased else torch.nan, device=DEVICE)
    _, ids = triton_routing.route(logits[None], bias, **choice)
    assert ((ids >= 0) & (ids < 12)).all()
    assert all(len(row.unique()) == 4 for row in ids)
