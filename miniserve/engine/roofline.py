"""How near decode steps come to the memory's limit: what a step must read, over what the memory can deliver. With ranks
the sums over them are the other part of a step's floor.

A decode step multiplies every weight with a few vectors and reads each row's cached context once, so the time to read
those bytes at the memory's own speed is its floor (Williams et al., "Roofline", 2009).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from miniserve.core import StepTotals, StepTraffic


def weight_bytes(traffic: StepTraffic, num_tokens: int) -> int:
    """Bytes of weights that a step of `num_tokens` tokens reads. With E experts of which a token takes k, tokens that
    choose independently and uniformly meet E·(1 - (1 - k/E)^n) distinct ones."""
    if not traffic.num_experts:
        return traffic.weights
    experts = traffic.num_experts
    met = experts * (1.0 - (1.0 - traffic.top_k / experts) ** num_tokens)
    return traffic.weights + round(met * traffic.expert)


def kv_bytes(traffic: StepTraffic, seq_len: int) -> int:
    """Bytes of cached keys and values that one row with `seq_len` tokens of context, its own included, reads."""
    return sum(size * (seq_len if window is None else min(seq_len, window)) for window, size in traffic.kv)


def step_floor(traffic: StepTraffic, rows: int, seq_len: int) -> dict[str, float]:
    """Seconds that a decode step of so many rows, each with so many tokens of context, takes at least for its weights,
    its KV cache and its sums over ranks, where it has any. `traffic` knows its bandwidth."""
    bandwidth = traffic.bandwidth or math.inf
    floor = {
        "weights": weight_bytes(traffic, rows) / bandwidth,
        "KV": rows * kv_bytes(traffic, seq_len) / bandwidth,
    }
    return floor | ({"sums": traffic.sums} if traffic.sums else {})


def shares(floor: Mapping[str, float]) -> str:
    """What part of a floor each of them is: "weights 82 % KV 18 %"."""
    whole = sum(floor.values())
    return " ".join(f"{name} {100 * part / whole:.0f} %" for name, part in floor.items())


def share_of_bandwidth(totals: StepTotals, bandwidth: float | None) -> float | None:
    """Bytes read in decode steps over what the memory could have delivered meanwhile; None where either is unknown."""
    read = totals.weight_bytes + totals.kv_bytes
    if not bandwidth or not totals.decode_seconds or not read:
        return None
    return read / totals.decode_seconds / bandwidth


def hidden_share(totals: StepTotals) -> float | None:
    """Share of the host's work on decode steps during which the device was busy; None where no device clock says."""
    if not totals.timed_host:
        return None
    return max(0.0, 1.0 - totals.timed_idle / totals.timed_host)


def describe(totals: StepTotals, bandwidth: float | None) -> str | None:
    """The decode steps of a period in a line, None where there were none:
    "step 6.1 ms · 71 % of 3.0 TB/s · weights 82 % KV 18 % · CPU hidden 98 %". Weights, KV cache and sums over ranks
    have their shares of the floor."""
    if not totals.decode_steps:
        return None
    parts = [f"step {_milliseconds(totals.decode_seconds / totals.decode_steps)}"]
    read = totals.weight_bytes + totals.kv_bytes
    share = share_of_bandwidth(totals, bandwidth)
    if share is not None and bandwidth is not None:
        parts.append(f"{100 * share:.0f} % of {_rate(bandwidth)}")
    elif read and totals.decode_seconds:
        parts.append(f"{_rate(read / totals.decode_seconds)} read")
    if read:
        floor = {"weights": float(totals.weight_bytes), "KV": float(totals.kv_bytes)}
        if bandwidth and totals.sum_seconds:
            floor["sums"] = totals.sum_seconds * bandwidth
        parts.append(shares(floor))
    hidden = hidden_share(totals)
    if hidden is not None:
        parts.append(f"CPU hidden {100 * hidden:.0f} %")
    return " · ".join(parts)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{1000 * seconds:,.0f} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e12:.1f} TB/s" if bytes_per_s >= 1e12 else f"{bytes_per_s / 1e9:.1f} GB/s"
