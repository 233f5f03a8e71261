"""Warnings that clients can cause: a line each, but only so many, since nobody may fill the log from outside."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_LINES, _PERIOD = 10, 60.0  # of a kind, in so many seconds


class ThrottledLog:
    """Writes the first warnings of a kind in each period. The next period's first says how many were left out."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # by its text: the period's begin, and how many came in it

    def warning(self, text: str, *args: object) -> None:
        """`text` is the kind: what differs from one to the next is in `args`."""
        now = self._clock()
        begin, count = self._kinds.get(text, (now, 0))
        missed = 0
        if now - begin >= _PERIOD:
            begin, count, missed = now, 0, max(0, count - _LINES)
        self._kinds[text] = begin, count + 1
        if count < _LINES:
            rest = f" ({missed} more like this were left out before.)" if missed else ""
            self._logger.warning(text + "%s", *args, rest)
