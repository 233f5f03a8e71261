"""`/v1/responses`: OpenAI's API for agents, without memory: nothing is stored, and the conversation comes with each
request."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from miniserve.core import Completion, FinishReason, InvalidRequest, TokenLogprobs
from miniserve.engine.call_reader import FUNCTION_NAME
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.agents import (
    PartsAnswer,
    Translation,
    Turn,
    called,
    function_tool,
    needed,
    refused_beside,
    texts_of,
)
from miniserve.server.chat import Chat, chat_logprobs
from miniserve.server.errors import APIError, clip
from miniserve.server.fields import LEAVE_OUT, Body, Exact, refusals
from miniserve.server.protocol import (
    MAX_TOOLS,
    CalledArguments,
    CalledName,
    ChatCompletionRequest,
    FunctionName,
    Int,
    ListOf,
    OrText,
    Parameters,
    SamplingBody,
    Text,
    TextOrList,
    TokenLogprob,
    Tool,
    ToolChoice,
    ToolsOf,
)
from miniserve.server.reading import Part
from miniserve.server.reply import GenerationResponse
from miniserve.server.service import Service
from miniserve.server.structured import JSONSchemaFormat, ResponseFormat, StructuredOutputs

_LOGPROBS, _ENCRYPTED = "message.output_text.logprobs", "reasoning.encrypted_content"
_SEAL = "miniserve:"
_TEXTS = ("input_text", "output_text", "reasoning_text", "summary_text", "text")


class Piece(Body):
    """Of a message's content, a reasoning's, or a call's output."""

    type: Text
    text: Text | None = None
    # Without effect.
    annotations: Any = None
    logprobs: Any = None
    prompt_cache_breakpoint: Any = None


class Item(Body):
    """A step of the conversation. The fields that it needs depend on its type."""

    type: Text = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: TextOrList[Piece] | None = None
    call_id: Text | None = None
    name: CalledName | None = None
    namespace: CalledName | None = None
    arguments: CalledArguments | None = None
    output: TextOrList[Piece] | None = None
    summary: ListOf[Piece] | None = None
    encrypted_content: str | None = None
    status: str | None = None
    # Without effect.
    id: str | None = None
    phase: str | None = None


def _writable(value: dict[str, Any]) -> dict[str, Any]:
    """Raises `ValueError` for what could not be sent back."""
    json.dumps(value, ensure_ascii=False).encode()
    return value


Schema = Annotated[dict[str, Any], AfterValidator(_writable)]


class FunctionTool(Body):
    """Or, of type `namespace`, several under one name."""

    refused = refusals({
        LEAVE_OUT: {
            "defer_loading": (False,), "allowed_callers": (["direct"],), "output_schema": (), "async": (False,)
        }
    })  # fmt: skip

    type: Text
    name: FunctionName | None = None
    description: Text | None = None
    parameters: Annotated[Parameters, AfterValidator(_writable)] | None = None
    strict: bool | None = None
    tools: ListOf[FunctionTool] | None = None

    def shown(self) -> dict[str, Any]:
        if self.tools is not None:
            tools = [tool.shown() for tool in self.tools]
            return {"type": self.type, "name": self.name, "description": self.description, "tools": tools}
        return self.model_dump(exclude={*self.extras, "tools"}) | {"strict": bool(self.strict)}


class TextFormat(Exact):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    json_schema: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Exact):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningConfig(Exact):
    """Reasoning is shown as it is, so the most that `summary` can ask for is there."""

    effort: Text | None = None
    summary: Literal["auto", "detailed"] | None = None
    generate_summary: Literal["auto", "detailed"] | None = None


class ResponseStreamOptions(Exact):
    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(SamplingBody):
    model: str | None = None
    input: Annotated[ListOf[Item], Field(min_length=1), OrText()]
    instructions: Text | None = None
    tools: ToolsOf[FunctionTool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    max_output_tokens: Int | None = None
    structured_outputs: StructuredOutputs | None = None
    include_reasoning: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    include: list[Literal["reasoning.encrypted_content", "message.output_text.logprobs"]] | None = None
    top_logprobs: Int | None = None
    truncation: Literal["disabled"] | None = None
    metadata: Annotated[dict[Text, Text], Field(max_length=16)] | None = None


_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
}
ResponsesRequest.refused = refused_beside(
    ResponsesRequest,
    _NAMES,
    {
        "prompt": (), "max_tool_calls": (), "context_management": ([],), "moderation": (),
        "background_options": (), "access_programs": (), "image": (), "multi_agent": (),
    },
    {
        "system": "use instructions",
        "prompt": "no prompts are kept; send input and instructions",
        "max_tool_calls": "leave it out; there are no built-in tools",
        "background": "leave it out, and wait for the answer",
    },
)  # fmt: skip


# --- answers ----------------------------------------------------------------------------------------------------------


class InputDetails(TypedDict):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(TypedDict):
    reasoning_tokens: int


class ResponseUsage(TypedDict):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ItemOut(TypedDict):
    id: str
    type: Literal["message", "reasoning", "function_call"]
    status: Literal["in_progress", "completed", "incomplete"]
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[list[dict[str, Any]]]
    summary: NotRequired[list[Any]]
    encrypted_content: NotRequired[str]
    call_id: NotRequired[str]
    name: NotRequired[str]
    namespace: NotRequired[str]
    arguments: NotRequired[str]


class ResponseOut(TypedDict):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[ItemOut]
    usage: ResponseUsage | None
    store: Literal[False]
    instructions: str | None
    metadata: dict[str, str]
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, str]
    parallel_tool_calls: bool
    text: dict[str, Any]
    reasoning: dict[str, Any]
    top_logprobs: int
    max_output_tokens: int | None
    temperature: float
    top_p: float
    truncation: Literal["disabled"]
    previous_response_id: None
    background: Literal[False]


class ResponsesAnswer(PartsAnswer):
    id_prefix = "resp_"

    def __init__(self, model: str, tokenizer: Tokenizer, chat: Chat, body: ResponsesRequest) -> None:
        super().__init__(model, tokenizer, chat)
        self._body = body
        self._params = chat.params
        self._seals = _ENCRYPTED in (body.include or ())
        self._namespaces = {
            _full_name(each.name or "", tool.name or ""): (each.name or "", tool.name or "")
            for each in body.tools or ()
            for tool in each.tools or ()
        }
        self._serial = -1
        self._entries: list[TokenLogprobs] = []
        self._num_shown = 0  # of the entries

    def whole(self) -> dict[str, Any]:
        return dict(self._response(*self._outcome()))

    def opening(self) -> Iterator[dict[str, Any]]:
        for kind in ("created", "in_progress"):
            yield self._event(f"response.{kind}", response=self._response("in_progress"))

    def begun(self, part: Part) -> Iterator[dict[str, Any]]:
        yield self._event(
            "response.output_item.added", output_index=part.number, item=self._item(part, "", "in_progress")
        )
        if part.kind != "call":
            yield self._about(part, "response.content_part.added", part=_content(part, ""))

    def count(self, number: int, delta: Completion) -> None:
        super().count(number, delta)
        self._entries += delta.logprobs or ()

    def piece(self, part: Part, text: str) -> dict[str, Any]:
        beside = {"logprobs": self._new_logprobs(part)} if part.kind == "text" else {}
        return self._about(part, f"response.{_WORDS[part.kind]}.delta", delta=text, **beside)

    def ended(self, part: Part) -> Iterator[dict[str, Any]]:
        text = part.text
        if part.kind == "call":
            name = self._called(part)["name"]
            yield self._about(part, "response.function_call_arguments.done", arguments=text, name=name)
        else:
            if part.kind == "text":
                self._new_logprobs(part)
            beside = {"logprobs": part.logprobs} if part.kind == "text" else {}
            yield self._about(part, f"response.{_WORDS[part.kind]}.done", text=text, **beside)
            yield self._about(part, "response.content_part.done", part=_content(part, text))
        yield self._event("response.output_item.done", output_index=part.number, item=self._item(part, text))

    def closing(self) -> Iterator[dict[str, Any]]:
        status, reason = self._outcome()
        yield self._event(f"response.{status}", response=self._response(status, reason))

    def failure(self, error: APIError) -> Iterator[dict[str, Any]]:
        """Twice: for the first openai-python raises an exception; the second langchain, for one, passes over."""
        shown = {"code": "server_error", "message": clip(error.message)}
        yield self._event("error", **shown, param=None, error={"type": "server_error", **shown, "param": None})
        yield self._event("response.failed", response=self._response("failed", error=shown))

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._serial += 1
        return {"type": kind, "sequence_number": self._serial, **fields}

    def _about(self, part: Part, kind: str, /, **fields: Any) -> dict[str, Any]:
        """An event of a part. Of calls there are no contents."""
        if part.kind != "call":
            fields["content_index"] = 0
        return self._event(kind, item_id=_item_id(part), output_index=part.number, **fields)

    def _new_logprobs(self, part: Part) -> list[TokenLogprob]:
        """Of a text's tokens since the last call, added to the part's; those of reasoning and special ones are none."""
        entries = self._entries[max(self._num_shown, self._reader.num_reasoning_tokens) :]
        self._num_shown = len(self._entries)
        shown = [entry for entry in entries if entry.token_id not in self._tokenizer.special_token_ids]
        new = chat_logprobs(self._tokenizer, shown, self._tokenizer.token_str)["content"]
        part.logprobs += new
        return new

    def _outcome(self) -> tuple[Literal["completed", "incomplete"], dict[str, str] | None]:
        if self._last is not None and self._last.finish_reason is not FinishReason.STOP:
            return "incomplete", {"reason": "max_output_tokens"}
        return "completed", None

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        incomplete: dict[str, str] | None = None,
        error: dict[str, str] | None = None,
    ) -> ResponseOut:
        body, running = self._body, status == "in_progress"
        given = body.text.format if body.text else None
        effort = body.reasoning.effort if body.reasoning else None
        choice = body.tool_choice or "auto"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": error,
            "incomplete_details": incomplete,
            "model": self.model,
            "output": [] if running else [self._item(part, part.text) for part in self._reader.parts],
            "usage": None if running else self._usage(),
            "store": False,
            "instructions": body.instructions,
            "metadata": body.metadata or {},
            "tools": [tool.shown() for tool in body.tools or ()],
            "tool_choice": choice if isinstance(choice, str) else {"type": "function", "name": choice.name},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": {"format": given.model_dump(exclude_none=True, by_alias=True) if given else {"type": "text"}},
            "reasoning": {"effort": effort, "summary": None},
            "top_logprobs": body.top_logprobs or 0,
            "max_output_tokens": body.max_output_tokens,
            "temperature": self._params.temperature,
            "top_p": self._params.top_p,
            "truncation": "disabled",
            "previous_response_id": None,
            "background": False,
        }

    def _item(self, part: Part, text: str, status: Literal["in_progress"] | None = None) -> ItemOut:
        item: ItemOut = {
            "id": _item_id(part),
            "type": "message",
            "status": status or ("completed" if part.complete else "incomplete"),
        }
        contents = [] if status else [_content(part, text)]
        match part.kind:
            case "text":
                return {**item, "role": "assistant", "content": contents}
            case "thought":
                item = {**item, "type": "reasoning", "summary": [], "content": contents}
                return {**item, "encrypted_content": _sealed(text)} if self._seals and not status else item
            case "call":
                beside = {"call_id": part.id, **self._called(part), "arguments": text}
                return {**item, "type": "function_call", **beside}  # type: ignore[typeddict-item]

    def _called(self, part: Part) -> dict[str, str]:
        """The name of a call's function, and its namespace if it has one."""
        if (found := self._namespaces.get(part.name)) is None:
            return {"name": part.name}
        return {"namespace": found[0], "name": found[1]}

    def _usage(self) -> ResponseUsage:
        return {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": {"cached_tokens": sum(self._cached_tokens), "cache_write_tokens": 0},
            "output_tokens": self._completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reader.num_reasoning_tokens},
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }


_WORDS = {"text": "output_text", "thought": "reasoning_text", "call": "function_call_arguments"}


def _item_id(part: Part) -> str:
    return {"text": "msg_", "thought": "rs_", "call": "fc_"}[part.kind] + part.id


def _content(part: Part, text: str) -> dict[str, Any]:
    if part.kind == "thought":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": part.logprobs}


# --- from a request to a chat -----------------------------------------------------------------------------------------


async def respond(service: Service, body: ResponsesRequest) -> GenerationResponse:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", "stream_options")
    tokenizer = service.engine.tokenizer
    return await _translated(body).respond(service, lambda chat: ResponsesAnswer(service.model, tokenizer, chat, body))


_AS_IN_CHAT = ("parallel_tool_calls", "stream", "structured_outputs", "include_reasoning", "chat_template_kwargs")


def _translated(body: ResponsesRequest) -> Translation:
    turns = [Turn("instructions", "system", [body.instructions])] if body.instructions else []
    if isinstance(body.input, str):
        turns.append(Turn("input", "user", [body.input]))
    else:
        for index, item in enumerate(body.input):
            _add(f"input[{index}]", item, turns)
    chat = ChatCompletionRequest(messages=[turn.message() for turn in turns])
    if not isinstance(body.input, str) and _is_unfinished(body.input[-1]):
        chat.continue_final_message, chat.add_generation_prompt = True, False
    for name in (*SamplingBody.model_fields, *_AS_IN_CHAT):
        setattr(chat, name, getattr(body, name))
    chat.max_tokens = body.max_output_tokens
    if body.tools:
        chat.tools = [each for index, tool in enumerate(body.tools) for each in _tools(f"tools[{index}]", tool)]
        if len(chat.tools) > MAX_TOOLS:
            raise InvalidRequest(
                f"tools: at most {MAX_TOOLS}, not {len(chat.tools)}, with those of namespaces.", "tools"
            )
    # "auto" is what clients send without tools, too.
    chat.tool_choice = body.tool_choice if chat.tools or body.tool_choice != "auto" else None
    chat.logprobs, chat.top_logprobs = _LOGPROBS in (body.include or ()) or None, body.top_logprobs
    if chat.top_logprobs and not chat.logprobs:
        raise InvalidRequest(f"top_logprobs needs include to have {_LOGPROBS}.", "top_logprobs")
    if chat.logprobs and body.tools and body.tool_choice != "none":
        raise InvalidRequest(f"include: {_LOGPROBS} goes with tools only where tool_choice is none.", "include")
    if body.reasoning is not None:
        chat.reasoning_effort = body.reasoning.effort
    if body.text is not None and (given := body.text.format) is not None:
        if (given.json_schema is not None) != (given.type == "json_schema"):
            raise InvalidRequest(
                "text.format: a schema goes with the type json_schema, which needs one.", "text.format"
            )
        schema = None if given.json_schema is None else JSONSchemaFormat(schema=given.json_schema)
        chat.response_format = ResponseFormat(type=given.type, json_schema=schema)
    return Translation(chat, _NAMES, turns)


# What clients offer that were not told to leave it out.
_WITHOUT_TOOL = {"web_search": 'leave it out, as Codex does with web_search = "disabled" in its config.toml'}


def _tools(path: str, tool: FunctionTool, namespace: str | None = None) -> Iterator[Tool]:
    """The function, or those of a namespace, whose description goes before that of its first."""
    if (tool.tools is not None) != (tool.type == "namespace"):
        raise InvalidRequest(f"{path}.tools goes with the type namespace, which needs it.", f"{path}.tools")
    match tool.type:
        case "namespace" if namespace is None:
            name = needed(path, "name", tool.name)
            for index, each in enumerate(tool.tools or ()):
                if not index and tool.description:
                    text = f"{tool.description}\n{each.description or ''}".rstrip()
                    each = each.model_copy(update={"description": text})
                yield from _tools(f"{path}.tools[{index}]", each, name)
        case "function":
            name = needed(path, "name", tool.name)
            full = name if namespace is None else _full_name(namespace, name)
            if FUNCTION_NAME.fullmatch(full) is None:
                raise InvalidRequest(f"{path}.name: with its namespace it is too long.", f"{path}.name")
            yield function_tool(full, tool.description, tool.parameters, tool.strict)
        case _:
            raise InvalidRequest(
                f"{path}.type: there are no built-in tools here, such as {tool.type[:50]!r}, only functions; "
                f"{_WITHOUT_TOOL.get(tool.type, 'leave it out')}.",
                f"{path}.type",
            )


def _full_name(namespace: str, name: str) -> str:
    """As the model knows a function of a namespace."""
    return f"{namespace}__{name}"


def _sealed(thought: str) -> str:
    """Some clients send reasoning back in this form alone. It is no secret: the text stands beside it."""
    return _SEAL + base64.b64encode(thought.encode()).decode()


def _unsealed(value: str | None) -> list[str]:
    """Raises `ValueError` for what `_sealed` has not made."""
    if not value:
        return []
    if not value.startswith(_SEAL):
        raise ValueError("not from here")
    return [base64.b64decode(value.removeprefix(_SEAL), validate=True).decode()]


def _is_unfinished(item: Item) -> bool:
    """Whether it is text of the model that was cut, as `max_output_tokens` does, and which the answer goes on with."""
    return (item.type, item.role) == ("message", "assistant") and item.status in ("incomplete", "in_progress")


def _add(path: str, item: Item, turns: list[Turn]) -> None:
    """Reasoning, text and calls that the model gave one behind the other are one turn. Raises `InvalidRequest` for an
    item that is not supported."""
    last = turns[-1] if turns and turns[-1].role == "assistant" else None
    match item.type:
        case "message":
            role = needed(path, "role", item.role)
            if role != "assistant" or last is None or (last.texts and not last.calls):
                turns.append(Turn(path, role))
            turns[-1].texts += texts_of(f"{path}.content", needed(path, "content", item.content), _TEXTS)
        case "reasoning":
            texts = texts_of(f"{path}.content", item.content or [], _TEXTS)
            texts = texts or texts_of(f"{path}.summary", item.summary or [], _TEXTS)
            try:
                texts = texts or _unsealed(item.encrypted_content)
            except ValueError:
                raise InvalidRequest(
                    f"{path}.encrypted_content: what another server has encrypted cannot be read here; leave the item "
                    "out.",
                    f"{path}.encrypted_content",
                ) from None
            turns.append(Turn(path, "assistant", thoughts=texts))
        case "function_call":
            if last is None:
                turns.append(Turn(path, "assistant"))
            arguments = needed(path, "arguments", item.arguments)
            name = item.name if item.namespace is None else _full_name(item.namespace, needed(path, "name", item.name))
            turns[-1].calls.append(called(path, needed(path, "call_id", item.call_id), name, arguments))
        case "function_call_output":
            text = "\n".join(texts_of(f"{path}.output", needed(path, "output", item.output), _TEXTS))
            turns.append(Turn(path, "tool", [text], answers=needed(path, "call_id", item.call_id)))
        case "item_reference":
            raise InvalidRequest(
                f"{path}.type: nothing is stored here that an item could refer to; send the item itself, as clients do "
                "with store: false (the AI SDK with providerOptions: {openai: {store: false}}).",
                f"{path}.type",
            )
        case _:
            raise InvalidRequest(f"{path}.type: an item of type {item.type[:50]!r} is not supported.", f"{path}.type")
