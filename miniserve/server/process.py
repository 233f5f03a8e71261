"""A server in a process of its own, beneath a chat prompt or a benchmark: it shares no interpreter with its clients.
And what signals do to a process of a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, NoReturn

import msgspec

from miniserve.config import EngineConfig
from miniserve.server.config import ServerConfig

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def on_signals(handler: Callable[[int], None], numbers: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Have `handler` called, in the main thread and between any two of its instructions, for each of these signals.

    SIGINT and SIGHUP that were ignored when the process started stay ignored, as everywhere: by that a shell's script
    keeps Ctrl-C from what it runs in the background, and `nohup` the end of the terminal.
    """
    before = {number: signal.getsignal(number) for number in numbers}
    ignored = [number for number in before if before[number] is signal.SIG_IGN and number != signal.SIGTERM]
    taken = [number for number in numbers if number not in ignored]
    for number in taken:
        signal.signal(number, lambda number, _: handler(number))
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


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
        self._process = subprocess.Popen(
            # -P: a file called torch.py in the working directory is not to be imported.
            [sys.executable, "-P", "-m", "miniserve", "serve-for-parent"],
            stdin=subprocess.PIPE,  # held open: its end tells to drain
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            process_group=0,  # the terminal's Ctrl-C is for this process alone
        )
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
