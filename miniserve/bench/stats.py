"""Summaries of samples: mean, median and the tail."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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
    median, p90, p99 = np.percentile(samples, (50, 90, 99)).tolist()
    mean = math.fsum(samples) / len(samples)
    return Summary(len(samples), mean, median, p90, p99, min=min(samples), max=max(samples))
