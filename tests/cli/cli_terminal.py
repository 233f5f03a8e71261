"""Run the command as a user does: as a process, its input a terminal, a pipe or nothing."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from types import TracebackType

COMMAND = [sys.executable, "-m", "miniserve"]
TIMEOUT = 180.0  # seconds; a machine at work loads slowly


def environment() -> dict[str, str]:
    """Plain and reproducible: no width, colour, proxy or hub of the developer's."""
    dropped = ("HF_", "COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "HTTP_PROXY", "http_proxy", "ALL_PROXY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    return kept | {"TERM": "dumb", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def run(*arguments: str, text: str | None = None, timeout: float = TIMEOUT) -> subprocess.CompletedProcess[str]:
    """The finished command; its stdin is a pipe with `text`, or /dev/null."""
    feed = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    return subprocess.run(
        [*COMMAND, *arguments], check=False, capture_output=True, text=True, timeout=timeout, env=environment(), **feed
    )


_IMPORT_AND_FORK = """
import json, os, sys, tempfile, traceback
import miniserve.cli.bench
from miniserve.cli.main import main

for line in sys.stdin:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        if (pid := os.fork()) == 0:
            for place, file in enumerate((open(os.devnull), out, err)):
                os.dup2(file.fileno(), place)
            sys.argv = ["miniserve", *json.loads(line)]
            code = 0
            try:
                main()
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
    print(json.dumps([code, *texts]), flush=True)
"""


class Forked:
    """`run` by forks of a process that has imported the command, as importing is what takes longest."""

    def __init__(self) -> None:
        command, pipes = [sys.executable, "-c", _IMPORT_AND_FORK], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen(command, text=True, env=environment(), **pipes)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(arguments), file=self._process.stdin, flush=True)
        code, stdout, stderr = json.loads(self._process.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, stdout, stderr)

    def close(self) -> None:
        self._process.communicate()


class Running:
    """The command while it runs, without a terminal; `stderr` is what it wrote there so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            start_new_session=True,
        )
        assert self.process.stderr is not None
        self._output = self.process.stderr.fileno()
        self.stderr = ""

    def __enter__(self) -> Running:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()

    def wait_for(self, text: str) -> str:
        """Returns what was written once `text` is in it; fails where the output ends without it."""
        deadline = time.monotonic() + TIMEOUT
        while text not in self.stderr:
            self._read(deadline, text)
        return self.stderr

    def wait(self) -> int:
        """The exit code, all output being read."""
        code = self.process.wait(TIMEOUT)
        assert self.process.stderr is not None
        os.set_blocking(self._output, True)
        self.stderr += self.process.stderr.read().decode(errors="replace")
        return code

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def _read(self, deadline: float, wanted: str) -> None:
        readable, _, _ = select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))
        piece = os.read(self._output, 65536) if readable else b""
        assert piece, f"{wanted!r} did not come; there was {self.stderr!r}"
        self.stderr += piece.decode(errors="replace")


class Terminal:
    """The command at a terminal: stdin, stdout and stderr are one pseudo-terminal, which it controls.

    `output` is all that was shown; `type` and `wait_for` are the user's hands and eyes.
    """

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        # A session's leader that opens a terminal controls it: signals of its keys go to the command.
        take_terminal = ["sh", "-c", 'exec "$@" < "$0"', os.ttyname(slave)]
        self.process = subprocess.Popen(
            [*take_terminal, *COMMAND, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(),
            start_new_session=True,
        )
        os.close(slave)
        self.output = ""
        self._seen = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str) -> str:
        """Wait until `text` is shown after what was waited for before; returns what was shown since then."""
        deadline = time.monotonic() + TIMEOUT
        while (end := self.output.find(text, self._seen)) < 0:
            assert self._read(deadline), f"{text!r} was not shown after {self.output[: self._seen]!r}: {self.output!r}"
        shown = self.output[self._seen : end + len(text)]
        self._seen = end + len(text)
        return shown

    def interrupt_until(self, text: str) -> str:
        """Press Ctrl-C until `text` is shown, once a second; returns what was shown since the last wait.

        Python's readline sees a Ctrl-C that comes between two of its waits for a key only at the next key.
        """
        deadline = time.monotonic() + TIMEOUT
        while True:
            self.type("\x03")
            pause = min(deadline, time.monotonic() + 1.0)
            while self.output.find(text, self._seen) < 0 and time.monotonic() < pause:
                self._read(pause)
            if self.output.find(text, self._seen) >= 0 or time.monotonic() >= deadline:
                return self.wait_for(text)

    def interrupt_and_wait(self) -> int:
        """The exit code after a Ctrl-C, which is pressed again only where it was missed (see `interrupt_until`)."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            self.type("\x03")
            pause = time.monotonic() + 10.0
            while self._read(pause):
                pass
            if time.monotonic() < pause:  # not the pause, but the output has ended
                return self.process.wait(TIMEOUT)
        raise AssertionError(f"Ctrl-C did not end the command: {self.output!r}")

    def wait(self) -> int:
        """The exit code, once all that is shown was read."""
        deadline = time.monotonic() + TIMEOUT
        while self._read(deadline):
            pass
        return self.process.wait(TIMEOUT)

    def _read(self, deadline: float) -> bool:
        readable, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
        try:
            piece = os.read(self._master, 65536) if readable else b""
        except OSError:  # the other end is closed
            return False
        self.output += piece.decode(errors="replace").replace("\r\n", "\n")
        return bool(piece)
