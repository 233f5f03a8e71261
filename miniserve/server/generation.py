"""The sequences behind one HTTP request: handed to the engine in turn with those of others, read as one stream, aborted
together."""

from __future__ import annotations

import asyncio
from bisect import insort
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, TypeVar

from starlette.types import Receive

from miniserve.core import Completion, FinishReason, InvalidRequest, Request, SamplingParams
from miniserve.engine.client import EngineDead
from miniserve.engine.output import CompletionStream
from miniserve.engine.replicas import Engine
from miniserve.server.errors import APIError
from miniserve.server.metrics import RequestMetrics, ServerMetrics

T = TypeVar("T")
_RETRY_AFTER = 5  # seconds
_RUN = 32  # deltas that are read in one go: with many prompts, as many may be there at once


@dataclass(order=True, slots=True)
class _Turn:
    """`place`: priority, then arrival. `given` is done when the sequences may enter."""

    place: tuple[int, int]
    sequences: int = field(compare=False)
    given: asyncio.Future[None] = field(compare=False)


class Turns:
    """Requests hand prompts to the engine in turn, one prompt each, so that a small request need not wait for all of a
    large one. All numbers are of sequences: of prompts times n.

    capacity: in the engine at once. limit: in it and before it; a request may take half of what is free of it, so that
    large ones leave room for small ones, and never more than `most`. A caller `admit`s all its sequences, `enter`s with
    those of one prompt at a time, those of the lowest priority first, `leave`s when they end, and `withdraw`s those
    that never entered.
    """

    def __init__(self, capacity: int, limit: int, most: int) -> None:
        self._capacity = capacity
        self._limit = limit
        self._most = min(most, (limit + 1) // 2)
        self._inside = 0
        self.waiting = 0
        self.num_requests = 0  # of clients
        self.num_refused = 0  # since the start, for want of room
        self._queue: list[_Turn] = []  # in order
        self._serial = count()

    def check(self, num_prompts: int, n: int) -> None:
        """Raises `APIError` 429 where there is no room for so many now, `InvalidRequest` where there never is."""
        used = self.waiting + self._inside
        most = (self._limit - used + 1) // 2
        if num_prompts * n > self._most:
            raise InvalidRequest(
                f"The request asks for {num_prompts * n} sequences (prompts times n), and this server takes at most "
                f"{self._most} in one request.",
                "prompt" if num_prompts > self._most else "n",
            )
        if num_prompts * n > most:
            self.num_refused += 1
            raise APIError(
                429,
                f"The server is busy: {used} sequences (prompts times n) run or wait, so that it takes at most {most} "
                f"more of one request. Try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(_RETRY_AFTER)},
            )

    def admit(self, num_prompts: int, n: int) -> None:
        """Raises what `check` does."""
        self.check(num_prompts, n)
        self.waiting += num_prompts * n

    def withdraw(self, sequences: int) -> None:
        self.waiting -= sequences

    def enter_now(self, sequences: int) -> bool:
        """Whether nobody is before them and there is room; they are inside then."""
        if self._queue or not self._has_room(sequences):
            return False
        self._take(sequences)
        return True

    async def enter(self, sequences: int, priority: int) -> None:
        """First come, first served among those of one priority; who comes again queues again."""
        if self.enter_now(sequences):
            return
        turn = asyncio.get_running_loop().create_future()
        insort(self._queue, _Turn((priority, next(self._serial)), sequences, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._wake()  # it may have been what the others waited behind
            else:
                self.waiting += sequences
                self.leave(sequences)
            raise

    def leave(self, sequences: int) -> None:
        self._inside -= sequences
        self._wake()

    def _wake(self) -> None:
        while self._queue and (self._queue[0].given.cancelled() or self._has_room(self._queue[0].sequences)):
            turn = self._queue.pop(0)
            if not turn.given.cancelled():
                self._take(turn.sequences)
                turn.given.set_result(None)

    def _take(self, sequences: int) -> None:
        self.waiting -= sequences
        self._inside += sequences

    def _has_room(self, sequences: int) -> bool:
        return self._inside == 0 or self._inside + sequences <= self._capacity


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Generation:
    """At its entrance it takes its place before the engine; then come deltas, each with the number of its prompt; at
    its exit it aborts what still runs.

    What is wrong at once is raised at the entrance: `APIError` (busy, dead), `InvalidRequest`. Later an engine's
    failure is raised by `next`, as `APIError`. The requests, one for each prompt, have passed `check_request`; `params`
    are as the client asked.

    `is_ready` and `take` are the reader's. While it waits in `next`, what comes goes to `take` at once where `is_ready`
    says that it can: in the turn of the engine's client, since to wake the reader's task for each token would cost as
    much as all else that is done for it. What `take` raises is raised by `next`.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: ServerMetrics,
        turns: Turns,
        requests: Sequence[Request],
        params: SamplingParams,
    ) -> None:
        self._engine = engine
        self._metrics = metrics
        self._turns = turns
        self._requests = requests
        self._params = params
        self._n = params.n
        self.is_ready: Callable[[], bool] = lambda: False
        self.take: Callable[[int, Completion], None] = _drop
        self.records: list[RequestMetrics] = []  # of each prompt, once they were admitted
        self._streams: list[CompletionStream] = []  # of the first prompts: those that had their turn
        self._news: dict[int, None] = {}  # prompts whose streams have something, or have ended
        self._reader: asyncio.Future[None] | None = None  # waits in `next`
        self._feeder: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._num_entered = 0
        self._num_ended = 0
        self._num_read = 0

    async def __aenter__(self) -> Generation:
        self._turns.admit(len(self._requests), self._n)
        self._turns.num_requests += 1
        try:
            if self._turns.enter_now(self._n):
                self._start()
            lens = [len(request.prompt_token_ids) for request in self._requests]
            self.records = [RequestMetrics(self._metrics, prompt_len, self._params) for prompt_len in lens]
        except BaseException:
            await self.__aexit__()
            raise
        if self._num_entered < len(self._requests):
            self._feeder = asyncio.create_task(self._feed())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._turns.num_requests -= 1
        if self._feeder is not None:
            await _cancel(self._feeder)
        for record in self.records:
            record.close()
        for stream in self._streams:
            stream.close()
        self.take = _drop  # what it refers to refers to this object: the collector would have to find it
        self._turns.leave((self._num_entered - self._num_ended) * self._n)
        self._turns.withdraw((len(self._requests) - self._num_entered) * self._n)

    async def next(self) -> tuple[int, Completion] | None:
        """The next delta, or None after the last."""
        self._num_read += 1
        if self._num_read % _RUN == 0:
            await asyncio.sleep(0)
        while (item := self._get()) is None and self._num_ended < len(self._requests):
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return item

    async def _feed(self) -> None:
        try:
            while self._num_entered < len(self._requests):
                await self._turns.enter(self._n, self._requests[0].priority)
                self._start()
                await asyncio.sleep(0)  # other requests' tokens go on flowing
        except Exception as error:
            self._failure = error
            self._wake()

    def _start(self) -> None:
        """Hand the next prompt to the engine; its sequences have entered."""
        number = self._num_entered
        self._num_entered += 1
        try:
            stream = self._engine.generate(self._requests[number])
        except EngineDead as error:
            raise APIError(503, str(error)) from error
        stream.offer, stream.notify = partial(self._offered, number), partial(self._notified, number)
        self._streams.append(stream)

    def _offered(self, number: int, delta: Completion) -> bool:
        if self._reader is None or self._reader.done() or not self.is_ready():
            return False
        try:
            self._check(number, delta)
            self.take(number, delta)
        except Exception as error:
            self._failure = error
            self._wake()
        return True

    def _notified(self, number: int) -> None:
        self._news[number] = None
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _get(self) -> tuple[int, Completion] | None:
        """The next delta that is there."""
        if self._failure is not None:
            raise self._failure
        while self._news:
            number = next(iter(self._news))
            delta = self._streams[number].get()
            if delta is not None:
                self._check(number, delta)
                return number, delta
            del self._news[number]
            if self._streams[number].complete:
                self._num_ended += 1
                self._turns.leave(self._n)
        return None

    def _check(self, number: int, delta: Completion) -> None:
        self.records[number].observe(delta)
        if delta.finish_reason is FinishReason.REFUSED:
            raise APIError(400, delta.error or "The request cannot be followed.")
        if delta.finish_reason is FinishReason.ERROR:
            raise APIError(503 if self._engine.dead else 500, delta.error or "The engine failed on this request.")


def _drop(number: int, delta: Completion) -> None:
    """Where there is no reader."""


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
