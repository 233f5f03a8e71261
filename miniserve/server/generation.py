"""The sequences behind one HTTP request: submitted together, read as one stream, aborted together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from starlette.types import Receive

from miniserve.core import CompletionDelta, FinishReason, SamplingParams
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.stream import CompletionStream
from miniserve.server.errors import APIError
from miniserve.server.metrics import RequestMetrics, ServerMetrics

T = TypeVar("T")


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Generation:
    """An async context manager: entering submits everything or, raising `InvalidRequest`, nothing; leaving aborts what
    still runs."""

    def __init__(
        self,
        engine: AsyncEngine,
        metrics: ServerMetrics,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request_id: str,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._prompts = prompts
        self._params = params
        self._request_id = request_id
        self._streams: list[CompletionStream] = []
        self._records: list[RequestMetrics] = []

    async def __aenter__(self) -> Self:
        try:
            for number, prompt in enumerate(self._prompts):
                self._streams.append(self._engine.generate(prompt, self._params, f"{self._request_id}-{number}"))
                self._records.append(self._metrics.begin(len(prompt), self._params))
        except EngineDead as error:
            await self._close()
            raise APIError(503, str(error)) from error
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    async def deltas(self) -> AsyncGenerator[tuple[int, CompletionDelta], None]:
        """(number of the prompt, delta) as they come. An engine's failure is raised as `APIError`."""
        if len(self._streams) == 1:
            async for delta in self._streams[0]:
                yield 0, self._checked(0, delta)
            return
        # A bounded queue, so that the deltas of a client who reads slowly gather in the engine, which joins them.
        queue: asyncio.Queue[tuple[int, CompletionDelta | Exception | None]] = asyncio.Queue(len(self._streams))

        async def pump(number: int) -> None:
            try:
                async for delta in self._streams[number]:
                    await queue.put((number, delta))
            except Exception as error:
                await queue.put((number, error))
            else:
                await queue.put((number, None))

        tasks = [asyncio.create_task(pump(number)) for number in range(len(self._streams))]
        running = len(tasks)
        try:
            while running:
                number, item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield number, self._checked(number, item)
        finally:
            await _cancel(*tasks)

    def _checked(self, number: int, delta: CompletionDelta) -> CompletionDelta:
        self._records[number].observe(delta)
        if delta.finish_reason is FinishReason.ERROR:
            raise APIError(503 if self._engine.dead else 500, delta.error or "The engine failed on this request.")
        if delta.finish_reason is FinishReason.ABORT:
            raise APIError(503, delta.error or "The server is shutting down and has aborted the request.")
        return delta

    async def _close(self) -> None:
        for record in self._records:
            record.close()
        for stream in self._streams:
            await stream.aclose()


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
