"""Decide what `miniserve run` does (serve, serve and chat, or answer once), and do it.

A server alone runs in this process. Beneath a chat prompt, or for one answer, it has a process of its own.
"""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NoReturn

from miniserve.cli.repl import (
    ChatClient,
    ChatSettings,
    Repl,
    answer_once,
    can_chat,
    read_piped_text,
    read_text,
    require_stdout,
)
from miniserve.cli.report import Report
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.parallel.child import on_signals
from miniserve.server.config import ServerConfig
from miniserve.server.process import ServerEnded, ServerProcess

# What is for the clients of a server, of which one answer has none.
_FOR_CLIENTS = (
    "host", "port", "uds", "ssl_keyfile", "ssl_certfile", "root_path", "api_keys", "api_key_file", "allowed_hosts",
    "allowed_origins", "served_model_names", "max_queue", "enable_tokenizer_info", "trust_request_chat_template",
    "strict_fields", "log_requests", "log_prompts",
)  # fmt: skip


def start(
    engine: EngineConfig,
    server: ServerConfig,
    *,
    prompt: str | None,
    chat: bool,
    refuse: Callable[[Collection[str], str], None],
) -> int:
    """Returns the exit code of the process. `chat`: a prompt or piped text is welcome. `refuse` raises for settings
    that the user chose, with the reason. Raises `UserError`."""
    if engine.node_rank:
        if prompt is not None:
            raise UserError("--prompt is for host 0; this one only runs ranks for it, as --node-rank says.")
        from miniserve.cli.serving import run_ranks

        return run_ranks(engine, Report(quiet=False))
    if prompt == "-":
        prompt = read_text()
    elif prompt is None and chat:
        prompt = read_piped_text()
    if prompt is not None and not prompt.strip():
        raise UserError("There is nothing to answer: the text is empty.")
    quiet = engine.log_level not in ("debug", "info")
    if prompt is not None:
        require_stdout()  # before a model is loaded for nothing
        refuse(
            _FOR_CLIENTS,
            "one answer has no use for this; leave it out or, to serve, leave out the prompt (piped text with "
            "--no-chat).",
        )
        # For this process alone: a free port, and a key that nobody else knows.
        private = replace(server, port=0, api_keys=(secrets.token_hex(16),))
        return _with_server(engine, private, True, lambda client: _answer_once(client, prompt))
    if chat and can_chat():
        if server.uds is not None or server.ssl_certfile is not None:
            raise UserError(
                "The chat speaks HTTP over a port: with --uds or TLS add --no-chat, or use `miniserve serve`."
            )
        if server.log_prompts:
            refuse(("log_prompts",), "no line stands between those of a chat; add --no-chat, or use `miniserve serve`.")
        return _with_server(engine, server, quiet, lambda client: _chat(client, Report(quiet=quiet)))
    # Here and not above: beneath a conversation this process needs none of it.
    from miniserve.cli.serving import run_server

    return run_server(engine, server, Report(quiet=quiet, logs=engine.log_format == "json"))


# --- a server beneath a conversation ----------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM or SIGHUP came, or the server ended: leave, whatever runs in the main thread."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


def _raise_terminated(number: int) -> NoReturn:
    raise _Terminated(number)


def _with_server(
    engine: EngineConfig, server: ServerConfig, quiet: bool, converse: Callable[[ChatClient], int | None]
) -> int:
    """Run a server while `converse` talks with it. Returns the exit code: that of `converse`, or else the server's."""
    # No lines about progress and requests between those of a conversation.
    silent = replace(server, log_interval=0, log_requests=False, log_prompts=False)
    process = ServerProcess(engine, silent, quiet=quiet)
    try:
        # Ctrl-C is the prompt's.
        with on_signals(_raise_terminated, (signal.SIGTERM, signal.SIGHUP)), process:
            threading.Thread(target=_watch, args=(process,), daemon=True).start()
            code = converse(ChatClient(process.url, api_key=server.api_keys[0] if server.api_keys else None))
    except ServerEnded:
        code = None
    except _Terminated as end:
        code = None if process.url else end.exit_code
    return process.exit_code if code is None else code


def _watch(process: ServerProcess) -> None:
    process.wait()
    if not process.leaving:
        os.kill(os.getpid(), signal.SIGTERM)  # the main thread may be waiting for a line at the prompt


def _chat(client: ChatClient, report: Report) -> None:
    report.line("Chat here, or use the URL; /help lists the commands, /bye ends the server.")
    Repl(client, ChatSettings(), leave_on_interrupt=True).run()


def _answer_once(client: ChatClient, prompt: str) -> int:
    try:
        return answer_once(client, prompt, ChatSettings())
    except _Terminated as end:
        return end.exit_code
