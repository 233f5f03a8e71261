"""Filters and draws against a plain float64 reference, against transformers, and as distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import check_counts, check_inverse_cdf, reference_distribution
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from miniserve.runner import sampling_blocks
from miniserve.runner.sampling_draw import DrawParams, draw
from miniserve.runner.sampling_random import NUMBERS_PER_POSITION, uniform

torch.set_num_threads(1)


def draw_params(num_rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, first_key=0):
    def column(value, dtype):
        return torch.full((num_rows, 1), value, dtype=dtype)

    return DrawParams(
        keys=torch.arange(first_key, first_key + num_rows) * 7919,
        temperature=column(temperature, torch.float32),
        top_k=column(top_k, torch.int64),
        top_p=column(top_p, torch.float64),
        min_p=column(min_p, torch.float32),
        max_top_k=top_k,
        any_top_p=top_p < 1.0,
        any_min_p=min_p > 0.0,
    )


# Away from round numbers: at 0.5 of two equal tokens the last bit of a sum would decide.
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.31, 0.7, 1.0, 1.9, 40.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 7, 40]),
        "top_p": st.sampled_from([1.0, 0.9173, 0.6151, 0.2237, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.0, 0.013, 0.293]),
    }
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    options=SETTINGS, vocab_size=st.sampled_from([41, 127, 128, 129, 300, 1000, 9000]), seed=st.integers(0, 2**31 - 1)
)
def test_only_tokens_that_the_filters_leave_are_drawn(options, vocab_size, seed):
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=vocab_size) * 3).astype(np.float32)
    logits[generator.integers(0, vocab_size, vocab_size // 3)] = -np.inf
    expected = reference_distribution(logits, **options)
    num_rows = 64
    rows = torch.from_numpy(logits).repeat(num_rows, 1)
    drawn = draw(rows, torch.full((num_rows,), 3), draw_params(num_rows, **options, first_key=seed))
    assert (expected[drawn.numpy()] > 0).all()
    likely = set(np.flatnonzero(expected > 0.35))  # missing one in 64 draws: below 1e-12
    assert likely <= set(drawn.tolist())


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    temperature=st.sampled_from([0.31, 1.0, 1.9]),
    vocab_size=st.sampled_from([5, 128, 300, 9000]),
    seed=st.integers(0, 2**31 - 1),
)
def test_unfiltered_draw_is_the_inverse_cdf(temperature, vocab_size, seed):
    logits = (np.random.default_rng(seed).normal(size=(8, vocab_size)) * 3).astype(np.float32)
    params = draw_params(8, temperature, first_key=seed)
    positions = torch.arange(8)
    numbers = uniform(params.keys, positions).numpy()
    drawn = draw(torch.from_numpy(logits.copy()), positions, params).tolist()
    for row in range(8):
        check_inverse_cdf(drawn[row], numbers[row], reference_distribution(logits[row], temperature))


@pytest.mark.parametrize("vocab_size", [24, 700])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 5},
        {"top_p": 0.9},
        {"top_p": 0.5},
        {"top_p": 0.11},
        {"min_p": 0.1},
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.3, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_draws_follow_the_distribution(options, vocab_size):
    logits = (np.random.default_rng(5).normal(size=vocab_size) * 2).astype(np.float32)
    expected = reference_distribution(logits, **options)
    num_rows = 20000
    counts = np.zeros(vocab_size)
    for part in range(10):
        rows = torch.from_numpy(logits).repeat(num_rows // 10, 1)
        params = draw_params(num_rows // 10, **options, first_key=part * num_rows)
        counts += np.bincount(draw(rows, torch.full((len(rows),), part), params).numpy(), minlength=vocab_size)
    check_counts(counts, expected)


@pytest.mark.parametrize("vocab_size", [50, 4000])
@pytest.mark.parametrize(
    ("options", "warper"),
    [
        ({"top_k": 13}, TopKLogitsWarper(13)),
        ({"top_p": 0.83}, TopPLogitsWarper(0.83)),
        ({"min_p": 0.07}, MinPLogitsWarper(0.07)),
    ],
)
def test_same_tokens_remain_as_in_transformers(options, warper, vocab_size):
    logits = torch.randn(1, vocab_size, generator=torch.Generator().manual_seed(2)) * 1.5
    remaining = warper(None, logits.clone()).softmax(-1)[0]
    drawn = set(
        draw(logits.repeat(4000, 1), torch.zeros(4000, dtype=torch.int64), draw_params(4000, **options)).tolist()
    )
    assert drawn <= set(remaining.nonzero().flatten().tolist())
    assert set((remaining > 0.005).nonzero().flatten().tolist()) <= drawn
    assert len(drawn) > 3


def test_top_k_takes_exactly_k_of_equal_tokens_and_top_p_all():
    logits = torch.zeros(500, 300)
    positions = torch.zeros(500, dtype=torch.int64)
    assert set(draw(logits.clone(), positions, draw_params(500, top_k=4)).tolist()) == {0, 1, 2, 3}
    logits[:, 7:10] = 5.0
    logits[:, 200] = 5.0
    for top_k in (0, 50):
        drawn = draw(logits.clone(), positions, draw_params(500, top_k=top_k, top_p=0.3))
        assert set(drawn.tolist()) == {7, 8, 9, 200}


@pytest.mark.parametrize("top_k", [0, 3])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_masked_token_is_never_drawn_at_either_end_of_the_unit_interval(monkeypatch, top_k, top_p):
    logits = torch.full((3, 700), float("-inf"))
    logits[:, [1, 300, 698]] = torch.tensor([0.0, -1.0, 0.5])
    for number in (0.0, 1.0 - 2.0**-53):
        monkeypatch.setattr(
            "miniserve.runner.sampling_draw.uniform",
            lambda keys, positions, n=0, u=number: torch.full((len(keys),), u, dtype=torch.float64),
        )
        drawn = draw(logits.clone(), torch.zeros(3, dtype=torch.int64), draw_params(3, top_k=top_k, top_p=top_p))
        assert set(drawn.tolist()) <= {1, 300, 698}


def test_the_last_allowed_draw_of_a_tiny_nucleus_takes_the_best_token(monkeypatch):
    """Numbers that always point at the end make each rejection as small as can be."""
    monkeypatch.setattr(
        "miniserve.runner.sampling_draw.uniform",
        lambda keys, positions, n=0: torch.full((len(keys),), 1.0 - 2.0**-53, dtype=torch.float64),
    )
    logits = torch.linspace(1.0, 0.0, 500).repeat(2, 1)
    assert 2 * NUMBERS_PER_POSITION < 500
    assert draw(logits, torch.zeros(2, dtype=torch.int64), draw_params(2, top_p=1e-9)).tolist() == [0, 0]


def test_extreme_temperatures_and_logits_stay_in_range():
    logits = torch.tensor([[3e38, -3e38, 0.0, 1.0], [1e-30, 2e-30, -1e-30, 0.0], [5.0, 5.0, -50.0, 1.0]])
    for temperature in (1e-5, 1.0, 100.0):
        drawn = draw(logits.clone(), torch.zeros(3, dtype=torch.int64), draw_params(3, temperature))
        assert drawn[0] == 0
        assert temperature > 1e-4 or drawn[2] in (0, 1)
    everything_masked = torch.full((1, 5), float("-inf"))
    not_a_number = torch.full((1, 5), float("nan"))
    for broken in (everything_masked, not_a_number):
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
            token = draw(broken.clone(), torch.zeros(1, dtype=torch.int64), draw_params(1, **options)).item()
            assert 0 <= token < 5


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    vocab_size=st.sampled_from([1, 5, 127, 128, 129, 1000, 8192]),
    levels=st.sampled_from([1, 2, 10, 100000]),
    k=st.integers(1, 40),
    seed=st.integers(0, 2**31 - 1),
)
def test_largest_and_argmax_order_equals_by_index(vocab_size, levels, k, seed):
    generator = np.random.default_rng(seed)
    rows = (generator.integers(0, levels, (3, vocab_size)) - levels // 2).astype(np.float32)
    rows[(rows == 0) & (generator.random(rows.shape) < 0.5)] = -0.0  # equal to the other zeros
    rows[generator.random(rows.shape) < 0.2] = -np.inf
    k = min(k, vocab_size)
    expected = np.argsort(-rows, axis=1, kind="stable")
    values, index = sampling_blocks.largest(torch.from_numpy(rows), k)
    np.testing.assert_array_equal(index.numpy(), expected[:, :k])
    np.testing.assert_array_equal(values.numpy(), np.take_along_axis(rows, expected[:, :k], 1))
    np.testing.assert_array_equal(sampling_blocks.argmax(torch.from_numpy(rows)).numpy(), expected[:, 0])


def test_largest_and_argmax_of_a_real_vocabulary():
    rows = torch.randn(3, 151936, generator=torch.Generator().manual_seed(0)).bfloat16().float()  # full of equals
    expected = rows.sort(dim=-1, descending=True, stable=True)
    for k in (1, 20, 700):
        values, index = sampling_blocks.largest(rows, k)
        assert torch.equal(values, expected.values[:, :k])
        assert torch.equal(index, expected.indices[:, :k])
    assert torch.equal(sampling_blocks.argmax(rows), expected.indices[:, 0])
