"""A server in a process of its own, beneath a chat prompt or a benchmark: it shares no interpreter with its clients."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from typing import IO, NoReturn

import msgspec

from miniserve.config import EngineConfig
from miniserve.parallel.child import on_signals, start_python
from miniserve.server.config import ServerConfig


def exit_at_once(number: int) -> NoReturn:
    """End the process as by the signal `number`; the system then ends the engine's."""
    os._exit(128 + number)


class ServerEnded(Exception):
    """It ended before it answered, and has written why."""


class ServerStart(msgspec.Struct, frozen=True, kw_only=True):
    """What the process reads from its stdin, which, unlike its arguments, nobody else sees. `quiet`: to write errors
    alone."""

    engine: EngineConfig
    server: ServerConfig
    quiet: bool
    parent_pid: int


class ServerProcess:
    """Runs for the time of a `with` block, whose end drains it; a second signal meanwhile ends all at once.

    Entering waits until it answers, at `url`, or raises `ServerEnded`. `exit_code` counts once it has ended. It writes
    to `log`, or to stderr, and does not outlive this process.
    """

    def __init__(
        self, engine: EngineConfig, server: ServerConfig, *, quiet: bool, log: IO[bytes] | None = None
    ) -> None:
        self._start = ServerStart(engine=engine, server=server, quiet=quiet, parent_pid=os.getpid())
        self._log = log
        self._process: subprocess.Popen[bytes]
        self.url = ""
        self.leaving = False

    def __enter__(self) -> ServerProcess:
        pipe = subprocess.PIPE  # stdin is held open: its end tells to drain
        self._process = start_python("miniserve", "serve-for-parent", stdin=pipe, stdout=pipe, stderr=self._log)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            with suppress(BrokenPipeError):
                self._process.stdin.write(msgspec.json.encode(self._start) + b"\n")
                self._process.stdin.flush()
            self.url = self._process.stdout.readline().decode().strip()
        except BaseException:
            self.__exit__()
            raise
        if not self.url:
            self.wait()
            raise ServerEnded
        return self

    def __exit__(self, *_: object) -> None:
        self.leaving = True
        with on_signals(exit_at_once):
            if self.url and self._process.stdin is not None:
                self._process.stdin.close()
            else:
                self._process.terminate()
            self.wait()

    def wait(self) -> None:
        """Until it has ended."""
        self._process.wait()

    @property
    def exit_code(self) -> int:
        code = self._process.wait()
        return code if code >= 0 else 128 - code
