"""Summaries of samples: mean, median and the tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Summary:
    """Of `count` samples, all in one unit. Percentiles interpolate linearly between the two nearest samples."""

    count: int
    mean: float
    median: float
    p90: float
    p99: float
    min: float
    max: float


def percentile(ordered: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 ≤ q ≤ 100, of ascending samples: linear interpolation at rank q/100·(n-1), as numpy does.

    Raises `ValueError` where there are no samples or q is out of range.
    """
    if not ordered or not 0.0 <= q <= 100.0:
        raise ValueError(f"no {q}th percentile of {len(ordered)} samples")
    rank = q / 100.0 * (len(ordered) - 1)
    low = math.floor(rank)
    high = math.ceil(rank)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def rates(seconds: float, requests: int, input_tokens: int, output_tokens: int) -> dict[str, float]:
    """Requests and tokens a second."""
    return {
        "requests_per_s": requests / seconds,
        "input_tokens_per_s": input_tokens / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "total_tokens_per_s": (input_tokens + output_tokens) / seconds,
    }


def summarize(samples: Sequence[float]) -> Summary | None:
    """None where there is nothing to summarise (no TPOT exists when every request brought one token)."""
    if not samples:
        return None
    ordered = sorted(samples)
    return Summary(
        count=len(ordered),
        mean=math.fsum(ordered) / len(ordered),
        median=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        min=ordered[0],
        max=ordered[-1],
    )
