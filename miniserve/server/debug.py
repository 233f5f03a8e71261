"""`GET /debug/steps`: the last steps, as JSON or as a trace for chrome://tracing and ui.perfetto.dev."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from fastapi import FastAPI, Query, Response

from miniserve.core import EngineInfo, StepRecord, StepTotals
from miniserve.engine.client import EngineDead
from miniserve.engine.roofline import describe
from miniserve.engine.step_log import RING_SIZE
from miniserve.server.errors import APIError, json_response
from miniserve.server.service import Service

_HOST, _DEVICE = 1, 2  # the trace's threads
_PATIENCE = 10.0  # seconds


def install(app: FastAPI, service: Service) -> None:
    @app.get("/debug/steps", response_model=dict[str, Any])
    async def steps(
        format: Literal["json", "chrome"] = "json", limit: Annotated[int, Query(ge=0, le=RING_SIZE)] = RING_SIZE
    ) -> Response:
        engine = service.engine
        try:
            async with asyncio.timeout(_PATIENCE):
                records = await engine.steps(limit)
        except EngineDead as error:
            raise APIError(503, str(error)) from error
        except TimeoutError:
            age = engine.last_step_age() or 0.0
            raise APIError(503, f"The engine answers between steps; the last one ended {age:.0f} s ago.") from None
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
