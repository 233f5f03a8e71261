"""Run the app until a signal, the caller, or the engine's death ends it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import gc
import ipaddress
import logging
import os
import resource
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import cast

import uvicorn

from miniserve.core import UserError
from miniserve.engine.replicas import Engine
from miniserve.parallel.child import on_signals
from miniserve.server.app import create_app
from miniserve.server.config import ServerConfig
from miniserve.server.connection import Connection, Guard
from miniserve.server.gate import PaceMiddleware, RequestIdMiddleware
from miniserve.server.process import exit_at_once
from miniserve.server.steps import ProgressLine

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_ENGINE_DIED = 0, 1
_WATCH_INTERVAL = 0.2  # seconds between looks at the engine
_SWEEP_INTERVAL = 1.0  # seconds between looks at the connections
_LAST_WORDS = 3.0  # seconds that clients are answered with 503 after the engine has died
_GRACE = 5.0  # seconds for answers to leave after the engine has ended
_KEEP_ALIVE = 90  # seconds that a connection may rest
_BACKLOG = 2048
_OPEN_FILES = 65_536
_RESERVED_FILES = 64  # for all but clients' connections
# The garbage collector looks through all objects when it has looked through the young ones so often, here every 700,000
# that stay: with a thousand streams that takes 50 ms, and it finds nothing, as no request leaves any.
_FULL_COLLECTION = 100
_BODY_MEMORY = 64 * 2**20  # bytes, at least, for bodies that are not complete


def bind(host: str, port: int) -> socket.socket:
    """A bound socket, not listening yet: taken before the model is loaded, so that a port in use is known at once.

    Until it listens it has the port for itself: with SO_REUSEADDR two sockets could be bound to it. Port 0 takes any
    free one. Raises `UserError` with the remedy.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise UserError(f"--host {host!r} is no address of this machine ({error.args[-1]}); try 127.0.0.1.") from error
    sock = socket.socket(family, kind, protocol)
    try:
        try:
            sock.bind(address)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            _reuse_address(sock, True)  # connections of a server that has ended may be what is in the way
            sock.bind(address)
            _reuse_address(sock, False)
    except OSError as error:
        sock.close()
        raise UserError(_bind_failure(host, port, error)) from error
    sock.set_inheritable(False)
    return sock


def _reuse_address(sock: socket.socket, reuse: bool) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, reuse)


def bind_unix(path: str) -> socket.socket:
    """A bound unix socket, not listening yet. A file that a server left behind is replaced. Raises `UserError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == errno.ECONNREFUSED:
                    os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        sock.close()
        raise UserError(f"--uds {path} cannot be looked at: {error.strerror}.") from error
    try:
        sock.bind(path)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--uds {path} is there already; stop what listens there or choose another.") from error
        raise UserError(f"--uds {path} cannot be made: {error.strerror}.") from error
    return sock


@contextmanager
def listening(config: ServerConfig) -> Iterator[socket.socket]:
    """The bound socket that a configuration asks for. Raises `UserError`."""
    if config.uds is None:
        with bind(config.host, config.port) as sock:
            yield sock
        return
    with bind_unix(config.uds) as sock:
        try:
            yield sock
        finally:
            with suppress(OSError):
                os.unlink(config.uds)


def check_tls(config: ServerConfig) -> None:
    """Raises `UserError` where the files for TLS cannot be used."""
    if config.ssl_keyfile is None or config.ssl_certfile is None:
        return
    for name, path in (("--ssl-keyfile", config.ssl_keyfile), ("--ssl-certfile", config.ssl_certfile)):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise UserError(f"{name} {path} cannot be read: {error.strerror}.") from error

    def no_password() -> str:
        raise UserError(f"--ssl-keyfile {config.ssl_keyfile} is encrypted; give a key without a passphrase.")

    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, no_password)
    except ssl.SSLError as error:
        raise UserError(
            f"--ssl-certfile {config.ssl_certfile} and --ssl-keyfile {config.ssl_keyfile} are no certificate and its "
            f"key, as PEM ({error.reason or 'not readable'})."
        ) from error


def is_local(sock: socket.socket) -> bool:
    """Whether only this machine can reach a socket."""
    return sock.family == socket.AF_UNIX or ipaddress.ip_address(sock.getsockname()[0]).is_loopback


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
    engine: Engine, config: ServerConfig, sock: socket.socket, *, on_ready: Callable[[], None], stop: asyncio.Event
) -> int:
    """Serve a started engine on a socket of `listening` until it is over, end the engine, and return the exit code of
    the process.

    The first of `SIGNALS` (or `stop` being set) closes the port, lets running requests finish within `drain_timeout`,
    and gives 0; a second signal ends the process at once. If the engine dies, running requests are answered with an
    error, those that come within `_LAST_WORDS` with 503, and the code is 1. Raises `UserError` where another program
    took the port meanwhile.
    """
    max_connections = _max_connections()
    _grow_file_table(sock, max_connections)
    guard = Guard(max_connections, max(_BODY_MEMORY, 2 * config.max_body_bytes))
    server = _Server(
        uvicorn.Config(
            PaceMiddleware(RequestIdMiddleware(create_app(engine, config, _known_hosts(config, sock)))),
            ssl_keyfile=config.ssl_keyfile,
            ssl_certfile=config.ssl_certfile,
            http=cast(type[asyncio.Protocol], partial(Connection, guard)),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            log_level=logging.WARNING,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=int(config.drain_timeout + 2 * _GRACE),
            backlog=_BACKLOG,
        ),
        on_ready,
    )
    gc.collect()
    gc.freeze()  # what is there now stays: looking through all of it again would hold up streams for 0.1 s
    thresholds = gc.get_threshold()
    gc.set_threshold(*thresholds[:2], _FULL_COLLECTION)
    supervisor = asyncio.create_task(_supervise(engine, server, guard, config, stop))
    try:
        _listen(sock, config)
        await server.serve(sockets=[sock])
    finally:
        gc.set_threshold(*thresholds)
        supervisor.cancel()
        await asyncio.gather(supervisor, return_exceptions=True)
        in_order = await engine.shutdown(drain=False, timeout=_GRACE)
    if not in_order and not server.death_reported:
        logger.error("%s", engine.dead)
    return EXIT_OK if in_order else EXIT_ENGINE_DIED


def _listen(sock: socket.socket, config: ServerConfig) -> None:
    if sock.family != socket.AF_UNIX:
        _reuse_address(sock, True)  # what remains of its connections shall not keep the next server from the port
    try:
        sock.listen(_BACKLOG)
    except OSError as error:  # another program took the port since it was bound
        sock.close()
        raise UserError(_bind_failure(config.host, config.port, error)) from error


def _known_hosts(config: ServerConfig, sock: socket.socket) -> frozenset[str] | None:
    """The names that a Host header may have beside addresses; None: any, as where a client needs a key or where the
    server is for other machines, too, and no name was allowed."""
    if config.uds is not None and not config.allowed_hosts:  # no browser gets there
        return None
    if "*" in config.allowed_hosts or not (config.allowed_hosts or (is_local(sock) and not config.api_keys)):
        return None
    return frozenset(name.lower() for name in ("localhost", config.host, *config.allowed_hosts))


class _Server(uvicorn.Server):
    """uvicorn's server with our signals: it would raise a signal again after the shutdown that the signal asked for."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self.death_reported = False
        self._signalled = False
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        with on_signals(self._take_signal):
            yield

    def _take_signal(self, number: int) -> None:
        # A second one must work whatever the event loop does.
        if self.should_exit:
            exit_at_once(number)
        self._signalled = self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._signalled:  # not where it came: a handler may interrupt another line of the log
            logger.info("Shutting down: running requests finish first (a second signal ends at once).")
        await super().shutdown(sockets)


async def _supervise(engine: Engine, server: _Server, guard: Guard, config: ServerConfig, stop: asyncio.Event) -> None:
    """Wait for whatever ends the server first, then end the rest; meanwhile say how it goes."""
    progress, swept = ProgressLine(engine, config.log_interval), time.monotonic()
    while not (engine.dead or stop.is_set() or server.should_exit):
        await asyncio.sleep(_WATCH_INTERVAL)
        progress.tick()
        if (passed := time.monotonic() - swept) >= _SWEEP_INTERVAL:
            swept += passed
            if passed < 2 * _SWEEP_INTERVAL:  # else the server itself was late, and has not read yet what is there
                guard.sweep()
    if engine.dead:
        logger.error("%s The server answers with 503 for %.0f s, then ends.", engine.dead, _LAST_WORDS)
        server.death_reported = True
        end = time.monotonic() + _LAST_WORDS
        while time.monotonic() < end and not (stop.is_set() or server.should_exit):
            await asyncio.sleep(_WATCH_INTERVAL)
    server.should_exit = True
    await engine.shutdown(drain=True, timeout=config.drain_timeout)
    await asyncio.sleep(_GRACE)
    for connection in list(guard.connections):  # of clients that do not read their answers
        connection.transport.abort()


def _grow_file_table(sock: socket.socket, size: int) -> None:
    """Linux doubles a process's table of open files when it is full, and where there are threads that takes 8 to 30 ms
    (a grace period of RCU), in which all streams stand still. So it is made large before there are any: it holds the
    highest file for a moment, and does not shrink again."""
    with suppress(OSError):
        os.close(fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, size))


def _max_connections() -> int:
    """Each client takes an open file. The usual soft limit of 1024 is too few for a server, so it is raised first."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(1, most - _RESERVED_FILES)
