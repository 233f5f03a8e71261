"""Attention over parts, merged, is attention over the whole."""

from __future__ import annotations

import torch

from miniserve.attention.backends.gathered import merge_lse


def part(scores: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """scores [heads, tokens, keys], values [heads, keys, dim] -> out [tokens, heads, dim], lse [heads, tokens]."""
    return torch.einsum("htk,hkd->thd", scores.softmax(-1), values), scores.logsumexp(-1)


def test_three_parts_are_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 40, generator=generator) * 20
    values = torch.randn(3, 40, 8, generator=generator)
    out, lse = part(scores[..., :3], values[:, :3])
    for span in (slice(3, 30), slice(30, 40)):
        out, lse = merge_lse(out, lse, *part(scores[..., span], values[:, span]))
    want_out, want_lse = part(scores, values)
    assert torch.allclose(out, want_out, atol=1e-5)
    assert torch.allclose(lse, want_lse, atol=1e-5)


def test_a_part_without_keys_adds_nothing_whatever_it_holds() -> None:
    generator = torch.Generator().manual_seed(0)
    out, lse = part(torch.randn(2, 4, 6, generator=generator), torch.randn(2, 6, 8, generator=generator))
    nothing = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    for merged in (merge_lse(out, lse, *nothing), merge_lse(*nothing, out, lse)):
        assert torch.equal(merged[0], out)
        assert torch.equal(merged[1], lse)
    empty, minus_infinity = merge_lse(*nothing, *nothing)
    assert torch.equal(empty, torch.zeros_like(out))
    assert bool((minus_infinity == float("-inf")).all())


def test_the_result_is_in_float32() -> None:
    half = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    out, lse = merge_lse(half, torch.zeros(1, 1), half, torch.zeros(1, 1))
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert torch.allclose(out, torch.ones(1, 1, 2))
