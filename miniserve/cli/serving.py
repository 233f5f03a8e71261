"""Run a server in this process: load the model, report, serve."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Callable, Coroutine

import msgspec

from miniserve import __version__
from miniserve.cli import EXIT_FAILURE
from miniserve.cli.report import Report, client_url
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.engine.client import EngineDead
from miniserve.engine.launch import set_up_logging
from miniserve.engine.replicas import make_engine
from miniserve.models.hub import locate
from miniserve.parallel.child import die_with_parent, on_signals
from miniserve.server.config import ServerConfig
from miniserve.server.process import ServerStart
from miniserve.server.serve import check_tls, is_local, listening, loop_factory, serve


def run_for_parent() -> int:
    """As a `ServerProcess`: stdin says what to serve, stdout where it answers. Returns the exit code."""
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the terminal is another's, but may be written to
    try:
        asked = msgspec.json.decode(sys.stdin.buffer.readline(), type=ServerStart)
    except msgspec.DecodeError:
        raise UserError("This command is for miniserve's own use; `miniserve serve` starts a server.") from None
    die_with_parent(asked.parent_pid)
    return run_server(asked.engine, asked.server, Report(quiet=asked.quiet), _obey_parent)


def _obey_parent(url: str, stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def at_end_of_stdin() -> None:
        loop.remove_reader(0)
        stop.set()

    loop.add_reader(0, at_end_of_stdin)
    print(url, flush=True)


def run_server(
    engine: EngineConfig,
    server: ServerConfig,
    report: Report,
    on_ready: Callable[[str, asyncio.Event], None] = lambda url, stop: None,
) -> int:
    """Serve until a signal or the engine's death ends it; returns the exit code. `on_ready` gets the URL, and an event
    that ends it, too."""
    set_up_logging(engine.log_level, engine.log_format)
    if engine.log_level != "debug":
        for library in ("httpx", "httpx2"):  # they log each request at info
            logging.getLogger(library).setLevel(logging.WARNING)
    check_tls(server)
    # The port comes first: one in use is to be reported before anything is downloaded or loaded.
    with listening(server) as sock:
        source = locate(engine.model, engine.revision, weights=engine.load_format != "dummy", notify=report.note)
        report.line(f"miniserve {__version__}: {source.name}, {source.origin}")
        url = server_url(server, sock)
        local, stop = is_local(sock), asyncio.Event()

        def answers() -> None:
            names = server.served_model_names or (source.name,)
            report.ready(url, names[0], with_key=bool(server.api_keys), uds=server.uds)
            if not (server.api_keys or local):
                report.note("Whoever can reach this machine can use the server; --api-key makes it ask for a key.")
            on_ready(url, stop)

        async def run() -> int:
            client = make_engine(engine, source.path, source.name, server.step_timeout)
            with report.loading() as progress:
                await client.start(progress)
            report.engine(client.info, len(client.engines))
            return await serve(client, server, sock, on_ready=answers, stop=stop)

        try:
            return _run(run)
        except EngineDead as error:  # a bug or a broken device: its traceback, where there is one, was written before
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILURE


def run_ranks(engine: EngineConfig, report: Report) -> int:
    """Run the ranks of a host that is not the first, until that ends; returns the exit code."""
    from miniserve.runner.ranks import run_node  # here and not above: a server needs no torch

    source = locate(engine.model, engine.revision, weights=engine.load_format != "dummy", notify=report.note)
    return run_node(engine, source.path, report.line)


def server_url(server: ServerConfig, sock: socket.socket) -> str:
    """Where a client on this machine reaches it. Over a unix socket any host name does."""
    url = client_url(server.host, sock.getsockname()[1]) if server.uds is None else "http://localhost"
    return url if server.ssl_certfile is None else url.replace("http:", "https:", 1)


def _run(serving: Callable[[], Coroutine[None, None, int]]) -> int:
    """The exit code; a signal cancels it while the model loads. The server then sets handlers of its own."""
    interrupted_by = 0

    async def main() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def give_up(number: int) -> None:
            nonlocal interrupted_by
            interrupted_by = number
            loop.call_soon_threadsafe(task.cancel)

        with on_signals(give_up):
            return await serving()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        try:
            return runner.run(main())
        except asyncio.CancelledError:
            return 128 + interrupted_by
