"""`miniserve chat`: chat with a running server."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from miniserve.config import api_key_from_environment
from miniserve.core import UserError
from miniserve.server.config import check_api_key


def chat(
    url: Annotated[str, typer.Option(help="URL of the server, with or without /v1.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Model name on the server.", show_default="its first")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="API key of the server.", callback=check_api_key, show_default="the variable MINISERVE_API_KEY"
        ),
    ] = None,
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Answer this on stdout and exit; `-` reads it from stdin.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", show_default="the server's")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer, tokens.", show_default="the server's")] = None,
) -> None:
    """Chat with a running server: a prompt at a terminal, or one answer with -m or piped text."""
    # Here and not above: the HTTP library would slow down `miniserve --help`.
    from miniserve.cli.repl import ChatClient, ChatSettings, Repl, answer_once, read_text

    key = api_key if api_key is not None else check_api_key(api_key_from_environment())
    client = ChatClient(url, model=model, api_key=key)
    settings = ChatSettings(system=system, temperature=temperature, max_tokens=max_tokens)
    if message is None and sys.stdin.isatty():
        print(f"{client.model} at {client.url}; /help lists the commands.", file=sys.stderr)
        Repl(client, settings).run()
        return
    text = read_text().strip() if message in (None, "-") else message
    if not text:
        raise UserError("There is no message: pass -m TEXT, or pipe text in.")
    raise typer.Exit(answer_once(client, text, settings))
