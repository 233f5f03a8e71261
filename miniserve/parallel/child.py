"""Processes that belong to this one and end with it, and what signals do to this one. No torch."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

_PR_SET_PDEATHSIG = 1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def start_python(
    module: str,
    *arguments: str,
    stdin: int | IO[bytes],
    stdout: int | None = None,
    stderr: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Run a module of this program. The process has a process group of its own, so that a Ctrl-C in the terminal
    reaches this one alone. stdin: something whose end tells the process that this one is gone."""
    return subprocess.Popen(
        # -P: a file called torch.py in the working directory is not to be imported.
        [sys.executable, "-P", "-m", module, *arguments],
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        # Threads wait for each other some 30 us, then sleep: where another process wants the core too, as this one
        # does, the default of milliseconds of spinning was measured to make a decode step 30 times as long.
        env={"GOMP_SPINCOUNT": "3000", **os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        process_group=0,
    )


def ignore_signals() -> None:
    """The parent decides when this process ends: a Ctrl-C or a service manager signals both at once."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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


def die_with_parent(parent_pid: int) -> None:
    """Have this process killed when the thread that started it ends; on Linux alone."""
    if sys.platform == "linux":
        # Also where this process hangs in a kernel or holds the interpreter's lock.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it died before the line above
        os._exit(1)


def describe_exit(code: int, what: str) -> str:
    """How a process ended whose returncode is `code`, as the rest of a sentence about `what`."""
    if code >= 0:
        return f"{what} exited with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        return f"{what} was killed by signal {-code}"
    hint = "; the system may have run out of memory" if name == "SIGKILL" else ""
    return f"{what} was killed by {name}{hint}"


def is_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child is stopped (SIGSTOP)."""
    if process.returncode is not None:
        return False
    try:
        # WNOWAIT: nothing is taken from what `poll` looks for.
        return os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # it has ended, and the system has reaped it
        return False


def is_busy(process: subprocess.Popen[bytes]) -> bool:
    """Whether a child's main thread runs, or waits for nothing but a core; known on Linux alone."""
    try:
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "R"
