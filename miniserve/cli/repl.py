"""A conversation with a server: the prompt of `miniserve chat` and `miniserve run`, the single question of their -m and
-p, and the small client of the chat API beneath them."""

from __future__ import annotations

import importlib
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import httpx

from miniserve.cli import EXIT_FAILURE
from miniserve.core import UserError

Message = dict[str, str]  # role and content

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
# Limit for a model without a chat template, which continues the text: the endpoint's default of 16 tokens is too few.
_COMPLETION_TOKENS = 256
_PATIENCE = 2.0  # seconds without data after which nobody is expected to write to a pipe


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
        self._history.append({"role": "user", "content": text})
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
            self._history.append({"role": "assistant", "content": answer})
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


def require_stdout() -> None:
    """Raises `UserError` where an answer could not be written."""
    if not sys.stdout:
        raise UserError("Standard output is closed, so there is nowhere to answer: connect it to a terminal or a file.")


def print_answer(
    client: ChatClient, messages: list[Message], settings: ChatSettings, pieces: list[str] | None = None
) -> None:
    """Stream one answer to stdout, ending it with a newline; `pieces` collects its text, even if it breaks off.

    Raises `ChatError`, `UserError` (see `ChatClient.answer`) and KeyboardInterrupt, which aborts the request.
    """
    require_stdout()
    table = _CONTROL if sys.stdout.isatty() else {}
    had_template = client.has_chat_template
    last: str = ""
    # closing(): Ctrl-C must close the connection now, not at the next garbage collection, to free the request's blocks.
    with closing(client.answer(messages, settings)) as answer:
        for piece in answer:
            if isinstance(piece, Thought):
                print(piece.translate(_CONTROL), end="", file=sys.stderr, flush=True)
                last = piece
                continue
            if isinstance(last, Thought):
                _notice("\n")
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


def answer_once(client: ChatClient, question: str, settings: ChatSettings) -> int:
    """Answer one question on stdout; the exit code. Raises `UserError` and KeyboardInterrupt as `print_answer` does."""
    try:
        print_answer(client, [{"role": "user", "content": question}], settings)
    except ChatError as error:
        _notice(f"error: {error}")
        return EXIT_FAILURE
    return 0


def _notice(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the client ---------------------------------------------------------------------------------------------------


class ChatError(Exception):
    """The server did not give an answer; `str(error)` says why."""


class Thought(str):
    """A piece of the model's reasoning, which is no part of its answer."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What is sent with each question; None means the server's default."""

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


class ChatClient:
    """Talks to an OpenAI-compatible server at `url` (with or without `/v1`).

    `finish_reason` is that of the last answer. `has_chat_template` turns False when the server reports that its model
    has none: from then on each question is sent alone, as text to continue.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No limit on the time between two pieces: a long prompt on a CPU takes minutes. No proxy from the environment:
        # it has no place between two processes of one machine.
        with self._reach_server():
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=10), trust_env=False
            )
        self._model = model
        self.has_chat_template = True
        self.finish_reason: str | None = None

    @property
    def model(self) -> str:
        """The model asked for, else the first that the server has. Raises `UserError` where no server answers."""
        if self._model is None:
            with self._reach_server():
                response = self._http.get("/v1/models")
            if response.status_code != 200:
                why = _error_message(response)
                raise UserError(f"{self.url} does not list its models ({why}): check --url and --api-key.")
            try:
                self._model = str(response.json()["data"][0]["id"])
            except (ValueError, LookupError, TypeError):
                raise UserError(f"{self.url} does not list its models: is --url an OpenAI-compatible server?") from None
        return self._model

    def answer(self, messages: Sequence[Message], settings: ChatSettings) -> Generator[str, None, None]:
        """Yield the pieces of the answer to the last of `messages`, and `Thought`s before it. Closing the
        iterator aborts the request.

        Raises `ChatError` where the server refuses or fails, `UserError` where none answers.
        """
        self.finish_reason = None
        if self.has_chat_template:
            system = [] if settings.system is None else [{"role": "system", "content": settings.system}]
            try:
                yield from self._stream("/v1/chat/completions", {"messages": [*system, *messages]}, settings)
            except ChatError as error:
                if "no chat template" not in str(error):
                    raise
                self.has_chat_template = False
        if not self.has_chat_template:
            if settings.system is not None:
                raise ChatError("the model has no chat template, so it takes no system prompt")
            prompt = {"prompt": messages[-1]["content"], "max_tokens": _COMPLETION_TOKENS}
            yield from self._stream("/v1/completions", prompt, settings)

    def _stream(self, path: str, question: dict[str, Any], settings: ChatSettings) -> Iterator[str]:
        chosen = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
        sampling = {name: value for name, value in chosen.items() if value is not None}
        body = {"model": self.model, "stream": True, **question, **sampling}
        with self._reach_server(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ChatError(_error_message(response))
            for line in response.iter_lines():
                if line.startswith("data:") and line != "data: [DONE]":
                    yield from self._pieces(line.removeprefix("data:"))

    def _pieces(self, data: str) -> Iterator[str]:
        try:
            event = json.loads(data)
        except ValueError:
            event = None
        if not isinstance(event, dict):
            raise ChatError("the server sent an event that is not a JSON object")
        if "error" in event:
            raise ChatError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", []):
            piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if thought := choice.get("delta", {}).get("reasoning_content"):
                yield Thought(thought)
            if piece:
                yield piece

    @contextmanager
    def _reach_server(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise UserError(
                f"No server answers at {self.url}: start one with `miniserve run`, or pass --url."
            ) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL):
            raise UserError(f"{self.url!r} is not a URL: pass one such as http://127.0.0.1:8000.") from None
        except UnicodeEncodeError:  # undecodable bytes from a terminal, a pipe or the command line
            raise ChatError("the text is not valid UTF-8") from None
        except httpx.HTTPError as error:
            raise ChatError(f"the connection to {self.url} broke ({type(error).__name__})") from error


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"HTTP {response.status_code}"


# --- standard input -----------------------------------------------------------------------------------------------


def can_chat() -> bool:
    """Whether a user sits at a terminal: stdin and stdout are one, and this process is not in the background (`… &`),
    where reading from the terminal would stop it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except OSError:
        return False


def read_text() -> str:
    """All of standard input. Raises `UserError` if it is not UTF-8."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise UserError("Standard input is not valid UTF-8: pipe in UTF-8 text.") from None


def read_piped_text() -> str | None:
    """The text piped in or redirected from a file; None if there is none.

    Servers are started with all kinds of standard input: a terminal, /dev/null, nothing at all, an empty pipe, a pipe
    that is held open and never written to. All of these give None, the last one after `_PATIENCE`.
    """
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):  # closed
        return None
    if stat.S_ISREG(mode):
        return read_text() or None
    if not (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        return None
    readable, _, _ = select.select([sys.stdin.fileno()], [], [], _PATIENCE)
    return (read_text() or None) if readable else None
