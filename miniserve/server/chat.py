"""`/v1/chat/completions`: a conversation through the model's chat template."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from miniserve.core import Completion, InvalidRequest, SamplingParams, TokenLogprobs
from miniserve.engine.chat_template import names_variable
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatMessageOut,
    FinishWord,
    FunctionOut,
    RenderOptions,
    TokenLogprob,
    Tool,
    ToolCallOut,
    TopLogprob,
    Usage,
)
from miniserve.server.reading import AnswerReader, Part, Reading, chosen_tools, forced_calls, reading_of
from miniserve.server.reply import ChoicesAnswer, GenerationResponse, finish_word
from miniserve.server.service import Service
from miniserve.server.structured import find_grammar

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class ChatAnswer(ChoicesAnswer):
    """One choice for each of the n sequences of the one prompt."""

    id_prefix, whole_kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer, chat: Chat, body: ChatCompletionRequest) -> None:
        super().__init__(model, tokenizer, [chat.token_ids], chat.params, body)
        self._echo = chat.echo
        self._asks_ids = bool(chat.params.logprob_token_ids)
        self._reading = chat.reading
        self._readers: dict[int, AnswerReader] = {}
        self._last: dict[int, Completion] = {}
        self._entries: defaultdict[int, list[TokenLogprobs]] = defaultdict(list)

    def add(self, number: int, delta: Completion) -> None:
        self.count(number, delta)
        # Read as they come: all at the end would hold up other requests.
        for _, part, text in self._reader(delta.index).push(delta):
            part.pieces.append(text)
        self._entries[delta.index] += delta.logprobs or ()
        self._last[delta.index] = delta

    def choices(self) -> list[ChatChoice]:
        return [self._choice(delta) for _, delta in sorted(self._last.items())]

    def pieces(self, number: int, delta: Completion) -> Iterator[ChatChunkChoice]:
        index = delta.index
        if index not in self._readers:
            opening: ChatDelta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
            if self._echo:
                yield {"index": index, "delta": {"content": self._echo}, "logprobs": None, "finish_reason": None}
        self.count(number, delta)
        messages = [message for step in self._reader(index).push(delta) if (message := _delta(*step))]
        if not messages and (delta.logprobs or (self._reading.is_plain and delta.finish_reason is None)):
            messages = [{"content": ""}]
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        for message in messages:
            yield {"index": index, "delta": message, "logprobs": logprobs, "finish_reason": None}
            logprobs = None
        if (reason := self._finish_word(delta)) is not None:
            end: ChatChunkChoice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
            yield {**end, "stop_reason": delta.stop_reason}

    def text_choice(self, index: int, text: str) -> ChatChunkChoice | None:
        if not self._reading.is_plain:
            return None
        return {"index": index, "delta": {"content": text}, "logprobs": None, "finish_reason": None}

    def usage(self) -> Usage:
        usage = super().usage()
        if self._reading.reasoning is not None:
            count = sum(reader.num_reasoning_tokens for reader in self._readers.values())
            usage["completion_tokens_details"] = {"reasoning_tokens": count}
        return usage

    def _reader(self, index: int) -> AnswerReader:
        if index not in self._readers:
            self._readers[index] = AnswerReader(self._reading, self._tokenizer)
        return self._readers[index]

    def _finish_word(self, delta: Completion) -> FinishWord | None:
        reason = finish_word(delta)
        return "tool_calls" if reason == "stop" and self._reader(delta.index).num_calls else reason

    def _choice(self, last: Completion) -> ChatChoice:
        entries = self._entries[last.index]
        with_logprobs = self._params.logprobs is not None
        return {
            "index": last.index,
            "message": self._message(self._reader(last.index).parts),
            "logprobs": self._logprobs(entries) if with_logprobs else None,
            "finish_reason": self._finish_word(last),
            "stop_reason": last.stop_reason,
        }

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
        return chat_logprobs(self._tokenizer, entries, self.token_name, with_drawn=self._asks_ids)

    def _message(self, parts: Sequence[Part]) -> ChatMessageOut:
        """Content is null where there is only reasoning or calls."""
        content = self._echo + "".join(part.text for part in parts if part.kind == "text")
        thought = "".join(part.text for part in parts if part.kind == "thought")
        calls: list[ToolCallOut] = [
            {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.text}}
            for part in parts
            if part.kind == "call"
        ]
        empty = None if thought or calls else ""
        message: ChatMessageOut = {"role": "assistant", "content": content or empty, "refusal": None}
        if thought:
            message["reasoning"] = message["reasoning_content"] = thought
        if calls:
            message["tool_calls"] = calls
        return message


def _delta(kind: str, part: Part, text: str) -> ChatDelta:
    """Empty for a step that a chat's events do not show."""
    match kind, part.kind:
        case "text", "text":
            return {"content": text}
        case "text", "thought":
            return {"reasoning": text, "reasoning_content": text}
        case "text", "call":
            return {"tool_calls": [{"index": part.call_number, "function": {"arguments": text}}]}
        case "begin", "call":
            function: FunctionOut = {"name": part.name, "arguments": ""}
            call: ToolCallOut = {"index": part.call_number, "id": part.id, "type": "function", "function": function}
            return {"tool_calls": [call]}
    return {}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation that is ready to be answered."""

    token_ids: list[int]
    params: SamplingParams
    reading: Reading
    echo: str  # what the content begins with


async def prepare(service: Service, body: ChatCompletionRequest) -> Chat:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    params = service.rules.for_chat(body)
    tokenizer, tools = service.engine.tokenizer, chosen_tools(body)
    if (found := find_grammar(body)) is not None:
        if tools and found[1].kind != "json_schema":
            only = "where it is a JSON schema or tool_choice is none"
            raise InvalidRequest(f"{found[0]} goes with tools only {only}.", found[0])
        await service.check_grammar(*found)
    service.turns.check(1, params.n)
    template = tokenizer.chat_template.source(body.chat_template, tools)
    dialect = service.config.tool_dialect(template) if tools else None
    text = await render(service, body.messages, body, tools)
    truncates = body.truncate_prompt_tokens is not None
    (token_ids,) = await service.encode([text], bool(body.add_special_tokens), any_length=truncates)
    kept = service.truncate(token_ids, body)
    if len(kept) < len(token_ids):
        token_ids, text = kept, tokenizer.decode(kept, False)  # whose end may be another
    marks = service.config.reasoning_dialect(template)
    continued = _final_text(body.messages[-1]) if body.continue_final_message else None
    reasoning = None if marks is None else marks.after(text, continued)
    reading = reading_of(body, dialect, tools, reasoning, tokenizer)
    grammar = None
    if dialect is not None:
        grammar = await service.in_grammar_thread(
            forced_calls, body, reading, dialect, tools, tokenizer, params.grammar
        )
    params = msgspec.structs.replace(
        params,
        grammar=grammar or params.grammar,
        reasoning=reasoning,
        shown_special_tokens=tuple(reading.hidden.values()),
    )
    return Chat(token_ids, params, reading, _echoed(body))


def _echoed(body: ChatCompletionRequest) -> str:
    """Raises `InvalidRequest` where there is no message to continue."""
    if body.echo and not body.continue_final_message:
        raise InvalidRequest(
            "echo begins the answer with the message that it continues; it needs continue_final_message.", "echo"
        )
    content = body.messages[-1].content
    if body.echo and isinstance(content, list) and len(content) != 1:
        raise InvalidRequest("echo needs a last message whose content is one text.", "echo")
    return _final_text(body.messages[-1]) if body.echo else ""


async def respond(service: Service, body: ChatCompletionRequest) -> GenerationResponse:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    chat = await prepare(service, body)
    answer = ChatAnswer(service.model, service.engine.tokenizer, chat, body)
    return await service.respond(answer, chat.params, body)


async def render(service: Service, messages: Sequence[ChatMessage], body: RenderOptions, tools: Sequence[Tool]) -> str:
    """The text of a conversation. Raises `InvalidRequest`."""
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        raise InvalidRequest(
            "chat_template is not accepted from requests, as a template is a program; the server's operator may allow "
            "it with --trust-request-chat-template.",
            "chat_template",
        )
    continues, template = bool(body.continue_final_message), service.engine.tokenizer.chat_template
    source = template.source(body.chat_template, tools)
    rendered = template.submit(
        [_message(f"messages[{position}]", message, source) for position, message in enumerate(messages)],
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        tools=[tool.model_dump() for tool in tools],
        documents=body.documents,
        chat_template=body.chat_template,
        variables=_variables(service, body, source),
    )
    text = await asyncio.wrap_future(rendered)
    await service.rendered.turn()
    return text


def _variables(service: Service, body: RenderOptions, template: str) -> dict[str, Any]:
    """What the template is told beside the messages. Raises `InvalidRequest` for an effort that it cannot take, and as
    `FieldPolicy.pass_over` for a variable that it does not name."""
    effort, variables = body.reasoning_effort, body.chat_template_kwargs or {}
    for name in variables:
        if not names_variable(template, name):
            service.fields.pass_over(type(body), f"chat_template_kwargs.{name}")
    if effort is None:
        return variables
    if knows_effort(template):
        return {"reasoning_effort": effort, **variables}
    if effort in _EFFORTS and (switched := reasoning_variables(service, template, effort != "none")) is not None:
        return {**switched, **variables}
    raise InvalidRequest(
        f"reasoning_effort {effort[:50]!r} means nothing to this model's chat template; leave it out, or use "
        'chat_template_kwargs, for example {"enable_thinking": false}, where the template knows it.',
        "reasoning_effort",
    )


def knows_effort(template: str) -> bool:
    return names_variable(template, "reasoning_effort")


def reasoning_variables(service: Service, template: str, reasons: bool) -> dict[str, Any] | None:
    """What makes the model reason, or not: the template's switch, or nothing where it does so anyway. None: it does the
    other thing."""
    for switch in ("enable_thinking", "thinking"):
        if names_variable(template, switch):
            return {switch: reasons}
    return {} if (service.config.reasoning_dialect(template) is not None) == reasons else None


def _final_text(message: ChatMessage) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text or "" for part in content or ())


def _message(path: str, message: ChatMessage, template: str) -> dict[str, Any]:
    for name in ("prefix", "partial"):  # other servers' words for a last message that the answer continues
        if message.extras.get(name) and name not in template:
            where = f"{path}.{name}"
            raise InvalidRequest(f"{where} is not supported here; use continue_final_message.", where)
    if message.function_call:
        raise InvalidRequest(f"{path}.function_call is not supported here; use tool_calls.", f"{path}.function_call")
    without = {"function_call"} if message.tool_calls else {"function_call", "tool_calls"}
    return message.model_dump(exclude=without, warnings=False)  # the content may be a text


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], name: Callable[[int], str], *, with_drawn: bool = False
) -> ChatLogprobs:
    """`with_drawn`: the token that was drawn is among the alternatives, too."""
    content: list[TokenLogprob] = []
    for entry in entries:
        drawn = _top_logprob(tokenizer, entry.token_id, entry.logprob, name)
        top = [_top_logprob(tokenizer, *pair, name) for pair in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        if with_drawn and entry.token_id not in entry.top_ids:
            top.append(drawn)
        content.append({**drawn, "top_logprobs": top})
    return {"content": content, "refusal": None}


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float, name: Callable[[int], str]) -> TopLogprob:
    return {
        "token": name(token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
