from __future__ import annotations

import itertools

import numpy as np
import pytest

from miniserve.bench.decode_steps import DecodeSteps
from miniserve.bench.stats import summarize
from miniserve.bench.workload import WORDS, Shape, poisson_arrivals, text_samples, token_samples
from miniserve.core import StepTotals, UserError


def test_summary_of_known_samples() -> None:
    summary = summarize([float(value) for value in range(100, -1, -1)])
    assert summary is not None
    assert (summary.count, summary.mean, summary.median) == (101, 50.0, 50.0)
    assert (summary.p90, summary.p99, summary.min, summary.max) == (90.0, 99.0, 0.0, 100.0)


def test_no_samples() -> None:
    assert summarize([]) is None


def test_prompts_have_the_lengths_asked_for_and_come_from_the_seed() -> None:
    shape = Shape(input_len=40, output_len=10, range_ratio=0.5)
    samples = token_samples(300, shape, range(1000), seed=3)
    assert {len(sample.prompt) for sample in samples} == set(range(20, 61))
    assert {sample.output_len for sample in samples} == set(range(5, 16))
    assert all(0 <= token < 1000 for sample in samples for token in sample.prompt)
    assert samples == token_samples(300, shape, range(1000), seed=3)
    assert samples != token_samples(300, shape, range(1000), seed=4)
    fixed = token_samples(5, Shape(input_len=40, output_len=10), range(1000), seed=3)
    assert {(len(sample.prompt), sample.output_len) for sample in fixed} == {(40, 10)}


def test_text_is_as_long_in_tokens_as_asked() -> None:
    (sample,) = text_samples(1, Shape(input_len=60, output_len=1), tokens_per_word=2.0, seed=0)
    assert isinstance(sample.prompt, str)
    assert len(sample.prompt.split()) == 30
    assert set(sample.prompt.split()) <= set(WORDS)


def test_arrivals_have_the_rate_asked_for() -> None:
    arrivals = list(itertools.islice(poisson_arrivals(50.0, seed=1), 5001))
    gaps = np.diff(arrivals)
    assert arrivals[0] == 0.0
    assert abs(gaps.mean() * 50 - 1) < 0.05
    assert abs(gaps.std() * 50 - 1) < 0.05  # as wide as long: exponential


@pytest.mark.parametrize("wrong", [{"input_len": 0}, {"output_len": 0}, {"range_ratio": 1.0}, {"range_ratio": -0.1}])
def test_impossible_lengths_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Shape(**({"input_len": 4, "output_len": 4} | wrong))


def test_where_the_time_went() -> None:
    totals = StepTotals(decode_seconds=5.0, mixed_seconds=2.0, prefill_seconds=1.0)
    assert DecodeSteps(totals, None).shares(10.0) == pytest.approx(
        {"decode": 0.5, "mixed": 0.2, "prefill": 0.1, "waiting": 0.2}
    )
    # The device's clock may have seen a little more than the client's.
    assert DecodeSteps(totals, None).shares(7.9)["waiting"] == 0.0
