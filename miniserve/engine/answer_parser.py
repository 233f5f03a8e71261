"""A model's output, as its text comes, to what a client is told: reasoning, content, and calls of functions.

The events do not depend on how the text is cut into pieces: those of one piece, of many, and of the whole text are the
same, put together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from miniserve.core import Reasoning
from miniserve.engine.call_reader import CallArguments, CallReader, Content, Event, NoCall, Steps, Thought
from miniserve.engine.tool_dialects import ToolDialect


class AnswerParser:
    """One sequence's text. `hidden`: markers that are special tokens, which are never content; those that are plain
    text are content wherever no call follows."""

    def __init__(
        self,
        reasoning: Reasoning | None = None,
        dialect: ToolDialect | None = None,
        functions: Mapping[str, Mapping[str, Any]] | None = None,
        hidden: frozenset[str] = frozenset(),
    ) -> None:
        self.reasons = reasoning is not None and reasoning.is_open  # whether the text began with reasoning
        self._hidden = hidden
        self._reader = CallReader(functions or {})
        self._held = ""  # space at the end of what is shown: before and behind a call or reasoning it is layout
        self._steps = self._read(reasoning, dialect)

    @property
    def num_calls(self) -> int:
        return self._reader.num_calls

    def push(self, text: str) -> list[Event]:
        """What further text brings."""
        self._reader.feed(text)
        next(self._steps, None)
        events, self._reader.events = self._reader.events, []
        return _joined(events)

    def finish(self) -> list[Event]:
        """What was held back."""
        self._reader.closed = True
        events = self.push("")
        return _joined([*events, Content(self._held)]) if self._held and not self.num_calls else events

    def _read(self, reasoning: Reasoning | None, dialect: ToolDialect | None) -> Steps[None]:
        reader = self._reader
        if reasoning is not None:
            yield from self._read_thought(reasoning)
        if dialect is not None and dialect.bare:
            reader.attempt()
            yield from self._read_call(dialect, "")
        begins = () if dialect is None else dialect.begins
        while marker := (yield from reader.until((*begins, *self._hidden), self._say)):
            if dialect is not None and marker in begins:
                reader.attempt(marker)
                yield from self._read_call(dialect, marker)

    def _read_thought(self, reasoning: Reasoning) -> Steps[None]:
        """Line breaks around it are layout."""
        reader = self._reader
        self.reasons = (yield from reader.take(reasoning.begin)) or reasoning.is_open
        if self.reasons:
            yield from reader.space("\n")
            yield from reader.until((reasoning.end,), self._think)
            self._held = ""
            yield from reader.space("\n")

    def _read_call(self, dialect: ToolDialect, marker: str) -> Steps[None]:
        try:
            yield from dialect.read(self._reader, marker)
            self._reader.settle()
        except NoCall:
            text = self._reader.give_up()
            self._say("" if text in self._hidden else text)

    def _say(self, text: str) -> None:
        if shown := self._without_end(text, None):
            self._reader.events.append(Content(shown))

    def _think(self, text: str) -> None:
        if shown := self._without_end(text, "\n"):
            self._reader.events.append(Thought(shown))

    def _without_end(self, text: str, layout: str | None) -> str:
        """With what was held back, and without what may be layout: white space, or these characters."""
        text = self._held + text
        shown = text.rstrip(layout)
        self._held = text[len(shown) :]
        return shown


def _joined(events: list[Event]) -> list[Event]:
    """Neighbours of a kind as one."""
    if len(events) < 2:  # mostly
        return events
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content | Thought | CallArguments) and isinstance(last, type(event)):
            joined[-1] = replace(event, text=last.text + event.text)
        else:
            joined.append(event)
    return joined
