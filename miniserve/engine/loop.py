"""The engine's loop: ask the scheduler for a step, let the runner compute it, tell the scheduler what came out.

Two loops stand side by side and give the same tokens. The plain one does one thing after the other. The overlapped one
launches step N+1 before it waits for step N, so that the CPU's work for a step happens while the device computes the
next. Of a step with rows that have a grammar, the overlapped one launches all but the choice of these rows' tokens,
then takes in the results of step N, which say what the grammars allow next, and launches the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from miniserve.core import (
    FinishReason,
    InvalidRequest,
    Matcher,
    PoolView,
    Request,
    RequestOutput,
    Runner,
    SchedulerStats,
    TokenMasks,
)
from miniserve.engine.grammar import GrammarError, Matchers
from miniserve.engine.step_log import StepLog
from miniserve.scheduler.scheduler import PlannedStep, Scheduler

_PATIENCE = 0.05  # seconds that a step waits for matchers where there is nothing else to do


class EngineLoop:
    """A scheduler and a runner at work, with `matchers` for requests with grammars; `log` keeps what the steps were.
    Errors of either propagate and leave the loop unusable."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, log: StepLog, matchers: Matchers | None = None, *, overlap: bool
    ) -> None:
        self.log = log
        self._matchers = matchers
        self._matched: dict[str, tuple[Request, Future[Matcher]]] = {}  # requests whose matchers are being made
        self._scheduler = scheduler
        self._runner = runner
        self._in_flight: PlannedStep | None = None
        self._rested = True  # there was nothing to do before the next step
        self._step = self._step_overlapped if overlap else self._step_plain

    def add(self, request: Request) -> None:
        """Queue a request. Raises `InvalidRequest` for one the scheduler refuses; one with a grammar ends with an error
        where this cannot be followed."""
        if request.params.grammar is None:
            self._scheduler.add(request)
        elif self._matchers is None:
            raise InvalidRequest("This engine follows no grammars.", "grammar")
        else:
            self._matched[request.request_id] = (request, self._matchers.start(request.params))

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests without a further output; their blocks are free for the next step. Unknown ids have ended."""
        for request_id in request_ids:
            if request_id in self._matched:
                _, future = self._matched.pop(request_id)
                future.cancel()
            else:
                self._scheduler.abort(request_id)

    def check(self) -> None:
        """Raise what keeps the runner from further steps, if anything does; for an engine at rest."""
        self._runner.check()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do: unfinished requests, or a step whose result is not collected yet."""
        return bool(self._matched) or self._scheduler.has_work()

    def step(self) -> list[RequestOutput]:
        """Run a step, and return what the earliest one in flight brought."""
        ended = self._add_matched() if self._matched else []
        if self._matched and not self._scheduler.has_work():
            return ended
        return ended + self._step()

    def _add_matched(self) -> list[RequestOutput]:
        """Queue requests whose matchers are made. Returns an output for each that cannot be queued."""
        if not self._scheduler.has_work():
            wait([future for _, future in self._matched.values()], _PATIENCE, FIRST_COMPLETED)
        ended = []
        for request_id, (request, future) in list(self._matched.items()):
            if not future.done():
                continue
            del self._matched[request_id]
            try:
                self._scheduler.add(request, future.result())
            except Exception as error:  # of this request alone
                is_refused = isinstance(error, GrammarError | InvalidRequest)
                reason = FinishReason.REFUSED if is_refused else FinishReason.ERROR
                ended.append(RequestOutput(request_id=request_id, finish_reason=reason, error=str(error)))
        return ended

    @property
    def stats(self) -> SchedulerStats:
        return self._scheduler.stats()

    def pool_view(self, max_blocks: int) -> PoolView:
        """At most `max_blocks` blocks of the KV cache, and who holds them."""
        return self._scheduler.pool_view(max_blocks)

    def _step_plain(self) -> list[RequestOutput]:
        step = self._schedule()
        if step is None:
            return self._idle()
        matchers, masks = self._matchers, None
        if step.plan.masked and matchers is not None:
            masks = matchers.start_masks(step.matchers())
        self._launch(step)
        if masks is not None:
            self._sample(step, masks)
        return self._finish(step)

    def _step_overlapped(self) -> list[RequestOutput]:
        step = self._schedule()
        if step is not None:
            self._launch(step)
        previous, self._in_flight = self._in_flight, step
        if previous is None and step is None:
            return self._idle()
        outputs = [] if previous is None else self._finish(previous)
        matchers = self._matchers
        if step is not None and step.plan.masked and matchers is not None:
            self._sample(step, lambda: matchers.masks(step.matchers()))
        return outputs

    def _schedule(self) -> PlannedStep | None:
        start = self.log.clock()
        step = self._scheduler.schedule()
        if step is not None:
            step.record.start, step.record.schedule = start, self.log.clock() - start
        return step

    def _launch(self, step: PlannedStep) -> None:
        start = self.log.clock()
        step.after_rest, self._rested = self._rested, False
        self._runner.launch(step)
        step.record.launch = self.log.clock() - start
        self.log.open(step)

    def _sample(self, step: PlannedStep, find_masks: Callable[[], TokenMasks]) -> None:
        """Launch the choice of tokens by grammars, which depends on all that was collected before."""
        start = self.log.clock()
        self._runner.sample(step, find_masks())
        step.record.launch += self.log.clock() - start

    def _finish(self, step: PlannedStep) -> list[RequestOutput]:
        clock, record = self.log.clock, step.record
        wait_start = clock()
        self._runner.collect(step)
        collected = clock()
        outputs = self._scheduler.update(step)
        record.wait_start, record.wait = wait_start - record.start, collected - wait_start
        record.update = clock() - collected
        self._scheduler.observe(step, self.log.close(step))
        self._rested = not self._scheduler.has_work()
        return outputs

    def _idle(self) -> list[RequestOutput]:
        if self._scheduler.has_work():
            # Stepping on would spin for ever with requests that never end.
            raise RuntimeError(f"The scheduler has unfinished requests but no step to run: {self._scheduler.stats()}")
        return []
