"""How the output of a chat is read, as its request asks: reasoning, calls of its tools, content."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from miniserve.core import Completion, Grammar, InvalidRequest, Reasoning, SamplingParams
from miniserve.engine.answer_parser import AnswerParser
from miniserve.engine.call_reader import Event, Thought
from miniserve.engine.detokenizer import text_decoder
from miniserve.engine.reasoning import ReasoningSplit
from miniserve.engine.tokenizer import Tokenizer
from miniserve.engine.tool_dialects import ToolDialect
from miniserve.engine.tool_grammar import call_grammar
from miniserve.server.protocol import ChatCompletionRequest, NamedTool, Tool

Functions = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Reading:
    """`functions`: the schema of each function's arguments. `hidden`: see `AnswerParser`."""

    reasoning: Reasoning | None = None
    shows_reasoning: bool = True
    dialect: ToolDialect | None = None
    functions: Functions = field(default_factory=dict)
    hidden: frozenset[str] = frozenset()

    @property
    def is_plain(self) -> bool:
        """All text is content."""
        return self.reasoning is None and self.dialect is None

    def params(self, params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
        """With what the engine must know of it."""
        return msgspec.structs.replace(
            params,
            reasoning=self.reasoning,
            shown_special_tokens=tuple(
                token_id for text in sorted(self.hidden) if (token_id := tokenizer.special_token_id(text)) is not None
            ),
        )

    def call_id(self) -> str:
        name = uuid.uuid4().hex
        return name[:9] if self.dialect is not None and self.dialect.short_ids else f"call_{name[:24]}"


class AnswerReader:
    """The events of one sequence, delta by delta, and the tokens that were reasoning."""

    def __init__(self, reading: Reading, tokenizer: Tokenizer) -> None:
        self._reading = reading
        self._parser = AnswerParser(reading.reasoning, reading.dialect, reading.functions, reading.hidden)
        self._split = None if reading.reasoning is None else ReasoningSplit(reading.reasoning)
        self._decoder = text_decoder(tokenizer, skip_special_tokens=False)
        self._num_tokens = 0  # as far as reasoning may go

    @property
    def num_calls(self) -> int:
        return self._parser.num_calls

    @property
    def num_reasoning_tokens(self) -> int:
        return self._num_tokens if self._parser.reasons else 0

    def push(self, delta: Completion) -> list[Event]:
        """What a delta brings, and at the last one what was held back."""
        for token_id in delta.token_ids:
            if self._split is None or self._split.over:
                break
            self._split.push(self._decoder.push(token_id))
            self._num_tokens += 1
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        return [event for event in events if self._reading.shows_reasoning or not isinstance(event, Thought)]


def reading_of(
    body: ChatCompletionRequest,
    dialect: ToolDialect | None,
    tools: Sequence[Tool],
    reasoning: Reasoning | None,
    tokenizer: Tokenizer,
) -> Reading:
    """Of a request that chose `tools`, which the model calls in `dialect`."""
    marks = {*(dialect.begins if dialect else ()), *(dialect.marks if dialect else ())}
    marks |= {reasoning.begin, reasoning.end} if reasoning else set()
    special = frozenset(mark for mark in marks if tokenizer.special_token_id(mark) is not None)
    return Reading(
        reasoning=reasoning,
        shows_reasoning=body.include_reasoning is not False,
        dialect=dialect,
        functions=functions_of(body, tools),
        hidden=special if body.skip_special_tokens is not False else frozenset(),
    )


def chosen_tools(body: ChatCompletionRequest) -> list[Tool]:
    """Those that the model may call. Raises `InvalidRequest` for a choice that there is not."""
    tools, choice = body.tools or [], body.tool_choice
    if choice == "none":
        return []
    if choice is not None and not tools:
        raise InvalidRequest("tool_choice needs tools.", "tool_choice")
    if isinstance(choice, NamedTool) and choice.name not in {tool.function.name for tool in tools}:
        raise InvalidRequest(f"tool_choice names {choice.name[:128]!r}, which is not among the tools.", "tool_choice")
    return tools


def forced_calls(
    body: ChatCompletionRequest,
    dialect: ToolDialect,
    tools: Sequence[Tool],
    reasoning: Reasoning | None,
    tokenizer: Tokenizer,
) -> Grammar | None:
    """What holds the model to the request's choice, to one call where not several may come, and to the schemas of all
    functions that it must call and of those that are strict. Raises `InvalidRequest` for a schema that cannot be
    enforced."""
    must_call = body.tool_choice not in (None, "auto")
    once = isinstance(body.tool_choice, NamedTool) or body.parallel_tool_calls is False
    strict = {tool.function.name for tool in tools if must_call or tool.function.strict}
    if not (strict or once):
        return None
    schemas = {name: schema if name in strict else None for name, schema in functions_of(body, tools).items()}
    return call_grammar(dialect, schemas, tokenizer, must_call=must_call, once=once, reasoning=reasoning)


def functions_of(body: ChatCompletionRequest, tools: Sequence[Tool]) -> Functions:
    """Those that may be called. Without parameters a function takes none."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    named = body.tool_choice.name if isinstance(body.tool_choice, NamedTool) else None
    return {
        tool.function.name: tool.function.parameters or nothing
        for tool in tools
        if named is None or tool.function.name == named
    }


def template_tools(tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
    """As a template sees them. `strict` is for the server."""
    shown = []
    for tool in tools:
        function = tool.function
        optional = {"description": function.description, "parameters": function.parameters}
        given = {name: value for name, value in optional.items() if value is not None}
        shown.append(
            {"type": tool.type, "function": {"name": function.name, **given, **function.extras}, **tool.extras}
        )
    return shown or None
