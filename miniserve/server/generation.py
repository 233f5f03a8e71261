"""The sequences behind one HTTP request: handed to the engine in turn with others, read as one stream, aborted
together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import Receive

from miniserve.core import Completion, FinishReason, SamplingParams
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.stream import CompletionStream
from miniserve.engine.validation import check_request
from miniserve.server.errors import APIError
from miniserve.server.metrics import RequestMetrics, ServerMetrics
from miniserve.server.turns import Turns

T = TypeVar("T")
_QUEUE = 32


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Generation:
    """At its entrance it takes its place before the engine; then come deltas, each with the number of its prompt; at
    its exit it aborts what still runs.

    What is wrong at once is raised at the entrance: `APIError` (busy, dead), `InvalidRequest`. Later an engine's
    failure is raised from the deltas, as `APIError`.

    Of more than one prompt each has been checked by `check_request`.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        metrics: ServerMetrics,
        turns: Turns,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        request_id: str,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._turns = turns
        self._prompts = prompts
        self._params = params
        self._request_id = request_id
        self._records: list[RequestMetrics] = []
        self._streams: list[CompletionStream] = []  # of the first prompts: those that had their turn
        self._num_entered = 0
        self._num_ended = 0

    async def __aenter__(self) -> AsyncGenerator[tuple[int, Completion], None]:
        self._turns.admit(len(self._prompts) * self._params.n)
        try:
            if self._turns.enter_now(self._params.n):
                self._start()
            elif len(self._prompts) == 1:
                check_request(self._prompts[0], self._params, self._engine.info)
            self._records = [RequestMetrics(self._metrics, len(prompt), self._params) for prompt in self._prompts]
        except BaseException:
            await self.__aexit__()
            raise
        return self._one() if len(self._prompts) == 1 else self._merged()

    async def __aexit__(self, *_: object) -> None:
        for record in self._records:
            record.close()
        for stream in self._streams:
            await stream.aclose()
        self._turns.leave((self._num_entered - self._num_ended) * self._params.n)
        self._turns.withdraw((len(self._prompts) - self._num_entered) * self._params.n)

    async def _take_turn(self) -> None:
        await self._turns.enter(self._params.n)
        self._start()

    def _start(self) -> None:
        """Hand the next prompt to the engine; its sequences have entered."""
        number = self._num_entered
        self._num_entered += 1
        try:
            stream = self._engine.generate(self._prompts[number], self._params, f"{self._request_id}-{number}")
        except EngineDead as error:
            raise APIError(503, str(error)) from error
        self._streams.append(stream)

    def _checked(self, number: int, delta: Completion) -> tuple[int, Completion]:
        self._records[number].observe(delta)
        if delta.finish_reason is FinishReason.ERROR:
            raise APIError(503 if self._engine.dead else 500, delta.error or "The engine failed on this request.")
        return number, delta

    async def _one(self) -> AsyncGenerator[tuple[int, Completion], None]:
        if not self._streams:
            await self._take_turn()
        async for delta in self._streams[0]:
            yield self._checked(0, delta)

    async def _merged(self) -> AsyncGenerator[tuple[int, Completion], None]:
        # Bounded, so that the deltas of a client who reads slowly gather in the engine, which joins them; and short, so
        # that many that are there at once are not written in one go.
        queue: asyncio.Queue[tuple[int, Completion] | Exception | None] = asyncio.Queue(_QUEUE)
        tasks: list[asyncio.Task[None]] = []

        async def feed() -> None:
            try:
                for number in range(len(self._prompts)):
                    if number == len(self._streams):
                        await self._take_turn()
                    tasks.append(asyncio.create_task(pump(number)))
                    await asyncio.sleep(0)  # other requests' tokens go on flowing
            except Exception as error:
                await queue.put(error)

        async def pump(number: int) -> None:
            try:
                async for delta in self._streams[number]:
                    await queue.put(self._checked(number, delta))
            except Exception as error:
                await queue.put(error)
            else:
                self._num_ended += 1
                self._turns.leave(self._params.n)
                await queue.put(None)

        feeder = asyncio.create_task(feed())
        running = len(self._prompts)
        try:
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            await _cancel(feeder)
            await _cancel(*tasks)


async def while_connected(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    *,
    every: float | None = None,
    beat: Callable[[], Awaitable[None]] | None = None,
) -> T:
    """Run `work` to its end, or cancel it and raise `ClientGone` as soon as the client disconnects. The request's body
    must have been read. `beat` is called `every` so many seconds meanwhile."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.create_task(work)
    watcher = asyncio.create_task(disconnected())
    try:
        while not (await asyncio.wait((task, watcher), timeout=every, return_when=asyncio.FIRST_COMPLETED))[0]:
            if beat is not None:
                await beat()
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
