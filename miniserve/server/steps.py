"""What the engine's steps were: a line in the log now and then, and `GET /debug/steps`, as JSON or as a trace for
chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from fastapi import FastAPI, Query, Response

from miniserve.core import EngineInfo, InvalidRequest, SchedulerStats, StepRecord, StepTotals
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.replicas import Engine
from miniserve.engine.roofline import describe
from miniserve.engine.step_log import RING_SIZE
from miniserve.server.errors import APIError, json_response
from miniserve.server.service import Service

logger = logging.getLogger(__name__)

T = TypeVar("T")
_HOST, _DEVICE = 1, 2  # the trace's threads
_PATIENCE = 10.0  # seconds


class ProgressLine:
    """`tick` is called often; every `interval` seconds (0: never) it logs what was done in them, if anything was."""

    def __init__(self, engine: Engine, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
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
        decoded = decoded_tokens(self._engine.totals, stats) - decoded_tokens(self._totals, self._stats)
        parts = [
            f"{stats.num_running} running, {stats.num_waiting} waiting",
            f"decode {decoded / seconds:,.0f} tokens/s, prefill {period.prefill_tokens / seconds:,.0f}",
        ]
        if guessed:
            length = 1 + right / (stats.num_drafts - self._stats.num_drafts)
            parts.append(f"{100 * right / guessed:.0f} % of guesses right, {length:.1f} tokens where guessed")
        line = describe(period, self._engine.info.bandwidth)
        return " · ".join(parts if line is None else [*parts, line])


def decoded_tokens(totals: StepTotals, stats: SchedulerStats) -> int:
    """Since the start: of each decode row one, but for wrong guesses."""
    return totals.decode_rows + totals.mixed_rows - stats.num_draft_tokens + stats.num_accepted_tokens


def numbered(service: Service, number: int) -> AsyncEngine:
    """One of the server's engines. Raises `InvalidRequest` where there are not so many."""
    if number >= (most := len(service.engine.engines)):
        raise InvalidRequest(f"engine must be below {most}, the number of engines, not {number}.", "engine")
    return service.engine.engines[number]


async def between_steps(engine: AsyncEngine, answer: Awaitable[T]) -> T:
    """What the engine answers between two steps. Raises `APIError` 503 where it does not, or not soon."""
    try:
        async with asyncio.timeout(_PATIENCE):
            return await answer
    except EngineDead as error:
        raise APIError(503, str(error)) from error
    except TimeoutError:
        age = engine.last_step_age() or 0.0
        raise APIError(503, f"The engine answers between steps; the last one ended {age:.0f} s ago.") from None


def install(app: FastAPI, service: Service) -> None:
    @app.get("/debug/steps", response_model=dict[str, Any])
    async def steps(
        format: Literal["json", "chrome"] = "json",
        limit: Annotated[int, Query(ge=0, le=RING_SIZE)] = RING_SIZE,
        number: Annotated[int, Query(alias="engine", ge=0)] = 0,
    ) -> Response:
        engine = numbered(service, number)
        records = await between_steps(engine, engine.steps(limit))
        if format == "chrome":
            return json_response(chrome_trace(records))
        return json_response(report(records, engine.totals, engine.info))


def report(records: Sequence[StepRecord], totals: StepTotals, info: EngineInfo) -> dict[str, Any]:
    """Times in seconds, `start` as Unix time; `totals` since the engine started, `summary` of them in a line."""
    return {
        "summary": describe(totals, info.bandwidth),
        "traffic": info.traffic and msgspec.structs.asdict(info.traffic),
        "totals": msgspec.structs.asdict(totals),
        "steps": [msgspec.structs.asdict(record) for record in records],
    }


def chrome_trace(records: Sequence[StepRecord]) -> dict[str, Any]:
    """The Trace Event Format: the host's work and the device's on a line each, µs from the first step on.

    The device's clock gives lengths alone: a step is drawn to end where the host had its result, or before.
    """
    events: list[dict[str, Any]] = [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": thread, "args": {"name": name}}
        for thread, name in ((_HOST, "host"), (_DEVICE, "device"))
    ]
    zero = records[0].start if records else 0.0
    device_free = 0.0
    for record in records:
        start = record.start - zero
        arguments = {
            key: getattr(record, key)
            for key in ("number", "rows", "chunks", "tokens", "bucket", "preemptions", "weight_bytes", "kv_bytes")
        }
        collect, end = start + record.wait_start, start + record.wait_start + record.wait
        events += [
            _span("schedule", _HOST, start, record.schedule, arguments),
            _span("launch", _HOST, start + record.schedule, record.launch, arguments),
            _span("wait", _HOST, collect, record.wait, arguments),
            _span("update", _HOST, end, record.update, arguments),
        ]
        took = record.device
        if took is None:  # computed within launch, or waited for
            begin, took = start + record.schedule, max(record.launch, record.wait)
            begin = begin if record.launch >= record.wait else end - took
        else:
            begin = max(end - took, device_free)
        device_free = begin + took
        events.append(_span(record.kind, _DEVICE, begin, took, arguments))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _span(name: str, thread: int, start: float, seconds: float, arguments: dict[str, Any]) -> dict[str, Any]:
    span = {"name": name, "ph": "X", "pid": 1, "tid": thread, "ts": 1e6 * start, "dur": 1e6 * seconds}
    return span | {"args": arguments}
