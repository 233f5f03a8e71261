"""Reads the calls of functions in a model's output as its text comes, in whatever pieces.

A dialect's reader is a generator that asks for characters through `CallReader` and is suspended where they have not
come yet, so what it finds cannot depend on how the text is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from miniserve.engine.reasoning import num_begun

T = TypeVar("T")
Steps = Generator[None, None, T]  # suspended while text is missing

_MAX_HEAD = 4096  # characters from a marker to the arguments' beginning; more is text
_SPACE = " \t\r\n"
FUNCTION_NAME = re.compile(r"[\w.:/-]{1,128}")


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """`index` counts the answer's calls from 0."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is complete; without it the answer was cut, or the model wrote no JSON."""

    index: int


Event = Content | Thought | CallBegin | CallArguments | CallEnd


class NoCall(Exception):
    """The text is not a call's, or not any more."""


class CallReader:
    """The text that is not read yet, and the calls found. `functions`: the schema of the arguments of each function
    that may be called; text that names another one is no call."""

    def __init__(self, functions: Mapping[str, Mapping[str, Any]]) -> None:
        self.functions = functions
        self.events: list[Event] = []
        self.closed = False  # no more text comes
        self.num_calls = 0
        self._text = ""
        self._at = 0
        self._start: int | None = None  # of what is text if it is no call
        self._marker = ""

    def feed(self, text: str) -> None:
        """Further text; what was read for good is forgotten."""
        kept = self._at if self._start is None else self._start
        self._text = self._text[kept:] + text
        self._at -= kept
        self._start = None if self._start is None else 0

    # --- what text there is -------------------------------------------------------------------------------------------

    def char(self) -> Steps[str]:
        """The next character, which stays unread; "" at the end."""
        while self._at == len(self._text):
            if self.closed:
                return ""
            yield
        return self._text[self._at]

    def space(self) -> Steps[None]:
        while (char := (yield from self.char())) and char in _SPACE:
            self._move(self._at + 1)

    def take(self, literal: str) -> Steps[bool]:
        """Whether `literal` comes next; then it is read."""
        while True:
            have = self._text[self._at : self._at + len(literal)]
            if have == literal:
                self._at += len(literal)
                return True
            if self.closed or not literal.startswith(have):
                return False
            yield

    def need(self, literal: str) -> Steps[None]:
        if not (yield from self.take(literal)):
            raise NoCall

    def until(self, ends: Sequence[str], emit: Callable[[str], object]) -> Steps[str]:
        """Emit text up to the first of `ends`, which is read and returned; "" at the end of all text."""
        while True:
            found = [(at, -len(end), end) for end in ends if (at := self._text.find(end, self._at)) >= 0]
            if found or self.closed:
                first, _, end = min(found, default=(len(self._text), 0, ""))
                self._emit(first, emit)
                self._at += len(end)
                return end
            last = self._text[max(self._at, len(self._text) - max(map(len, ends))) :]
            self._emit(len(self._text) - max(num_begun(last, end) for end in ends), emit)
            yield

    def name(self) -> Steps[str]:
        """A function's, as far as it goes."""
        pieces: list[str] = []
        while (char := (yield from self.char())) and FUNCTION_NAME.fullmatch(char):
            pieces.append(char)
            self._move(self._at + 1)
        return "".join(pieces)

    def string(self) -> Steps[str]:
        """A JSON string."""
        if (yield from self.char()) != '"':
            raise NoCall
        pieces: list[str] = []
        yield from self.value(pieces.append)
        try:
            return str(json.loads("".join(pieces)))
        except ValueError:
            raise NoCall from None

    def value(self, emit: Callable[[str], object]) -> Steps[None]:
        """A JSON value, emitted as it is written. It is not checked, but for where it ends."""
        depth, in_string, escaped, begun = 0, False, False, False
        while True:
            yield from self.char()
            text, end, done = self._text, len(self._text), self.closed and self._at == len(self._text)
            for at in range(self._at, end):
                char = text[at]
                if in_string:
                    if escaped or char == "\\":
                        escaped = not escaped
                    elif char == '"':
                        in_string, done = False, depth == 0
                elif char == '"':
                    in_string = True
                elif char in "{[":
                    depth += 1
                elif char in "}]" and depth:
                    depth -= 1
                    done = depth == 0
                elif depth == 0 and (char in ",:}]" or char in _SPACE):
                    end, done = at, True
                    break
                if done:
                    end = at + 1
                    break
            begun = begun or end > self._at
            self._emit(end, emit)
            if done:
                if not begun or depth or in_string:
                    raise NoCall
                return

    def _emit(self, end: int, emit: Callable[[str], object]) -> None:
        if end > self._at:
            emit(self._text[self._at : end])
            self._move(end)

    def _move(self, end: int) -> None:
        self._at = end
        if self._start is not None and end - self._start > _MAX_HEAD:
            raise NoCall

    # --- calls --------------------------------------------------------------------------------------------------------

    def attempt(self, marker: str = "") -> None:
        """A call may be behind `marker`, which was just read."""
        self._start, self._marker = self._at - len(marker), marker

    def give_up(self) -> str:
        """What was read since the attempt is text and unread again, but for the marker, which is returned; nothing of
        a call that has begun."""
        if self._start is None:
            return ""
        self._at, self._start = self._start + len(self._marker), None
        return self._marker

    def settle(self) -> None:
        """What was read is no text."""
        self._start = None

    def begin(self, name: str) -> None:
        """From here on it is a call, whatever comes. Raises `NoCall` for a function that there is not."""
        if name not in self.functions:
            raise NoCall
        self._start = None
        self.events.append(CallBegin(self.num_calls, name))
        self.num_calls += 1

    def arguments(self, text: str) -> None:
        self.events.append(CallArguments(self.num_calls - 1, text))

    def end(self) -> None:
        self.events.append(CallEnd(self.num_calls - 1))

    def json_arguments(self, name: str) -> Steps[None]:
        """A call of `name`, whose arguments come next."""
        if (yield from self.char()) != "{":
            raise NoCall
        self.begin(name)
        yield from self.value(self.arguments)
        self.end()

    def json_call(self, before_name: Collection[str] | None = None) -> Steps[None]:
        """`{"name": …, "arguments": {…}}`, or with `parameters`, in any order; other keys are passed over, before the
        name only those of `before_name`, if given."""
        name, early, called = None, "{}", False
        yield from self.need("{")
        while not (yield from self.after_space("}")):
            key = yield from self.string()
            if name is None and before_name is not None and key not in {"name", *before_name}:
                raise NoCall
            yield from self.space()
            yield from self.need(":")
            yield from self.space()
            if key == "name" and name is None:
                name = yield from self.string()
                if name not in self.functions:
                    raise NoCall
            elif key not in ("arguments", "parameters") or called:
                yield from self.value(lambda _: None)
            elif name is not None and (yield from self.char()) == "{":
                self.begin(name)
                called = True
                yield from self.value(self.arguments)
            else:
                pieces: list[str] = []
                yield from self.value(pieces.append)
                early = "".join(pieces)
                if early == "null":
                    early = "{}"
                elif not early.startswith("{"):
                    raise NoCall
            yield from self.after_space(",")
        if not called:
            if name is None:
                raise NoCall
            self.begin(name)
            self.arguments(early)
        self.end()

    def after_space(self, literal: str) -> Steps[bool]:
        yield from self.space()
        return (yield from self.take(literal))
