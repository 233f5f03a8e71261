"""The sequences behind one HTTP request: submitted together, read as one stream, aborted together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.types import Receive

from miniserve.core import CompletionDelta, FinishReason, SamplingParams
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.stream import CompletionStream
from miniserve.server.errors import APIError
from miniserve.server.metrics import RequestMetrics, ServerMetrics

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


async def generate(
    engine: AsyncEngine, metrics: ServerMetrics, prompts: Sequence[list[int]], params: SamplingParams, request_id: str
) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
    """Submit all prompts or, raising `InvalidRequest`, none; then yield (number of the prompt, delta) as they come.

    Closing it aborts what still runs. An engine's failure is raised as `APIError`.
    """
    streams: list[CompletionStream] = []
    records: list[RequestMetrics] = []

    def checked(number: int, delta: CompletionDelta) -> tuple[int, CompletionDelta]:
        records[number].observe(delta)
        if delta.finish_reason is FinishReason.ERROR:
            raise APIError(503 if engine.dead else 500, delta.error or "The engine failed on this request.")
        return number, delta

    try:
        for number, prompt in enumerate(prompts):
            streams.append(engine.generate(prompt, params, f"{request_id}-{number}"))
            records.append(RequestMetrics(metrics, len(prompt), params))
        if len(streams) == 1:
            async for delta in streams[0]:
                yield checked(0, delta)
        else:
            async with aclosing(_merged(streams)) as merged:
                async for number, delta in merged:
                    yield checked(number, delta)
    except EngineDead as error:
        raise APIError(503, str(error)) from error
    finally:
        for record in records:
            record.close()
        for stream in streams:
            await stream.aclose()


async def _merged(streams: Sequence[CompletionStream]) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
    # A bounded queue, so that the deltas of a client who reads slowly gather in the engine, which joins them.
    queue: asyncio.Queue[tuple[int, CompletionDelta | Exception | None]] = asyncio.Queue(len(streams))

    async def pump(number: int) -> None:
        try:
            async for delta in streams[number]:
                await queue.put((number, delta))
        except Exception as error:
            await queue.put((number, error))
        else:
            await queue.put((number, None))

    tasks = [asyncio.create_task(pump(number)) for number in range(len(streams))]
    running = len(tasks)
    try:
        while running:
            number, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield number, item
    finally:
        await _cancel(*tasks)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work` to its end, or cancel it and raise `ClientGone` as soon as the client disconnects. The request's body
    must have been read."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    watcher = asyncio.create_task(disconnected())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        await _cancel(task, watcher)


async def _cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel, and wait until they are gone."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
