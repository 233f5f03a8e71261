"""`miniserve run` and `miniserve serve`: load a model and serve it."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from miniserve.cli.config_file import ConfigFile
from miniserve.cli.settings import refuse_given, with_settings
from miniserve.config import EngineConfig, api_key_from_environment
from miniserve.server.config import ServerConfig, read_api_keys

ApiKeyFile = Annotated[
    Path | None, typer.Option(help="File with a key on each line that clients may send.", rich_help_panel="Server")
]


@with_settings()
def run(
    ctx: typer.Context,
    engine: EngineConfig,
    server: ServerConfig,
    api_key_file: ApiKeyFile = None,
    config: ConfigFile = None,
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

    server = with_all_keys(server, api_key_file)
    _check_address(ctx, server)
    raise typer.Exit(start(engine, server, prompt=prompt, chat=not no_chat, refuse=partial(refuse_given, ctx)))


@with_settings()
def serve(
    ctx: typer.Context,
    engine: EngineConfig,
    server: ServerConfig,
    api_key_file: ApiKeyFile = None,
    config: ConfigFile = None,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API, without chat."""
    from miniserve.cli.start import start

    server = with_all_keys(server, api_key_file)
    _check_address(ctx, server)
    raise typer.Exit(start(engine, server, prompt=None, chat=False, refuse=partial(refuse_given, ctx)))


def serve_for_parent() -> None:
    """Serve what standard input says (see `server.process`); hidden, as it is for this program alone."""
    from miniserve.cli.serving import run_for_parent

    raise typer.Exit(run_for_parent())


def _check_address(ctx: typer.Context, server: ServerConfig) -> None:
    if server.uds is not None:
        refuse_given(
            ctx, ("host", "port"), "with --uds the server listens on that socket alone; leave one of them out."
        )


def with_all_keys(server: ServerConfig, file: Path | None) -> ServerConfig:
    """Keys of the flag, the file and the environment: any of them opens the server."""
    if server.api_keys:
        sentence = "Every user of this machine sees --api-key in the process list; --api-key-file keeps it private."
        print(sentence, file=sys.stderr)
    keys = server.api_keys if file is None else (*server.api_keys, *read_api_keys(file))
    key = api_key_from_environment()
    return replace(server, api_keys=keys if key is None else (*keys, key))
