"""Addition, norm, router and choice in one launch, beside the launches that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import DEVICE, DTYPES, NATIVE, every_other, normal, relative_error

from miniserve.kernels.triton import elementwise, norm_router, routing
from miniserve.kernels.triton.small_linear import Workspace

NORMED = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SOFTMAX = {"num_groups": 1, "top_groups": 1, "sigmoid": False, "normalize": True, "scaling": 1.0}
GROUPED = {"num_groups": 8, "top_groups": 4, "sigmoid": True, "normalize": True, "scaling": 2.5}


def assert_as_apart(
    tokens: int, experts: int, hidden: int, dtype: torch.dtype, *, top_k: int, biased: bool, again: bool = NATIVE,
    **choice: Any,
) -> None:  # fmt: skip
    """Normed x and stream are those of the norm's own kernel; the choice is `route`'s for float64 logits of that x.
    again: twice, of which the second finds the counters as the first left them."""
    x, residual = normal(0, tokens, hidden, dtype=dtype), normal(1, tokens, hidden, dtype=dtype)
    norm = (1 + normal(2, hidden) / 5).to(dtype)
    weight, bias = normal(3, experts, hidden) / hidden**0.5, normal(4, experts) if biased else None
    before, workspace = residual.clone(), Workspace(DEVICE)
    total = residual.clone()
    want = elementwise.add_rms_norm(x, total, norm, 1e-6)
    for _ in range(1 + again):
        normed, added, weights, ids = norm_router.add_norm_route(
            x, residual, norm, 1e-6, weight, bias, workspace=workspace, top_k=top_k, **choice
        )
        assert torch.equal(added, total)
        assert torch.equal(residual, before)
        assert relative_error(normed, want) < NORMED[dtype]
        logits = (normed.double() @ weight.double().T).float()
        expected = routing.route(logits[None], bias, top_k=top_k, **choice)
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(weights, expected[0], rtol=1e-4, atol=0)
    assert not workspace.counts.any()


@every_other("tokens,dtype", norm_router.FUSED_TOKENS, DTYPES)
def test_every_number_of_tokens(tokens: int, dtype: torch.dtype) -> None:
    experts, hidden = (128, 2048) if NATIVE else (20, 264)  # the interpreter takes seconds for what is large
    again = NATIVE or dtype == torch.float32
    assert_as_apart(tokens, experts, hidden, dtype, top_k=8, biased=False, again=again, **SOFTMAX)


# Of a GPU all pairs; the interpreter takes seconds for what is large.
PAIRS = [(experts, hidden) for experts in (60, 64, 256) for hidden in (96, 2112, 4096)]


@pytest.mark.parametrize(("experts", "hidden"), PAIRS if NATIVE else [(60, 96), (256, 96), (12, 2112), (8, 4096)])
def test_every_size(experts: int, hidden: int) -> None:
    assert_as_apart(2, experts, hidden, torch.float16, top_k=6, biased=False, **SOFTMAX | {"normalize": False})


@every_other("size,biased,dtype", [(16, 96), (256, 1000 if NATIVE else 72)], [False, True], DTYPES)
def test_groups_and_corrected_scores(size: tuple[int, int], biased: bool, dtype: torch.dtype) -> None:
    experts, hidden = size
    tokens = 3 if NATIVE or experts == 16 else 1
    assert_as_apart(tokens, experts, hidden, dtype, top_k=8, biased=biased, **GROUPED)


def test_a_token_that_is_not_a_number_still_gets_different_experts_that_exist() -> None:
    x = torch.full((2, 96), torch.nan, device=DEVICE)
    *_, ids = norm_router.add_norm_route(
        x, x, normal(0, 96), 1e-6, normal(1, 60, 96), None, workspace=Workspace(DEVICE), top_k=8, **SOFTMAX
    )
    assert ((ids >= 0) & (ids < 60)).all()
    assert all(len(row.unique()) == 8 for row in ids)
