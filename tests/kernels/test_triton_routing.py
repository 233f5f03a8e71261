"""The choice of experts in Triton beside PyTorch's: from logits, and from hidden states with the router's weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import DEVICE, DTYPES, every_other, normal, relative_error

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


@every_other("case,size,dtype", CASES, [(1, 300), (16, 300), (37, 300), (37, 2112)], DTYPES)
def test_from_hidden_states(case: Case, size: tuple[int, int], dtype: torch.dtype) -> None:
    config, correction, choice = setting(*case, normalize=True)
    (tokens, hidden), experts = size, config.num_experts
    x, weight = normal(0, tokens, hidden, dtype=dtype), normal(1, experts, hidden) / 17
    want = routing.route(x.double() @ weight.double().T, config, correction)
    got = triton_routing.route(triton_routing.logit_parts(x, weight), correction, **choice)
    assert_same(got, (want[0].float(), want[1]), experts)


@pytest.mark.parametrize("biased", [False, True])
def test_a_token_that_is_not_a_number_still_gets_different_experts_that_exist(biased: bool) -> None:
    """Also one with all bits set, which as an integer is the lowest there is."""
    _, _, choice = setting("sigmoid" if biased else "softmax", 1, 1, biased, 12, 4, True)
    bias = torch.full((12,), -1, dtype=torch.int32, device=DEVICE).view(torch.float32) if biased else None
    logits = torch.full((2, 12), 0.0 if biased else torch.nan, device=DEVICE)
    _, ids = triton_routing.route(logits[None], bias, **choice)
    assert ((ids >= 0) & (ids < 12)).all()
    assert all(len(row.unique()) == 4 for row in ids)
