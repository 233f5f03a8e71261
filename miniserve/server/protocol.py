"""OpenAI's protocol, and what other servers add to it: the bodies of requests, which pydantic checks, and of answers,
plain dicts that msgspec encodes.

Every optional field of a request takes an explicit null, which means the same as leaving it out. Unknown fields are
kept and judged by `fields.FieldPolicy`, but for those of messages and tools, which the chat template sees.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    PlainValidator,
    ValidatorFunctionWrapHandler,
)
from pydantic_core import CoreSchema, core_schema
from typing_extensions import TypedDict  # typing's own will not do for pydantic below Python 3.12

from miniserve.engine.call_reader import FUNCTION_NAME
from miniserve.server.fields import (
    REFUSED_IN_CHAT,
    REFUSED_IN_COMPLETIONS,
    REFUSED_OF_TOKENIZER,
    Body,
    Lenient,
)
from miniserve.server.structured import StructuredFields

Prompt = str | list[int]


def _prompts(value: object) -> list[Prompt]:
    """All of OpenAI's four shapes as a list of prompts. Written by hand: pydantic's union would report every element
    of a list of token ids as an error of its own."""
    if isinstance(value, str):
        prompts: list[Prompt] = [value]
    elif isinstance(value, list) and _token_ids(value):
        prompts = [value]
    elif isinstance(value, list) and value and all(isinstance(item, str) or _token_ids(item) for item in value):
        prompts = value
    elif value is None:
        raise ValueError("a prompt is required")
    else:
        raise ValueError("must be a string, a list of strings, a list of token ids or a list of lists of token ids")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt must not be empty")
    for prompt in prompts:
        if isinstance(prompt, str):
            _unicode(prompt)
    return prompts


def _token_ids(value: object) -> bool:
    return isinstance(value, list) and set(map(type, value)) == {int}


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]


def _texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _not_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _int64(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"must be between {-(2**63)} and {2**63 - 1}, a 64-bit integer")
    return value


def _bias(value: object) -> object:
    """OpenAI's keys are token ids written as strings."""
    if not isinstance(value, dict):
        return value
    wrong = [key for key in value if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12)]
    if wrong:
        raise ValueError(f"{', '.join(repr(str(key)[:50]) for key in wrong[:8])}: no token ids, which the keys must be")
    for key, number in value.items():
        if isinstance(number, bool):
            raise ValueError(f"the value of key {key!r} must be a number")
    bias = {int(key): number for key, number in value.items()}
    if len(bias) < len(value):
        raise ValueError("two keys are the same token id")
    return bias


T = TypeVar("T")
ListOf = Annotated[list[T], Field(fail_fast=True)]
Int = Annotated[int, BeforeValidator(_not_bool), AfterValidator(_int64)]
Float = Annotated[float, BeforeValidator(_not_bool)]
Texts = Annotated[ListOf[Text], BeforeValidator(_texts, json_schema_input_type=str | list[str])]


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


CacheSalt = Annotated[Text, Field(min_length=1, max_length=256)]


class SamplingBody(Body):
    """How to sample and when to stop: of completions, chat and responses."""

    min_tokens: Int | None = None
    temperature: Float | None = None
    top_p: Float | None = None
    top_k: Int | None = None
    min_p: Float | None = None
    repetition_penalty: Float | None = None
    presence_penalty: Float | None = None
    frequency_penalty: Float | None = None
    logit_bias: Annotated[dict[int, float], BeforeValidator(_bias, json_schema_input_type=dict[str, float])] | None = (
        None
    )
    seed: Int | None = None
    stop: Texts | None = None
    stop_token_ids: ListOf[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: ListOf[Int] | None = None
    bad_words: Texts | None = None
    priority: Int | None = None
    cache_salt: CacheSalt | None = None


class GenerationBody(StructuredFields, SamplingBody):
    """What completions and chat share: beside how to sample, how to answer."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int | None = None
    max_tokens: Int | None = None
    prompt_logprobs: Int | None = None
    logprob_token_ids: Annotated[ListOf[Int], Field(min_length=1)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: Int | None = None
    truncation_side: Literal["left", "right"] | None = None
    echo: bool | None = None

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens


class CompletionRequest(GenerationBody):
    refused = REFUSED_IN_COMPLETIONS

    prompt: Annotated[
        list[Prompt],
        PlainValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    logprobs: Int | None = None
    best_of: Int | None = None
    add_special_tokens: bool | None = None


class ContentPart(Lenient):
    type: str
    text: Text | None = None


def _text_or_list(value: object, parts: ValidatorFunctionWrapHandler) -> Any:
    """By hand, as a union would name its branches in errors."""
    return _unicode(value) if isinstance(value, str) else parts(value)


class OrText:
    """Of a list's type: a text may stand in its place."""

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        parts = handler(source)
        either = core_schema.union_schema([core_schema.str_schema(), parts])
        return core_schema.no_info_wrap_validator_function(_text_or_list, parts, json_schema_input_schema=either)


TextOrList = Annotated[ListOf[T], OrText()]


Arguments = str | dict[str, Any]


def _arguments(value: object) -> dict[str, Any]:
    """As OpenAI has them, a JSON text; some clients send the object itself, or an empty text for none."""
    try:
        found = json.loads(_unicode(value) or "{}") if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise ValueError("must be the JSON text of an object") from None
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ValueError("must be the JSON text of an object")
    return found


CalledName = Annotated[Text, Field(min_length=1)]
CalledArguments = Annotated[dict[str, Any], PlainValidator(_arguments, json_schema_input_type=Arguments | None)]


class CalledFunction(Lenient):
    name: CalledName
    arguments: CalledArguments = Field(default_factory=dict)


class MessageToolCall(Lenient):
    """A call that the model made earlier."""

    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Lenient):
    role: Text = Field(min_length=1, max_length=64)
    content: TextOrList[ContentPart] | None = None
    tool_calls: ListOf[MessageToolCall] | None = None
    function_call: Any = None


def _function_name(name: str) -> str:
    if FUNCTION_NAME.fullmatch(name) is None:
        raise ValueError("must be 1 to 128 letters, digits and _ - . : /")
    return name


FunctionName = Annotated[str, AfterValidator(_function_name)]


def _of_an_object(schema: dict[str, Any]) -> dict[str, Any]:
    kinds = schema.get("type", "object")
    if kinds != "object" and not (isinstance(kinds, list) and "object" in kinds):
        raise ValueError("must be the schema of an object, as arguments have names")
    return schema


Parameters = Annotated[dict[str, Any], AfterValidator(_of_an_object)]


class FunctionDefinition(Lenient):
    """`parameters` is the JSON schema of the arguments; with `strict` it is enforced wherever the model calls it."""

    name: FunctionName
    description: Text | None = None
    parameters: Parameters | None = None
    strict: bool | None = None


class Tool(Lenient):
    type: Literal["function"]
    function: FunctionDefinition


class NamedTool(NamedTuple):
    name: str


def _tool_choice(value: object) -> str | NamedTool:
    if value in ("none", "auto", "required"):
        return str(value)
    if isinstance(value, dict) and value.get("type") == "function":
        function = value.get("function", value)  # chat has the name one level deeper than responses
        if isinstance(function, dict) and isinstance(name := function.get("name"), str):
            return NamedTool(name)
    raise ValueError('must be none, auto, required or {"type": "function", "function": {"name": …}}')


# Far more than clients send, and few enough to be looked through between two tokens of others.
MAX_TOOLS = 1024
ToolsOf = Annotated[ListOf[T], Field(max_length=MAX_TOOLS)]
ToolChoice = Annotated[str | NamedTool, PlainValidator(_tool_choice, json_schema_input_type=str | dict[str, Any])]


class RenderOptions(Body):
    """What chat and `/tokenize` share: how a conversation is rendered."""

    tools: ToolsOf[Tool] | None = None
    reasoning_effort: Text | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: ListOf[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None


class ChatCompletionRequest(RenderOptions, GenerationBody):
    refused = REFUSED_IN_CHAT

    messages: Annotated[ListOf[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    @property
    def asked_tokens(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is None:
            return "max_tokens", self.max_tokens
        return "max_completion_tokens", self.max_completion_tokens


class TokenizeRequest(RenderOptions):
    """Either `prompt` or `messages`."""

    refused = REFUSED_OF_TOKENIZER

    model: str | None = None
    prompt: Text | None = None
    messages: Annotated[ListOf[ChatMessage], Field(min_length=1)] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    refused = REFUSED_OF_TOKENIZER

    model: str | None = None
    tokens: ListOf[Int]


# --- answers ----------------------------------------------------------------------------------------------------------

FinishWord = Literal["stop", "length", "tool_calls"]


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(TypedDict):
    error: ErrorDetail


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id; of the first token there is none


class CompletionChoice(TypedDict):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishWord | None
    stop_reason: str | int | None
    # Where they are asked for.
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class _Header(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(_Header):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprob]
    refusal: None


class FunctionOut(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallOut(TypedDict):
    """In a stream the first piece of a call has its id, type and name."""

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionOut


class ChatMessageOut(TypedDict):
    """Reasoning goes by two names: vLLM's and DeepSeek's."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallOut]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(_Header):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallOut]


class ChatChunkChoice(TypedDict):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishWord | None
    stop_reason: NotRequired[str | int | None]
    token_ids: NotRequired[list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "miniserve"
    root: str
    parent: None = None
    max_model_len: int
    permission: tuple[str, ...] = ()


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class TokenizerInfo(TypedDict):
    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Health(TypedDict):
    status: Literal["ok"]
    running: int
    waiting: int
    last_step_age: float | None


class Load(TypedDict):
    server_load: int  # requests that generate, or wait for it


class Version(TypedDict):
    version: str
