"""`miniserve run` and `miniserve serve`: load a model and serve it."""

from __future__ import annotations

from typing import Annotated

import typer

from miniserve.cli.settings import with_settings
from miniserve.config import EngineConfig
from miniserve.server.config import ServerConfig


@with_settings()
def run(
    engine: EngineConfig,
    server: ServerConfig,
    no_chat: Annotated[
        bool, typer.Option("--no-chat", help="Do not chat, even at a terminal.", rich_help_panel="Chat")
    ] = False,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Answer this on stdout and exit; `-` reads it from stdin.",
            rich_help_panel="Chat",
        ),
    ] = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API; at a terminal, also chat with it.

    Piped text is answered once, as with -p.
    """
    # Here and not above: the server's imports would slow down `miniserve --help`.
    from miniserve.cli.start import start

    raise typer.Exit(start(engine, server, prompt=prompt, chat=not no_chat))


@with_settings()
def serve(engine: EngineConfig, server: ServerConfig) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, without chat."""
    from miniserve.cli.start import start

    raise typer.Exit(start(engine, server, prompt=None, chat=False))
