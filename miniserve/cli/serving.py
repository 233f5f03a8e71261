"""Start an engine and its server: in this thread for a server alone, in another one beneath a chat prompt."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NoReturn

from miniserve.cli.report import Report
from miniserve.config import EngineConfig
from miniserve.engine.client import AsyncEngine
from miniserve.models.hub import ModelSource
from miniserve.server.config import ServerConfig
from miniserve.server.serve import exit_at_once, loop_factory, on_signals, serve


class Terminated(BaseException):
    """SIGTERM or SIGHUP came, or the server beneath a chat prompt ended: leave, whatever runs in the main thread."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """All that it takes to serve a model. `socket` is bound already."""

    engine: EngineConfig
    server: ServerConfig
    source: ModelSource
    socket: socket.socket
    report: Report

    async def run(self, on_ready: Callable[[], None], stop: asyncio.Event | None = None) -> int:
        """Load, report, serve; returns the exit code. Raises `UserError` and `EngineDead` where the start fails."""
        engine = AsyncEngine(self.engine, self.source.path, self.source.name, step_timeout=self.server.step_timeout)
        with self.report.loading() as progress:
            await engine.start(progress)
        self.report.engine(engine.info)
        return await serve(engine, self.server, sock=self.socket, on_ready=on_ready, stop=stop)


def serve_alone(launch: Launch, on_ready: Callable[[], None]) -> int:
    """Serve until a signal or the engine's death ends it; returns the exit code."""
    interrupted_by = 0

    async def main() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def give_up(number: int) -> None:
            nonlocal interrupted_by
            interrupted_by = number
            loop.call_soon_threadsafe(task.cancel)

        with on_signals(give_up):  # while the model loads; the server then sets its own handlers
            return await launch.run(on_ready)

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            return runner.run(main())
        except asyncio.CancelledError:
            return 128 + interrupted_by


class BackgroundServer:
    """A server in a thread of its own, for the time of a `with` block; the block's end drains it.

    Entering it waits until the server answers, and raises what kept it from that. `exit_code` counts once the block has
    ended. A server that ends by itself sends the process a SIGTERM; a second signal while it drains ends the process.
    """

    def __init__(self, launch: Launch) -> None:
        self.exit_code = 0
        self.answers = False
        self._launch = launch
        self._settled = threading.Event()  # it answers, or it has ended
        self._error: BaseException | None = None
        self._leaving = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._task: asyncio.Task[int] | None = None
        # A daemon: the process must be able to end whatever this thread does.
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)

    def __enter__(self) -> BackgroundServer:
        self._thread.start()
        try:
            self._settled.wait()
        except BaseException:
            self._end()
            raise
        if self._error is not None:
            raise self._error
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._end()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                self.exit_code = runner.run(self._main())
        except BaseException as error:
            self._error = error
        self._settled.set()
        if self.answers and not self._leaving:
            os.kill(os.getpid(), signal.SIGTERM)  # the main thread may be waiting for a line at the prompt

    async def _main(self) -> int:
        self._loop, self._stop, self._task = asyncio.get_running_loop(), asyncio.Event(), asyncio.current_task()
        return await self._launch.run(self._on_ready, self._stop)

    def _on_ready(self) -> None:
        self.answers = True
        self._settled.set()

    def _end(self) -> None:
        self._leaving = True
        with on_signals(exit_at_once):
            if self._thread.is_alive() and self._loop is not None and self._stop is not None and self._task is not None:
                self._loop.call_soon_threadsafe(self._stop.set if self.answers else self._task.cancel)
            self._thread.join()


def terminated_by_signals() -> AbstractContextManager[None]:
    """Raise `Terminated` in the main thread at a SIGTERM or SIGHUP. Ctrl-C is the prompt's."""
    return on_signals(_raise_terminated, (signal.SIGTERM, signal.SIGHUP))


def _raise_terminated(number: int) -> NoReturn:
    raise Terminated(number)
