"""The `miniserve` command: its subcommands, and how errors are reported."""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from miniserve import __version__
from miniserve.cli import EXIT_FAILURE, EXIT_USAGE
from miniserve.cli.chat import chat
from miniserve.cli.check import check
from miniserve.cli.doctor import doctor
from miniserve.cli.explain import explain
from miniserve.cli.run import run, serve, serve_for_parent
from miniserve.cli.tune import tune
from miniserve.core import InvalidRequest, UserError


@dataclass(slots=True)
class State:
    """`debug`: show tracebacks of errors."""

    debug: bool = False


class _Commands(TyperGroup):
    """The subcommands. `bench` is imported only when it is used, because it imports much of the program."""

    def list_commands(self, ctx: Any) -> list[str]:
        return ["run", "serve", "chat", "bench", "explain", "check", "tune", "doctor", "version"]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name == "bench" and cmd_name not in self.commands:
            from miniserve.cli import bench

            group = get_group(bench.app)
            group.name = cmd_name
            self.add_command(group)
        return super().get_command(ctx, cmd_name)


app = typer.Typer(
    name="miniserve",
    cls=_Commands,
    help="A minimal LLM inference engine: `miniserve run` serves a model, and chats with it at a terminal.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["--help", "-h"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)
app.command()(run)
app.command("serve")(serve)
app.command(hidden=True)(serve_for_parent)
app.command()(chat)
app.command()(explain)
app.command()(check)
app.command()(tune)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"miniserve {__version__}")
        raise typer.Exit


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


@app.callback()
def options(
    ctx: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    ctx.obj.debug = debug


def main() -> None:
    """Run the command line. An error that the user can correct is one sentence and exit code 2; a failure is 1."""
    state = State()
    try:
        if any("\udc80" <= character <= "\udcff" for character in "".join(sys.argv)):  # how Python marks such bytes
            raise UserError("The arguments are not valid UTF-8; write them in UTF-8.")
        _run(state)
    except (UserError, InvalidRequest) as error:
        if state.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    except OSError as error:
        if state.debug or error.errno != errno.ENOSPC:
            raise
        where = error.filename or "standard output, or a file"
        print(f"error: {error.strerror}: {where}; make room there and try again.", file=sys.stderr)
        sys.exit(EXIT_FAILURE)


def _run(state: State) -> None:
    try:
        app(obj=state, prog_name="miniserve")
    finally:
        _flush_output()


def _flush_output() -> None:
    """Flush here, so that a failed write is a proper error. The interpreter would print a traceback at its exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.EPIPE:  # the reader has closed the pipe: no error, as in typer
            sys.exit(EXIT_FAILURE)
        raise
