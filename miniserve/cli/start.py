"""Decide what `miniserve run` does (serve, serve and chat, or answer once), and do it."""

from __future__ import annotations

import logging
import secrets
import sys
from dataclasses import replace

from miniserve import __version__
from miniserve.cli import EXIT_FAILURE
from miniserve.cli.chat_client import ChatClient, ChatError, ChatSettings, Message
from miniserve.cli.repl import Repl, print_answer
from miniserve.cli.report import Report, client_url
from miniserve.cli.serving import BackgroundServer, Launch, Terminated, serve_alone, terminated_by_signals
from miniserve.cli.stdin import can_chat, read_piped_text, read_text
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.engine.client import EngineDead
from miniserve.models.hub import locate
from miniserve.server.config import ServerConfig
from miniserve.server.serve import bind, is_local


def start(engine: EngineConfig, server: ServerConfig, *, prompt: str | None, chat: bool) -> int:
    """Returns the exit code of the process. `chat`: a prompt or piped text is welcome. Raises `UserError`."""
    if prompt == "-":
        prompt = read_text()
    elif prompt is None and chat:
        prompt = read_piped_text()
    if prompt is not None and not prompt.strip():
        raise UserError("There is nothing to answer: the text is empty.")
    _set_up_logging(engine.log_level)
    try:
        return _start(engine, server, prompt, chat)
    except EngineDead as error:  # a bug or a broken device: its traceback, where there is one, was written before
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE


def _start(engine: EngineConfig, server: ServerConfig, prompt: str | None, chat: bool) -> int:
    if prompt is not None:
        # For this process alone: a free port, and a key that nobody else knows.
        private = replace(server, host="127.0.0.1", port=0, api_keys=(secrets.token_hex(16),), log_interval=0)
        return _answer_once(_prepare(engine, private, quiet=True), prompt)
    with_chat = chat and can_chat()
    if with_chat:
        server = replace(server, log_interval=0)  # no lines between those of a conversation
    launch = _prepare(engine, server, quiet=engine.log_level not in ("debug", "info"))
    return _serve_and_chat(launch) if with_chat else serve_alone(launch, lambda: _tell_url(launch))


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if level != "debug":
        for library in ("httpx", "httpx2"):  # they log each request at info
            logging.getLogger(library).setLevel(logging.WARNING)


def _prepare(engine: EngineConfig, server: ServerConfig, *, quiet: bool) -> Launch:
    """Take the port, then find the model: a port in use is to be told before anything is downloaded or loaded."""
    report = Report(quiet=quiet)
    sock = bind(server.host, server.port)
    try:
        source = locate(engine.model, engine.revision, weights=engine.load_format != "dummy", notify=report.note)
    except BaseException:
        sock.close()
        raise
    report.line(f"miniserve {__version__}: {source.name}, {source.origin}")
    server = replace(server, port=sock.getsockname()[1])
    return Launch(engine=engine, server=server, source=source, socket=sock, report=report)


def _tell_url(launch: Launch) -> None:
    names = launch.server.served_model_names or (launch.source.name,)
    launch.report.ready(launch.server.host, launch.server.port, names[0], with_key=bool(launch.server.api_keys))
    if not launch.server.api_keys and not is_local(launch.socket):
        launch.report.note("Whoever can reach this machine can use the server; --api-key makes it ask for a key.")


def _client(launch: Launch) -> ChatClient:
    keys = launch.server.api_keys
    return ChatClient(client_url(launch.server.host, launch.server.port), api_key=keys[0] if keys else None)


def _serve_and_chat(launch: Launch) -> int:
    background = BackgroundServer(launch)
    try:
        with terminated_by_signals(), background:
            _tell_url(launch)
            launch.report.line("Chat here, or use the URL; /help lists the commands, /bye ends the server.")
            Repl(_client(launch), ChatSettings(), leave_on_interrupt=True).run()
    except Terminated as end:
        return background.exit_code if background.answers else end.exit_code
    return background.exit_code


def _answer_once(launch: Launch, prompt: str) -> int:
    try:
        with terminated_by_signals(), BackgroundServer(launch):
            print_answer(_client(launch), [Message("user", prompt)], ChatSettings())
    except ChatError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except Terminated as end:
        return end.exit_code
    return 0
