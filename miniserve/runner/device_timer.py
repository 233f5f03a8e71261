"""Step times by the device's clock: events that are recorded at launch and read when the step is collected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any, Protocol

import torch

_PAIRS = 4  # at most two steps are in flight, and the end of the one before is still to be read


class DeviceEvent(Protocol):
    """The part of `torch.cuda.Event` used here; `elapsed_time` is in milliseconds."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool: ...

    def elapsed_time(self, end_event: Any) -> float: ...


@dataclass(frozen=True, slots=True)
class StepEvents:
    """A step's first and last event, and the last one of the step before it, if any."""

    start: DeviceEvent
    end: DeviceEvent
    before: DeviceEvent | None

    def seconds(self) -> tuple[float, float | None]:
        """How long the step ran, and how long the device was idle before it. `end` must have passed."""
        idle = None if self.before is None else max(0.0, self.before.elapsed_time(self.start)) / 1000
        return self.start.elapsed_time(self.end) / 1000, idle


def _cuda_event() -> DeviceEvent:
    event: DeviceEvent = torch.cuda.Event(enable_timing=True)
    return event


class DeviceTimer:
    """`start` before a step's first work is enqueued, `end` behind its last. Events are used again: a step is to be
    read before the third one after it is launched."""

    def __init__(self, make_event: Callable[[], DeviceEvent] = _cuda_event) -> None:
        self._pairs: Iterator[tuple[DeviceEvent, DeviceEvent]] = cycle(
            [(make_event(), make_event()) for _ in range(_PAIRS)]
        )
        self._pair = next(self._pairs)
        self._before: DeviceEvent | None = None

    def start(self) -> None:
        self._pair = next(self._pairs)
        self._pair[0].record()

    def end(self) -> StepEvents:
        start, end = self._pair
        end.record()
        events = StepEvents(start, end, self._before)
        self._before = end
        return events
