"""`/v1/messages`: Anthropic's API. The prefix cache needs no marks, so `cache_control` changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NotRequired

from fastapi import Response
from pydantic import Field
from typing_extensions import TypedDict

from miniserve.core import FinishReason, InvalidRequest
from miniserve.scheduler.limits import ContextExceeded
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
from miniserve.server.chat import knows_effort, reasoning_variables
from miniserve.server.errors import APIError, json_response
from miniserve.server.fields import LEAVE_OUT, Body, Exact, Refusal, refusals
from miniserve.server.protocol import (
    CacheSalt,
    CalledName,
    ChatCompletionRequest,
    Float,
    FunctionName,
    Int,
    ListOf,
    NamedTool,
    Parameters,
    Text,
    TextOrList,
    Texts,
    Tool,
    ToolsOf,
)
from miniserve.server.reading import Part
from miniserve.server.service import Service
from miniserve.server.structured import JSONSchemaFormat, ResponseFormat


class Block(Body):
    """A piece of a message. The fields that it needs depend on its type."""

    type: Text
    text: Text | None = None
    thinking: Text | None = None
    id: Text | None = None
    name: CalledName | None = None
    input: dict[str, Any] | None = None
    tool_use_id: Text | None = None
    content: TextOrList[Block] | None = None
    is_error: bool | None = None
    # Without effect.
    signature: str | None = None
    data: str | None = None
    citations: Any = None
    caller: Any = None
    cache_control: Any = None


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: TextOrList[Block]


class ToolDefinition(Body):
    refused = refusals({
        LEAVE_OUT: {"input_examples": ([],), "defer_loading": (False,), "allowed_callers": (["direct"],)}
    })  # fmt: skip

    type: Text | None = None
    name: FunctionName
    description: Text | None = None
    input_schema: Parameters | None = None
    strict: bool | None = None
    # Without effect: the prefix cache needs no marks, and arguments are always sent as they come.
    cache_control: Any = None
    eager_input_streaming: bool | None = None


class ToolChoice(Exact):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Exact):
    """`budget_tokens` is a target, here as there; `max_tokens` bounds reasoning, too."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Exact):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Exact):
    effort: Text | None = None
    format: OutputFormat | None = None


class MessagesRequest(Body):
    model: str | None = None
    messages: Annotated[ListOf[Message], Field(min_length=1)]
    system: TextOrList[Block] | None = None
    tools: ToolsOf[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None
    max_tokens: Int
    stream: bool | None = None
    stop_sequences: Texts | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: CacheSalt | None = None


class CountTokensRequest(MessagesRequest):
    """Clients may send all of a request whose prompt they want counted."""

    max_tokens: Int | None = None  # type: ignore[assignment]


# What Claude Code sends: all thinking stays in the prompt, as far as the chat template keeps it.
_KEEP_THINKING = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}
_NAMES = {
    "input_tokens": "prompt",
    "stop": "stop_sequences",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
}
_REFUSED = refused_beside(
    MessagesRequest,
    _NAMES,
    {
        "container": (), "context_management": ({"edits": []}, _KEEP_THINKING), "mcp_servers": ([],),
        "speed": ("standard",), "inference_geo": (), "diagnostics": (), "output_format": (), "betas": ([],),
        "compaction": (), "fallbacks": ([],),
    },
    {
        "output_format": "use output_config.format",
        "parallel_tool_calls": "use tool_choice.disable_parallel_tool_use",
        "mcp_servers": "call them from the client",
    },
)  # fmt: skip
MessagesRequest.refused = {
    **_REFUSED,
    # Anthropic's client then sends the whole conversation by itself.
    "thread": Refusal((), "send the whole conversation; none is kept", "thread_unsupported_request"),
}


# --- answers ----------------------------------------------------------------------------------------------------------


class BlockOut(TypedDict):
    type: Literal["text", "thinking", "tool_use"]
    text: NotRequired[str]
    thinking: NotRequired[str]
    signature: NotRequired[str]
    id: NotRequired[str]
    name: NotRequired[str]
    input: NotRequired[dict[str, Any]]


class MessageUsage(TypedDict):
    """`input_tokens` are those that the prefix cache did not have."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageOut(TypedDict):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[BlockOut]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(TypedDict):
    input_tokens: int


class AnthropicErrorCode(TypedDict):
    error_code: str


class AnthropicErrorDetail(TypedDict):
    type: str
    message: str
    details: NotRequired[AnthropicErrorCode]


class AnthropicError(TypedDict):
    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str


# Clients send thinking back only with one (the AI SDK's streams, litellm's). It is not looked at.
_SIGNATURE = "miniserve"


class MessagesAnswer(PartsAnswer):
    id_prefix = "msg_"
    beat = b'event: ping\ndata: {"type": "ping"}\n\n'

    def whole(self) -> dict[str, Any]:
        content = [self._block(part, part.text) for part in self._reader.parts]
        return {**self._message(), **self._stop(), "content": content}

    def first(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_start", "message": self._message()}

    def begun(self, part: Part) -> Iterator[dict[str, Any]]:
        yield {"type": "content_block_start", "index": part.number, "content_block": self._block(part, "")}

    def piece(self, part: Part, text: str) -> dict[str, Any]:
        kind, key = {
            "text": ("text_delta", "text"),
            "thought": ("thinking_delta", "thinking"),
            "call": ("input_json_delta", "partial_json"),
        }[part.kind]
        return {"type": "content_block_delta", "index": part.number, "delta": {"type": kind, key: text}}

    def ended(self, part: Part) -> Iterator[dict[str, Any]]:
        if part.kind == "thought":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            yield {"type": "content_block_delta", "index": part.number, "delta": delta}
        yield {"type": "content_block_stop", "index": part.number}

    def closing(self) -> Iterator[dict[str, Any]]:
        yield {"type": "message_delta", "delta": self._stop(), "usage": self._usage()}
        yield {"type": "message_stop"}

    def failure(self, error: APIError) -> Iterator[dict[str, Any]]:
        yield error.anthropic_envelope()

    def _message(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _usage(self) -> MessageUsage:
        cached = sum(self._cached_tokens)
        return {
            "input_tokens": self._prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._completion_tokens,
        }

    def _stop(self) -> dict[str, str | None]:
        if self._last is None:
            return {}
        word = self._last.stop_reason
        if isinstance(word, str):
            return {"stop_reason": "stop_sequence", "stop_sequence": word}
        if self._last.finish_reason is not FinishReason.STOP:
            return {"stop_reason": "max_tokens", "stop_sequence": None}
        return {"stop_reason": "tool_use" if self._reader.num_calls else "end_turn", "stop_sequence": None}

    def _block(self, part: Part, text: str) -> BlockOut:
        match part.kind:
            case "text":
                return {"type": "text", "text": text}
            case "thought":
                return {"type": "thinking", "thinking": text, "signature": _SIGNATURE if text else ""}
            case "call":
                return {"type": "tool_use", "id": part.id, "name": part.name, "input": _input(text)}


def _input(text: str) -> dict[str, Any]:
    """The arguments of a call. What is no object, such as those of a call that was cut, is shown as a text: a part of
    them is not to be taken for all."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": text}


# --- from a request to a chat -----------------------------------------------------------------------------------------


async def respond(service: Service, body: MessagesRequest) -> Response:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    translation, tokenizer = _translated(service, body), service.engine.tokenizer
    chat = translation.chat
    chat.max_tokens, chat.stop, chat.stream = body.max_tokens, body.stop_sequences, body.stream
    chat.temperature, chat.top_p, chat.top_k = body.temperature, body.top_p, body.top_k
    chat.cache_salt = body.cache_salt
    return await translation.respond(service, lambda chat: MessagesAnswer(service.model, tokenizer, chat))


async def count_tokens(service: Service, body: CountTokensRequest) -> Response:
    """Raises what `respond` does."""
    chat = await _translated(service, body).prepared(service)
    return json_response({"input_tokens": len(chat.token_ids)})


def _translated(service: Service, body: MessagesRequest) -> Translation:
    turns = list(_turns("system", "system", body.system)) if body.system else []
    for position, message in enumerate(body.messages):
        turns += _turns(f"messages[{position}]", message.role, message.content)
    chat = ChatCompletionRequest(messages=[turn.message() for turn in turns])
    if turns[-1].role == "assistant":  # the answer goes on with it
        if turns[-1].calls:
            raise InvalidRequest("The last message calls tools, and their results are missing.", "messages")
        chat.continue_final_message, chat.add_generation_prompt = True, False
    if body.tools:
        chat.tools = [_tool(f"tools[{index}]", tool) for index, tool in enumerate(body.tools)]
    if (choice := body.tool_choice) is not None:
        if (choice.name is not None) != (choice.type == "tool"):
            raise InvalidRequest("tool_choice: a name goes with the type tool, which needs one.", "tool_choice")
        word = "required" if choice.type == "any" else choice.type
        chat.tool_choice = word if choice.name is None else NamedTool(choice.name)
        chat.parallel_tool_calls = False if choice.disable_parallel_tool_use else None
    chat.chat_template_kwargs = body.chat_template_kwargs
    output, thinking = body.output_config or OutputConfig(), body.thinking or Thinking(type="adaptive")
    if output.effort is not None or thinking.type != "adaptive":
        template = service.engine.tokenizer.chat_template.source(None, chat.tools or [])
        _think(service, template, thinking, chat)
        if knows_effort(template) and thinking.type != "disabled":
            chat.reasoning_effort = output.effort
        elif output.effort not in (None, "high"):  # which is the API's default, and agents send it to every model
            service.fields.pass_over(MessagesRequest, "output_config.effort")
    chat.include_reasoning = False if thinking.display == "omitted" else None
    if output.format is not None:
        schema = JSONSchemaFormat(schema=output.format.json_schema)
        chat.response_format = ResponseFormat(type="json_schema", json_schema=schema)
    return Translation(chat, _NAMES, turns, _too_long)


def _too_long(error: ContextExceeded) -> str:
    """In Anthropic's words, which clients look for: Claude Code then asks for less output, or sums up the
    conversation."""
    if error.prompt_len is None:
        return f"prompt is too long: {error}"
    if error.max_tokens is None:
        return f"prompt is too long: {error.prompt_len} tokens > {error.limit - 1} maximum"
    return (
        f"input length and `max_tokens` exceed context limit: {error.prompt_len} + {error.max_tokens} > {error.limit}, "
        "decrease input length or `max_tokens` and try again"
    )


def _think(service: Service, template: str, thinking: Thinking, chat: ChatCompletionRequest) -> None:
    """By the template's switch. Where it has none, what the model does must be what is asked for."""
    if thinking.type == "adaptive":
        return
    enabled = thinking.type == "enabled"
    switched = reasoning_variables(service, template, enabled)
    if switched is None:
        raise InvalidRequest(
            f"thinking: this model {'does not reason' if enabled else 'always reasons'}, by its chat template; leave "
            "it out.",
            "thinking",
        )
    chat.chat_template_kwargs = {**switched, **(chat.chat_template_kwargs or {})}


def _tool(path: str, tool: ToolDefinition) -> Tool:
    if tool.type not in (None, "custom"):
        raise InvalidRequest(
            f"{path}.type: {tool.type[:50]!r} is a tool that the server would have to know, which it does not; only "
            "tools with an input_schema of their own are supported.",
            f"{path}.type",
        )
    schema = needed(path, "input_schema", tool.input_schema)
    return function_tool(tool.name, tool.description, schema, tool.strict)


def _turns(path: str, role: str, content: str | Sequence[Block]) -> Iterator[Turn]:
    """Of one message: results of tools are turns of their own. Raises `InvalidRequest` for a block that is not
    supported, or not in such a message."""
    turn = Turn(path, role)
    if isinstance(content, str):
        turn.texts, content = [content], []
    for index, block in enumerate(content):
        where = f"{path}[{index}]" if path == "system" else f"{path}.content[{index}]"
        match block.type:
            case "text":
                text = needed(where, "text", block.text)
                # Claude Code's note for its own servers differs in every request: no prefix would be found again.
                if role != "system" or not text.startswith("x-anthropic-billing-header:"):
                    turn.texts.append(text)
            case "redacted_thinking" if role == "assistant":
                pass  # which only those who encrypted it could read
            case "thinking" if role == "assistant":
                turn.thoughts.append(needed(where, "thinking", block.thinking))
            case "tool_use" if role == "assistant":
                turn.calls.append(called(where, block.id, block.name, needed(where, "input", block.input)))
            case "tool_result" if role == "user":
                if turn.texts:
                    yield turn
                yield _result(where, block)
                turn = Turn(path, role)
            case _:
                raise InvalidRequest(
                    f"{where}: a block of type {block.type[:50]!r} is not supported in a message of role {role}.",
                    f"{where}.type",
                )
    if turn.texts or turn.thoughts or turn.calls or not content:
        yield turn


def _result(path: str, block: Block) -> Turn:
    texts = texts_of(f"{path}.content", block.content or "")
    # The only way to tell the model of an error.
    text = "Error: " * bool(block.is_error) + "\n".join(texts)
    return Turn(path, "tool", [text], answers=needed(path, "tool_use_id", block.tool_use_id))
