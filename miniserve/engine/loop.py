"""The engine's loop: ask the scheduler for a step, let the runner compute it, tell the scheduler what came out.

Two loops stand side by side and give the same tokens. The plain one does one thing after the other. The overlapped one
launches step N+1 before it waits for step N, so that the CPU's work for a step happens while the device computes the
next.
"""

from __future__ import annotations

from collections.abc import Iterable

from miniserve.core import Request, RequestOutput, Runner, SchedulerStats
from miniserve.engine.step_log import LaunchedStep, StepLog
from miniserve.scheduler.scheduler import Scheduler


class EngineLoop:
    """A scheduler and a runner at work; `log` keeps what the steps were. Errors of either propagate and leave the loop
    unusable."""

    def __init__(self, scheduler: Scheduler, runner: Runner, log: StepLog, *, overlap: bool) -> None:
        self.log = log
        self._scheduler = scheduler
        self._runner = runner
        self._in_flight: LaunchedStep | None = None
        self._rested = True  # there was nothing to do before the next step
        self.step = self._step_overlapped if overlap else self._step_plain

    def add(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequest` for one the scheduler refuses."""
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without a further output; their blocks are free for the next step. Unknown ids have ended."""
        for request_id in request_ids:
            self._scheduler.abort(request_id)

    def check(self) -> None:
        """Raise what keeps the runner from further steps, if anything does; for an engine at rest."""
        self._runner.check()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: unfinished requests, or a step whose result is not collected yet."""
        return self._scheduler.has_work()

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def _step_plain(self) -> list[RequestOutput]:
        launched = self._launch()
        return self._idle() if launched is None else self._finish(launched)

    def _step_overlapped(self) -> list[RequestOutput]:
        launched = self._launch()
        previous, self._in_flight = self._in_flight, launched
        if previous is None:
            return [] if launched is not None else self._idle()
        return self._finish(previous)

    def _launch(self) -> LaunchedStep | None:
        clock, preemptions = self.log.clock, self._scheduler.num_preemptions
        start = clock()
        plan = self._scheduler.schedule()
        if plan is None:
            return None
        scheduled = clock()
        handle = self._runner.launch(plan)
        after_rest, self._rested = self._rested, False
        preemptions = self._scheduler.num_preemptions - preemptions
        return self.log.open(LaunchedStep(plan, handle, start, scheduled, clock(), preemptions, after_rest))

    def _finish(self, step: LaunchedStep) -> list[RequestOutput]:
        clock = self.log.clock
        wait_start = clock()
        result = self._runner.collect(step.handle)
        collected = clock()
        outputs = self._scheduler.update(step.plan, result)
        took = self.log.close(step, result, wait_start=wait_start, collected=collected)
        self._scheduler.note_seconds(took)
        self._rested = not self._scheduler.has_work()
        return outputs

    def _idle(self) -> list[RequestOutput]:
        if self._scheduler.has_work():
            # Stepping on would spin for ever with requests that never end.
            raise RuntimeError(f"The scheduler has unfinished requests but no step to run: {self._scheduler.stats()}")
        return []
