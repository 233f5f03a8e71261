"""Start the engine process and hold on to it: its sockets, its private directory, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import zmq

from miniserve.core import UserError
from miniserve.engine import messages
from miniserve.parallel.child import describe_exit, is_stopped, start_python

_MAX_SOCKET_PATH = 100  # the system's limit is 107 bytes
_KILL_TIMEOUT = 5.0  # seconds
_STOPPED = 3.0  # seconds that a process may be stopped (SIGSTOP) before it counts as dead


class EngineProcess:
    """A running engine process. To be used from one thread, since ZMQ sockets have one owner.

    The sockets lie in a directory that only this user may enter; no TCP port is used. The process gets a process group
    of its own, so a Ctrl-C in the terminal reaches the API process alone. On Linux the engine is killed when the thread
    that made this object ends, so make it in the thread that stays.
    """

    def __init__(self, start: messages.Start) -> None:
        self._directory = _private_directory()
        self._context = zmq.Context()
        self._commands = zmq.Socket(self._context, zmq.PUSH)
        self.events = zmq.Socket(self._context, zmq.PULL)
        for socket, name in ((self._commands, messages.COMMANDS_SOCKET), (self.events, messages.OUTPUTS_SOCKET)):
            socket.set_hwm(0)  # no message is ever dropped or waits for the reader
            socket.bind(f"ipc://{self._directory / name}")
        self._encode = msgspec.msgpack.Encoder().encode
        (self._directory / messages.START_FILE).write_bytes(self._encode(start))
        # Its stdin is never written.
        self._process = start_python("miniserve.engine.process", str(self._directory), stdin=subprocess.PIPE)
        self.pid = self._process.pid
        self._stopped_since: float | None = None

    def remove_directory(self) -> None:
        """Once both sides are connected no path is needed: so a process that is killed leaves nothing behind."""
        shutil.rmtree(self._directory, ignore_errors=True)

    def send(self, command: messages.Command) -> None:
        """Never blocks. A command to a process that has ended goes nowhere; `exit_reason` tells."""
        if self._commands.closed:
            return
        with contextlib.suppress(zmq.Again):
            self._commands.send(self._encode(command), zmq.NOBLOCK)

    async def wait(self, seconds: float) -> bool:
        """Wait for an event, so many seconds at most; returns whether there is one.

        `zmq.asyncio` makes several futures for each event, and a timer. The socket's file is readable from the first
        event on that comes after one was looked for in vain.
        """
        if self.events.poll(0):
            return True
        loop = asyncio.get_running_loop()
        woken = loop.create_future()
        timer = loop.call_later(seconds, _wake, woken)
        loop.add_reader(self.events.FD, _wake, woken)
        try:
            await woken
        finally:
            loop.remove_reader(self.events.FD)
            timer.cancel()
        return bool(self.events.poll(0))

    def exit_reason(self) -> str | None:
        """How the process ended, or None while it runs. One that stays stopped has ended, too: `close` kills it."""
        code = self._process.poll()
        if code is not None:
            return describe_exit(code, "the engine process")
        if not self.is_stopped:
            self._stopped_since = None
            return None
        self._stopped_since = self._stopped_since or time.monotonic()
        if time.monotonic() - self._stopped_since < _STOPPED:
            return None
        return f"the engine process was stopped (SIGSTOP) and did not go on for {_STOPPED:.0f} s"

    @property
    def ended_in_order(self) -> bool:
        return self._process.returncode == 0

    @property
    def is_stopped(self) -> bool:
        return is_stopped(self._process)

    def close(self) -> None:
        """Kill the process if it still runs, wait for it, and remove what was made for it. May be called again."""
        if self._process.poll() is None:
            self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in a driver; the system will reap it
            self._process.wait(_KILL_TIMEOUT)
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._commands.close(linger=0)
        self.events.close(linger=0)
        self._context.term()
        self.remove_directory()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def set_up_logging(level_name: str, log_format: str) -> None:
    """To stderr, as all processes of a server do: lines of text, or a JSON object on each line."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(_JsonLines() if log_format == "json" else text)
    logging.basicConfig(level=level_name.upper(), handlers=[handler])


class _JsonLines(logging.Formatter):
    """A record with `fields` has those instead of a message."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, object] = {"time": time, "level": record.levelname.lower(), "logger": record.name}
        entry |= getattr(record, "fields", None) or {"message": record.getMessage()}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry).decode()


def _private_directory() -> Path:
    """Raises `UserError` where no directory for temporary files can be written."""
    try:
        directory = Path(tempfile.mkdtemp(prefix="miniserve-"))
        if len(os.fsencode(directory / messages.COMMANDS_SOCKET)) <= _MAX_SOCKET_PATH:
            return directory
        directory.rmdir()
        return Path(tempfile.mkdtemp(prefix="miniserve-", dir="/tmp"))
    except OSError as error:
        if error.errno == errno.ENOSPC:  # which the command line reports, as for every other file
            raise
        raise UserError(
            f"No temporary directory can be written ({error.strerror}); set TMPDIR to one that can."
        ) from error
