"""Filters and draws against a plain float64 reference, against transformers, and as distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import check_counts, check_inverse_cdf, reference_distribution
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from miniserve.kernels import native, sampling
from miniserve.kernels.sampling import NUM_COLUMNS, Draw, RowParams, uniform
from miniserve.runner.logprobs import largest

torch.set_num_threads(1)

KERNELS = None if native.unavailable_reason() else native.NativeKernels(1)
WAYS = pytest.mark.parametrize(
    "draw",
    [
        pytest.param(sampling.draw, id="torch"),
        pytest.param(
            KERNELS and KERNELS.draw, id="native", marks=pytest.mark.skipif(KERNELS is None, reason="no C++ compiler")
        ),
    ],
)


def row_params(num_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, first_key=0):
    numbers = torch.zeros(num_rows, NUM_COLUMNS)
    numbers[:, :4] = torch.tensor([temperature, top_k, top_p, min_p])
    keys = torch.arange(first_key, first_key + num_rows) * 7919
    return RowParams(keys, torch.zeros_like(keys), numbers)


def draws(draw: Draw, logits, num_rows, position=0, **options):
    """Tokens of `num_rows` rows with the same logits and keys of their own."""
    rows = torch.arange(num_rows)
    return draw(logits.repeat(num_rows, 1), rows, row_params(num_rows, **options), torch.full_like(rows, position))


# Away from round numbers: at 0.5 of two equal tokens the last bit of a sum would decide.
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.31, 0.7, 1.0, 1.9, 40.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 7, 40]),
        "top_p": st.sampled_from([1.0, 0.9173, 0.6151, 0.2237, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.0, 0.013, 0.293]),
    }
)


@WAYS
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=SETTINGS, vocab_size=st.sampled_from([41, 127, 128, 129, 300, 1000, 9000]), seed=st.integers(0, 2**31 - 1)
)
def test_a_token_is_the_inverse_cdf_of_what_the_filters_leave(draw, options, vocab_size, seed):
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=vocab_size) * 3).astype(np.float32)
    logits[generator.integers(0, vocab_size, vocab_size // 3)] = -np.inf
    expected = reference_distribution(logits, **options)
    tokens = draws(draw, torch.from_numpy(logits), 8, position=3, first_key=seed, **options).tolist()
    numbers = uniform(row_params(8, first_key=seed).keys, torch.full((8,), 3)).tolist()
    for token, number in zip(tokens, numbers, strict=True):
        check_inverse_cdf(token, number, expected)


@WAYS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_real_vocabulary_full_of_equals(draw, dtype):
    logits = (torch.randn(151936, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    for options in ({}, {"top_k": 50}, {"top_k": 5000, "top_p": 0.9}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_p": 0.3}):
        expected = reference_distribution(logits.float().numpy(), **options)
        numbers = uniform(row_params(3).keys, torch.zeros(3).long()).tolist()
        for token, number in zip(draws(draw, logits, 3, **options).tolist(), numbers, strict=True):
            check_inverse_cdf(token, number, expected)


@WAYS
@pytest.mark.parametrize("vocab_size", [24, 700])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.9},
        {"top_p": 0.11},
        {"min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(draw, options, vocab_size):
    logits = torch.from_numpy((np.random.default_rng(5).normal(size=vocab_size) * 2).astype(np.float32))
    counts = np.zeros(vocab_size)
    for part in range(5):
        tokens = draws(draw, logits, 2000, position=part, first_key=part * 2000, **options)
        counts += np.bincount(tokens.numpy(), minlength=vocab_size)
    check_counts(counts, reference_distribution(logits.numpy(), **options))


@WAYS
@pytest.mark.parametrize("vocab_size", [50, 4000])
@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 13}, TopKLogitsWarper(13)),
        ({"top_p": 0.83}, TopPLogitsWarper(0.83)),
        ({"min_p": 0.07}, MinPLogitsWarper(0.07)),
    ],
)
def test_same_tokens_remain_as_in_transformers(draw, options, warper, vocab_size):
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(2)) * 1.5
    remaining = warper(None, logits.clone()).softmax(-1)[0]
    drawn = set(draws(draw, logits, 4000, **options).tolist())
    assert drawn <= set(remaining.nonzero().flatten().tolist())
    assert set((remaining > 0.005).nonzero().flatten().tolist()) <= drawn
    assert len(drawn) > 3


@WAYS
def test_top_k_takes_exactly_k_of_equal_tokens_and_top_p_all(draw):
    logits = torch.zeros(300)
    assert set(draws(draw, logits, 500, top_k=4).tolist()) == {0, 1, 2, 3}
    logits[[7, 8, 9, 200]] = 5.0
    for top_k in (0, 50):
        assert set(draws(draw, logits, 500, top_k=top_k, top_p=0.3).tolist()) == {7, 8, 9, 200}
    assert set(draws(draw, logits, 500, top_k=3, top_p=0.3).tolist()) == {7, 8, 9}


@WAYS
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}])
def test_a_masked_token_is_never_drawn(draw, options):
    logits = torch.full((700,), float("-inf"))
    logits[[1, 300, 698]] = torch.tensor([0.0, -1.0, 0.5])
    assert set(draws(draw, logits, 2000, **options).tolist()) <= {1, 300, 698}


@WAYS
def test_extreme_temperatures_and_logits_stay_in_range(draw):
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0], [1e-30, 2e-30, -1e-30, 0.0], [5.0, 5.0, -50.0, 1.0]])
    rows = torch.arange(3)
    for temperature in (1e-5, 1.0, 100.0):
        drawn = draw(logits, rows, row_params(3, temperature), torch.zeros(3).long())
        assert drawn[0] == 0
        assert temperature > 1e-4 or drawn[2] in (0, 1)
    for fill in (float("-inf"), float("nan"), float("inf")):
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}):
            assert 0 <= draws(draw, torch.full((5,), fill), 1, **options).item() < 5


@WAYS
def test_rows_may_repeat_and_keep_their_keys_and_positions(draw):
    params, logits = row_params(3), torch.zeros(6, 500)
    rows, positions = torch.tensor([1, 0, 1, 1, 2, 1]), torch.tensor([0, 5, 1, 2, 6, 0])
    together = draw(logits, rows, params, positions).tolist()
    assert together[0] == together[5] and len(set(together)) == 5
    alone = [draw(logits[:1], rows[i : i + 1], params, positions[i : i + 1]).item() for i in range(6)]
    assert alone == together


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    vocab_size=st.sampled_from([1, 5, 127, 128, 129, 1000, 8192]),
    levels=st.sampled_from([1, 2, 10, 100000]),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_largest_are_ordered_and_equals_by_index(vocab_size, levels, k, seed):
    generator = np.random.default_rng(seed)
    rows = (generator.integers(0, levels, (3, vocab_size)) - levels // 2).astype(np.float32)
    rows[(rows == 0) & (generator.random(rows.shape) < 0.5)] = -0.0  # equal to the other zeros
    rows[generator.random(rows.shape) < 0.2] = -np.inf
    k = min(k, vocab_size)
    expected = np.argsort(-rows, axis=1, kind="stable")
    values, index = largest(torch.from_numpy(rows), k)
    np.testing.assert_array_equal(index.numpy(), expected[:, :k])
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(rows, expected[:, :k], 1))


def test_largest_of_a_real_vocabulary():
    rows = torch.randn(3, 151936, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # full of equals
    expected = rows.sort(dim=-1, descending=True, stable=True)
    for k in (1, 20, 700):
        values, index = largest(rows, k)
        assert torch.equal(values, expected.values[:, :k])
        assert torch.equal(index, expected.indices[:, :k])
