"""Step times by the device's clock: events that are recorded at launch and read when the step is collected."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

import torch

_PAIRS = 4  # at most two steps are in flight, and the end of the one before is still to be read


@dataclass(frozen=True, slots=True)
class StepEvents:
    """A step's first and last event, and the last one of the step before it, if any."""

    start: torch.cuda.Event
    end: torch.cuda.Event
    before: torch.cuda.Event | None

    def seconds(self) -> tuple[float, float | None]:
        """How long the step ran, and how long the device was idle before it. `end` must have passed."""
        idle = None if self.before is None else max(0.0, self.before.elapsed_time(self.start)) / 1000
        return self.start.elapsed_time(self.end) / 1000, idle


class DeviceTimer:
    """`start` before a step's first work is enqueued, `end` behind its last. Events are used again: a step is to be
    read before the third one after it is launched."""

    def __init__(self) -> None:
        self._pairs = cycle([[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(_PAIRS)])
        self._pair = next(self._pairs)
        self._before: torch.cuda.Event | None = None

    def start(self) -> None:
        self._pair = next(self._pairs)
        self._pair[0].record()

    def end(self) -> StepEvents:
        start, end = self._pair
        end.record()
        events = StepEvents(start, end, self._before)
        self._before = end
        return events
