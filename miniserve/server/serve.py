"""Run the app until a signal, the caller, or the engine's death ends it."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from miniserve.core import UserError
from miniserve.engine.client import AsyncEngine
from miniserve.server.app import create_app
from miniserve.server.config import ServerConfig
from miniserve.server.progress import ProgressLine

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_ENGINE_DIED, EXIT_INTERRUPTED = 0, 1, 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WATCH_INTERVAL = 0.2  # seconds between looks at the engine
_GRACE = 5.0  # seconds for answers to leave after the engine has ended
_KEEP_ALIVE = 90  # seconds that a connection may rest
_OPEN_FILES = 65_536


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet: taken before the model is loaded, so that a port in use is told at once.

    Port 0 takes any free one. Raises `UserError` with the remedy.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {host!r} is no address of this machine ({error.args[-1]}); try 127.0.0.1.") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise UserError(_bind_failure(host, port, error)) from error
    sock.set_inheritable(False)
    return sock


def _bind_failure(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} on {host} is already in use; stop what listens there or choose another with --port."
    if error.errno == errno.EACCES:
        return f"Port {port} may only be opened by the administrator; choose one above 1023 with --port."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"--host {host!r} is no address of this machine; use 127.0.0.1, or 0.0.0.0 for all its networks."
    return f"Cannot listen on {host} port {port}: {error.strerror}."


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """The fastest event loop installed, for `asyncio.Runner(loop_factory=…)`."""
    return uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()


async def serve(
    engine: AsyncEngine,
    config: ServerConfig,
    *,
    sock: socket.socket | None = None,
    on_ready: Callable[[], None] | None = None,
    stop: asyncio.Event | None = None,
) -> int:
    """Serve a started engine until it is over, end the engine, and return the exit code of the process.

    The first SIGINT or SIGTERM (or `stop` being set) closes the port, lets running requests finish within
    `drain_timeout`, and gives 0; a second signal ends at once and gives 130. If the engine dies, running requests are
    answered with an error and the code is 1. `sock` comes from `bind`; without it this binds, raising `UserError`.
    """
    sock = sock if sock is not None else bind(config.host, config.port)
    _raise_open_files_limit()
    server = _Server(
        uvicorn.Config(
            create_app(engine, config),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            log_level=logging.WARNING,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=int(config.drain_timeout + _GRACE),
        ),
        on_ready,
    )
    gc.collect()
    gc.freeze()  # what is there now stays: looking through all of it again would hold up streams for 0.1 s
    supervisor = asyncio.create_task(_supervise(engine, server, config, stop or asyncio.Event()))
    try:
        await server.serve(sockets=[sock])
    except OSError as error:  # another program took the port since it was bound
        raise UserError(_bind_failure(config.host, config.port, error)) from error
    finally:
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        await engine.shutdown(drain=False, timeout=_GRACE)
    if server.engine_died:
        return EXIT_ENGINE_DIED
    return EXIT_INTERRUPTED if server.force_exit else EXIT_OK


class _Server(uvicorn.Server):
    """uvicorn's server with our signals: it would raise a signal again after the shutdown that the signal asked for."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self.engine_died = False
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)

    def _signalled(self) -> None:
        if not self.should_exit:
            logger.info("Shutting down: running requests finish first (a second signal ends at once).")
            self.should_exit = True
            return
        self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def _supervise(engine: AsyncEngine, server: _Server, config: ServerConfig, stop: asyncio.Event) -> None:
    """Wait for whatever ends the server first, then end the rest; meanwhile say how it goes."""
    progress = ProgressLine(engine, config.log_interval)
    while not (engine.dead or stop.is_set() or server.should_exit):
        await asyncio.sleep(_WATCH_INTERVAL)
        progress.tick()
    if engine.dead:
        logger.error("%s The server ends.", engine.dead)
        server.engine_died = True
        server.should_exit = True
        return
    server.should_exit = True
    await engine.shutdown(drain=True, timeout=config.drain_timeout)


def _raise_open_files_limit() -> None:
    """Each client takes a file; the usual soft limit of 1024 is too few for a server."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
