"""The engine's loop: ask the scheduler for a step, let the runner compute it, tell the scheduler what came out.

Two loops stand side by side and give the same tokens. The plain one does one thing after the other. The overlapped one
launches step N+1 before it waits for step N, so that the CPU's work for a step happens while the device computes the
next.
"""

from __future__ import annotations

from collections.abc import Iterable

from miniserve.core import Request, RequestOutput, Runner, SchedulerStats, StepPlan
from miniserve.scheduler.scheduler import Scheduler


class EngineLoop:
    """A scheduler and a runner at work. Errors of either propagate and leave the loop unusable."""

    def __init__(self, scheduler: Scheduler, runner: Runner, *, overlap: bool) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._in_flight: tuple[StepPlan, object] | None = None
        self.step = self._step_overlapped if overlap else self._step_plain

    def add(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequest` for one the scheduler refuses."""
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without a further output; their blocks are free for the next step. Unknown ids have ended."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: unfinished requests, or a step whose result is not collected yet."""
        return self._scheduler.has_work()

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def _step_plain(self) -> list[RequestOutput]:
        plan = self._scheduler.schedule()
        if plan is None:
            return self._idle()
        result = self._runner.collect(self._runner.launch(plan))
        return self._scheduler.update(plan, result)

    def _step_overlapped(self) -> list[RequestOutput]:
        plan = self._scheduler.schedule()
        previous = self._in_flight
        self._in_flight = None if plan is None else (plan, self._runner.launch(plan))
        if previous is None:
            return [] if plan is not None else self._idle()
        previous_plan, handle = previous
        return self._scheduler.update(previous_plan, self._runner.collect(handle))

    def _idle(self) -> list[RequestOutput]:
        if self._scheduler.has_work():
            # Stepping on would spin for ever with requests that never end.
            raise RuntimeError(f"The scheduler has unfinished requests but no step to run: {self._scheduler.stats()}")
        return []
