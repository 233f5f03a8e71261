"""How the output of a chat is read, as its request asks: reasoning, calls of its tools, content."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from miniserve.core import Completion, FinishReason, Grammar, InvalidRequest, Reasoning
from miniserve.engine.answer_parser import AnswerParser
from miniserve.engine.call_reader import CallArguments, CallBegin, CallEnd, Content, Thought
from miniserve.engine.detokenizer import text_decoder
from miniserve.engine.grammar import check_grammar
from miniserve.engine.reasoning import ReasoningSplit
from miniserve.engine.tokenizer import Tokenizer
from miniserve.engine.tool_dialects import ToolDialect
from miniserve.engine.tool_grammar import call_grammar
from miniserve.server.protocol import ChatCompletionRequest, NamedTool, TokenLogprob, Tool

Functions = Mapping[str, Mapping[str, Any]]
Kind = Literal["thought", "text", "call"]


@dataclass(frozen=True, slots=True)
class Reading:
    """`functions`: the schema of each function's arguments. `hidden`: the ids of markers that are special tokens, by
    their texts; see `AnswerParser`."""

    reasoning: Reasoning | None = None
    shows_reasoning: bool = True
    dialect: ToolDialect | None = None
    functions: Functions = field(default_factory=dict)
    hidden: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_plain(self) -> bool:
        """All text is content."""
        return self.reasoning is None and self.dialect is None

    def call_id(self) -> str:
        name = uuid.uuid4().hex
        return name[:9] if self.dialect is not None and self.dialect.short_ids else f"call_{name[:24]}"


@dataclass(slots=True)
class Part:
    """One of an answer's parts, which come one behind the other. number: among all parts or, of a call, `call_number`
    among the calls. id: of a call as the model's template takes it. name: of the called function. complete: the answer
    went on behind the part, or ended by itself; of a call: its end was read. pieces: of its text, where they are kept;
    a call's is the JSON text of its arguments as the model wrote it. logprobs: of its tokens, where they are kept."""

    kind: Kind
    number: int
    id: str
    name: str = ""
    call_number: int = 0
    complete: bool = False
    pieces: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)


Step = tuple[Literal["begin", "text", "end"], Part, str]  # the text is empty but for further text


class AnswerReader:
    """The parts of one sequence, delta by delta, and the tokens that were reasoning."""

    def __init__(self, reading: Reading, tokenizer: Tokenizer) -> None:
        self._reading = reading
        self._parser = AnswerParser(reading.reasoning, reading.dialect, reading.functions, frozenset(reading.hidden))
        self._split = None if reading.reasoning is None else ReasoningSplit(reading.reasoning)
        self._decoder = text_decoder(tokenizer, skip_special_tokens=False)
        self._num_tokens = 0  # as far as reasoning may go
        self.parts: list[Part] = []

    @property
    def num_calls(self) -> int:
        return self._parser.num_calls

    @property
    def num_reasoning_tokens(self) -> int:
        return self._num_tokens if self._parser.reasons else 0

    def push(self, delta: Completion) -> list[Step]:
        """What a delta brings, and at the last one what was held back."""
        if self._reading.is_plain and self.parts and delta.text and delta.finish_reason is None:
            return [("text", self.parts[-1], delta.text)]  # nothing is read of it
        for token_id in delta.token_ids:
            if self._split is None or self._split.over:
                break
            self._split.push(self._decoder.push(token_id))
            self._num_tokens += 1
        events = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            events += self._parser.finish()
        steps: list[Step] = []
        for event in events:
            match event:
                case Content():
                    steps += self._take("text", event.text)
                case Thought():
                    steps += self._take("thought", event.text) if self._reading.shows_reasoning else ()
                case CallBegin():
                    steps += self._begin("call", self._reading.call_id(), event.name, event.index)
                case CallArguments():
                    steps += self._take("call", event.text)
                case CallEnd():
                    self.parts[-1].complete = True
        if delta.finish_reason is not None:
            steps += self._end(complete=delta.finish_reason is FinishReason.STOP)
        return steps

    def _take(self, kind: Kind, text: str) -> list[Step]:
        begin = [] if self.parts and self.parts[-1].kind == kind else self._begin(kind, uuid.uuid4().hex)
        return [*begin, ("text", self.parts[-1], text)]

    def _begin(self, kind: Kind, part_id: str, name: str = "", call_number: int = 0) -> list[Step]:
        ended = self._end(complete=True)
        self.parts.append(Part(kind, len(self.parts), part_id, name, call_number))
        return [*ended, ("begin", self.parts[-1], "")]

    def _end(self, complete: bool) -> list[Step]:
        if not self.parts:
            return []
        part = self.parts[-1]
        part.complete = part.complete or (complete and part.kind != "call")
        return [("end", part, "")]


def reading_of(
    body: ChatCompletionRequest,
    dialect: ToolDialect | None,
    tools: Sequence[Tool],
    reasoning: Reasoning | None,
    tokenizer: Tokenizer,
) -> Reading:
    """Of a request that chose `tools`, which the model calls in `dialect`."""
    marks = {*dialect.begins, *dialect.marks} if dialect else set()
    marks |= {reasoning.begin, reasoning.end} if reasoning else set()
    hidden = {mark: found for mark in sorted(marks) if (found := tokenizer.special_token_id(mark)) is not None}
    return Reading(
        reasoning=reasoning,
        shows_reasoning=body.include_reasoning is not False,
        dialect=dialect,
        functions=_functions(body, tools),
        hidden=hidden if body.skip_special_tokens is not False else {},
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
    reading: Reading,
    dialect: ToolDialect,
    tools: Sequence[Tool],
    tokenizer: Tokenizer,
    content: Grammar | None,
) -> Grammar | None:
    """What holds the model to the request's choice, to one call where not several may come, and to the schemas of all
    functions that it must call and of those that are strict. `content`: the JSON schema of a text instead of calls, if
    there is one. Raises `InvalidRequest` for a schema that cannot be enforced."""
    must_call = body.tool_choice not in (None, "auto")
    once = isinstance(body.tool_choice, NamedTool) or body.parallel_tool_calls is False
    strict = {tool.function.name for tool in tools if must_call or tool.function.strict}
    if not (strict or once or content):
        return None
    schemas = {name: schema if name in strict else None for name, schema in reading.functions.items()}
    grammar = call_grammar(
        dialect,
        schemas,
        tokenizer,
        must_call=must_call,
        once=once,
        reasoning=reading.reasoning,
        content=None if content is None else json.loads(content.text),
    )
    check_grammar(grammar, tokenizer, "tools")
    return grammar


def _functions(body: ChatCompletionRequest, tools: Sequence[Tool]) -> Functions:
    """Those that may be called. Without parameters a function takes none."""
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    named = body.tool_choice.name if isinstance(body.tool_choice, NamedTool) else None
    return {
        tool.function.name: tool.function.parameters or nothing
        for tool in tools
        if named is None or tool.function.name == named
    }
