"""`miniserve serve` in another process, for benchmarks: server and client share no interpreter."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import httpx

from miniserve.config import EngineConfig
from miniserve.core import UserError

_POLL = 0.1  # seconds
_LEAVE = 30.0  # seconds for a server to end before it is killed
_SHOWN_LINES = 5  # of the log of a server that did not start


@contextlib.contextmanager
def running_server(engine: EngineConfig) -> Iterator[str]:
    """Start a server and yield its root URL once it answers; it stops with the block. Raises `UserError` with the end
    of its log if it does not start."""
    with tempfile.TemporaryDirectory(prefix="miniserve-bench-") as folder:
        path = Path(folder) / "log"
        port = _free_port()
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "miniserve", "serve", f"--port={port}", *arguments(engine)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        try:
            root = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, root, path)
            yield root
        finally:
            _end(process)


def _wait_until_ready(process: subprocess.Popen[bytes], root: str, log: Path) -> None:
    with httpx.Client(trust_env=False, timeout=5.0) as client:
        while process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if client.get(f"{root}/health").status_code == 200:
                    return
            time.sleep(_POLL)
    lines = log.read_text(errors="replace").strip().splitlines()[-_SHOWN_LINES:]
    raise UserError(f"The server did not start (exit code {process.returncode}): " + "\n".join(lines))


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_LEAVE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def arguments(engine: EngineConfig) -> list[str]:
    """The arguments of `miniserve serve` for this engine."""
    options, model = [], []
    for field in fields(engine):
        value, flag = getattr(engine, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if field.name == "model":
            model = ["--", value]
        elif isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag.removeprefix('enable-')}")
        else:
            options.append(f"--{flag}={value}")
    return options + model
