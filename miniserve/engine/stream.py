"""What a caller holds of a running request: an asynchronous iterator over its deltas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from miniserve.core import Completion
from miniserve.engine.output import join


class Mailbox:
    """Deltas on their way to their reader. Those not fetched yet are merged, one per sequence, so that a slow reader
    holds back nobody and piles up nothing."""

    def __init__(self) -> None:
        self._pending: dict[int, Completion] = {}
        self._arrived = asyncio.Event()
        self.complete = False

    def put(self, delta: Completion) -> None:
        earlier = self._pending.get(delta.index)
        self._pending[delta.index] = delta if earlier is None else join((earlier, delta))
        self._arrived.set()

    def end(self) -> None:
        """Nothing comes any more but what is pending."""
        self.complete = True
        self._arrived.set()

    async def get(self) -> Completion | None:
        """The next delta, or None after the last."""
        while not self._pending:
            if self.complete:
                return None
            self._arrived.clear()
            await self._arrived.wait()
        return self._pending.pop(next(iter(self._pending)))


class CompletionStream:
    """The deltas of one request, of all its n sequences as they come; ends after the last delta of the last sequence.

    Closing the stream early (`aclose`), cancelling the task that waits in it, or dropping it aborts the request in the
    engine. To be read by one task. If the engine dies, each unfinished sequence gets a last delta with finish_reason
    `error` and the reason in `error`; nothing is raised.
    """

    def __init__(self, mailbox: Mailbox, abort: Callable[[], None]) -> None:
        self._mailbox = mailbox
        self._abort = abort
        self._event_loop = asyncio.get_running_loop()
        self._closed = False

    def __aiter__(self) -> CompletionStream:
        return self

    async def __anext__(self) -> Completion:
        if self._closed:
            raise StopAsyncIteration
        try:
            delta = await self._mailbox.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if delta is None:
            self._closed = True
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Abort the request unless it has ended. May be called again."""
        if not self._closed:
            self._closed = True
            if not self._mailbox.complete:
                self._abort()

    def __del__(self) -> None:
        # A dropped stream may be collected in any thread; the engine's client lives in its event loop.
        if not (self._closed or self._mailbox.complete or self._event_loop.is_closed()):
            self._event_loop.call_soon_threadsafe(self._abort)
