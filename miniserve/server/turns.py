"""The way into the engine: bounded, and shared among the HTTP requests that wait for it."""

from __future__ import annotations

import asyncio
from collections import deque

from miniserve.core import InvalidRequest
from miniserve.server.errors import APIError

_RETRY_AFTER = 5  # seconds


class Turns:
    """Requests hand prompts to the engine in turn, one prompt each, so that a small request need not wait for all of a
    large one. All numbers are of sequences: of prompts times n.

    capacity: in the engine at once. limit: in it and before it; a request may take half of what is free of it, so that
    large ones leave room for small ones. A caller `admit`s all its sequences, `enter`s with those of one prompt at a
    time, `leave`s when they end, and `withdraw`s those that never entered.
    """

    def __init__(self, capacity: int, limit: int) -> None:
        self._capacity = capacity
        self._limit = limit
        self.most = (limit + 1) // 2  # of one request, where nothing else runs
        self._inside = 0
        self.waiting = 0
        self._queue: deque[tuple[int, asyncio.Future[None]]] = deque()

    def check(self, sequences: int) -> None:
        """Raises `APIError` 429 where there is no room for so many now, `InvalidRequest` where there never is."""
        used = self.waiting + self._inside
        most = (self._limit - used + 1) // 2
        if sequences > self.most:
            raise InvalidRequest(
                f"The request asks for {sequences} sequences (prompts times n), and this server takes at most "
                f"{self.most} of one request.",
                "n",
            )
        if sequences > most:
            raise APIError(
                429,
                f"The server is busy: {used} sequences (prompts times n) run or wait, so that it takes at most {most} "
                f"more of one request. Try again later.",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(_RETRY_AFTER)},
            )

    def admit(self, sequences: int) -> None:
        """Raises what `check` does."""
        self.check(sequences)
        self.waiting += sequences

    def withdraw(self, sequences: int) -> None:
        self.waiting -= sequences

    def enter_now(self, sequences: int) -> bool:
        """Whether nobody is before them and there is room; they are inside then."""
        if self._queue or not self._has_room(sequences):
            return False
        self._take(sequences)
        return True

    async def enter(self, sequences: int) -> None:
        """First come, first served; who comes again queues again."""
        if self.enter_now(sequences):
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append((sequences, turn))
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
        while self._queue and (self._queue[0][1].cancelled() or self._has_room(self._queue[0][0])):
            sequences, turn = self._queue.popleft()
            if not turn.cancelled():
                self._take(sequences)
                turn.set_result(None)

    def _take(self, sequences: int) -> None:
        self.waiting -= sequences
        self._inside += sequences

    def _has_room(self, sequences: int) -> bool:
        return self._inside == 0 or self._inside + sequences <= self._capacity
