"""A line in the log now and then while requests run: how many, how fast, how near the memory's limit."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from miniserve.core import StepTotals
from miniserve.engine.client import AsyncEngine
from miniserve.engine.roofline import describe

logger = logging.getLogger(__name__)


class ProgressLine:
    """`tick` is called often; every `interval` seconds (0: never) it logs what was done in them, if anything was."""

    def __init__(self, engine: AsyncEngine, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._engine = engine
        self._interval = interval
        self._since = clock()
        self._totals, self._stats = engine.totals, engine.stats

    def tick(self) -> None:
        now, engine = self._clock(), self._engine
        if not self._interval or now - self._since < self._interval:
            return
        period = engine.totals.since(self._totals)
        if period.num_steps:
            logger.info("%s", self._line(period, now - self._since))
        self._since, self._totals, self._stats = now, engine.totals, engine.stats

    def _line(self, period: StepTotals, seconds: float) -> str:
        stats = self._engine.stats
        guessed = stats.num_draft_tokens - self._stats.num_draft_tokens
        right = stats.num_accepted_tokens - self._stats.num_accepted_tokens
        decoded = (period.decode_rows + period.mixed_rows - guessed + right) / seconds
        parts = [
            f"{stats.num_running} running, {stats.num_waiting} waiting",
            f"decode {decoded:,.0f} tokens/s, prefill {period.prefill_tokens / seconds:,.0f}",
        ]
        if guessed:
            length = 1 + right / (stats.num_drafts - self._stats.num_drafts)
            parts.append(f"{100 * right / guessed:.0f} % of guesses right, {length:.1f} tokens where guessed")
        line = describe(period, self._engine.info.bandwidth)
        return " · ".join(parts if line is None else [*parts, line])
