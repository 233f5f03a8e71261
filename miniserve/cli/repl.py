"""The chat prompt of `miniserve chat` and `miniserve run`, and the single question of their -m and -p."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

from miniserve.cli.chat_client import ChatClient, ChatError, ChatSettings, Message
from miniserve.core import UserError

PROMPT = ">>> "
CONTINUATION = "... "
QUOTES = '"""'
HELP = """\
/help                     this list
/clear                    clear the conversation
/system [TEXT]            set the system prompt; without TEXT, remove it
/set temperature NUMBER   0 is greedy; `default` is the server's
/set max_tokens NUMBER    longest answer in tokens; `default` is the server's
/bye, /exit, Ctrl-D       leave
\"\"\"                       starts and ends a message of several lines
Ctrl-C                    stops an answer"""

# A model's text must not move the cursor or recolour the terminal: drop control characters except tab and newline.
_CONTROL = dict.fromkeys((*range(9), *range(11, 32), 127, *range(128, 160)))


class Repl:
    """A conversation at a terminal. Prompts and answers go to stdout, everything else to stderr.

    `leave_on_interrupt`: Ctrl-C at the prompt ends the chat instead of clearing the line.
    """

    def __init__(self, client: ChatClient, settings: ChatSettings, *, leave_on_interrupt: bool = False) -> None:
        self._client = client
        self._settings = settings
        self._leave_on_interrupt = leave_on_interrupt
        self._history: list[Message] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _notice(HELP),
            "/?": lambda _: _notice(HELP),
            "/clear": self._clear,
            "/system": self._system,
            "/set": self._set,
        }

    def run(self) -> None:
        """Ask and answer until /bye, /exit or the end of the input."""
        with suppress(ImportError):
            importlib.import_module("readline")  # gives input() line editing and history
        while True:
            try:
                text = self._read_message()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if self._leave_on_interrupt:
                    return
                _notice("(Ctrl-D or /bye leaves)")
                continue
            command, _, argument = text.partition(" ")
            if command in ("/bye", "/exit"):
                return
            if command in self._commands:
                self._commands[command](argument.strip())
            elif command.startswith("/"):
                _notice(f"There is no command {command}; /help lists them.")
            elif text:
                self._ask(text)

    def _read_message(self) -> str:
        line = input(PROMPT).strip()
        if not line.startswith(QUOTES):
            return line
        text = line.removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + input(CONTINUATION)
        return text.rstrip().removesuffix(QUOTES).strip("\n")

    def _ask(self, text: str) -> None:
        self._history.append(Message("user", text))
        pieces: list[str] = []
        try:
            print_answer(self._client, self._history, self._settings, pieces)
        except KeyboardInterrupt:
            print()
            _notice("(stopped)")
        except (ChatError, UserError) as error:
            print()
            _notice(f"error: {error}")
        answer = "".join(pieces)
        if answer:
            self._history.append(Message("assistant", answer))
        else:
            self._history.pop()  # unanswered: a template may refuse two user messages in a row

    def _clear(self, argument: str) -> None:
        if argument:
            _notice("/clear takes no argument.")
            return
        self._history.clear()
        _notice("The conversation is cleared.")

    def _system(self, argument: str) -> None:
        if not self._client.has_chat_template:
            _notice("The model has no chat template, so it takes no system prompt.")
            return
        self._settings = replace(self._settings, system=argument or None)
        _notice("The system prompt is set." if argument else "The system prompt is removed.")

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        kinds: dict[str, Callable[[str], float]] = {"temperature": float, "max_tokens": int}
        if name not in kinds:
            _notice("/set takes temperature or max_tokens.")
            return
        try:
            setting: dict[str, Any] = {name: None if value == "default" else kinds[name](value)}
        except ValueError:
            _notice(f"/set {name} takes a number or `default`, not {value!r}.")
            return
        self._settings = replace(self._settings, **setting)
        _notice(f"{name} is {value}.")


def print_answer(
    client: ChatClient, messages: list[Message], settings: ChatSettings, pieces: list[str] | None = None
) -> None:
    """Stream one answer to stdout, ending it with a newline; `pieces` collects its text, even if it breaks off.

    Raises `ChatError`, `UserError` (see `ChatClient.answer`) and KeyboardInterrupt, which aborts the request.
    """
    if not sys.stdout:
        raise UserError("Standard output is closed, so there is nowhere to answer: connect it to a terminal or a file.")
    table = _CONTROL if sys.stdout.isatty() else {}
    had_template = client.has_chat_template
    last = ""
    # closing(): Ctrl-C must close the connection now, not at the next garbage collection, to free the request's blocks.
    with closing(client.answer(messages, settings)) as answer:
        for piece in answer:
            if pieces is not None:
                pieces.append(piece)
            sys.stdout.write(piece.translate(table))
            sys.stdout.flush()
            last = piece
    if not last.endswith("\n"):
        print(flush=True)
    if had_template and not client.has_chat_template:
        _notice("(the model has no chat template: it continues each message alone, as plain text)")
    if client.finish_reason == "length":
        _notice("(the answer was cut off at the token limit)")


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
