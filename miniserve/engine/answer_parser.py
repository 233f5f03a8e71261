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
from miniserve.engine.reasoning import ReasoningSplit
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
        self._reasoning = reasoning
        self._split = None if reasoning is None else ReasoningSplit(reasoning)
        self.reasons = reasoning is not None and reasoning.is_open  # whether the text began with reasoning
        self._thought_shown = False
        self._line_breaks = ""  # not shown yet: at the reasoning's end they are layout
        self._trims = False  # the content's first line breaks, which come from the reasoning's end
        self._hidden = hidden
        self._reader = CallReader(functions or {})
        self._steps = None if dialect is None else self._read(dialect)
        self._space = ""  # content not shown yet: before and behind a call it is layout

    @property
    def num_calls(self) -> int:
        return self._reader.num_calls

    def push(self, text: str) -> list[Event]:
        """What further text brings."""
        return self._take(*(("", text) if self._split is None else self._split.push(text)))

    def finish(self) -> list[Event]:
        """What was held back."""
        self._reader.closed = True
        events = self._take(*(("", "") if self._split is None else self._split.flush()))
        if self._space and not self.num_calls:
            events = _joined([*events, Content(self._space)])
        return events

    def _take(self, thought: str, said: str) -> list[Event]:
        if thought and self._reasoning is not None and self._split is not None:
            self._think(thought, self._reasoning, self._split.over)
        if self._trims:
            said = said.lstrip("\n")
            self._trims = not said
        if self._steps is None:
            self._reader.events += [Content(said)] if said else []
        elif said or self._reader.closed:
            self._reader.feed(said)
            next(self._steps, None)
        events, self._reader.events = self._reader.events, []
        return _joined(events) if len(events) > 1 else events

    def _think(self, text: str, markers: Reasoning, is_over: bool) -> None:
        if not self._trims:
            text = text.removeprefix(markers.begin)
        if is_over:
            text = text.removesuffix(markers.end)
        self.reasons = self._trims = True
        text = self._line_breaks + text
        if not self._thought_shown:
            text = text.lstrip("\n")
        shown = text.rstrip("\n")
        self._line_breaks = text[len(shown) :]
        if shown:
            self._thought_shown = True
            self._reader.events.append(Thought(shown))

    def _read(self, dialect: ToolDialect) -> Steps[None]:
        reader = self._reader
        if dialect.bare:
            reader.attempt()
            yield from self._call(dialect, "")
        while marker := (yield from reader.until((*dialect.begins, *self._hidden), self._say)):
            if marker in dialect.begins:
                reader.attempt(marker)
                yield from self._call(dialect, marker)

    def _call(self, dialect: ToolDialect, marker: str) -> Steps[None]:
        try:
            yield from dialect.read(self._reader, marker)
            self._reader.settle()
        except NoCall:
            text = self._reader.give_up()
            self._say("" if text in self._hidden else text)

    def _say(self, text: str) -> None:
        text = self._space + text
        shown = text.rstrip()
        self._space = text[len(shown) :]
        if shown:
            self._reader.events.append(Content(shown))


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
