"""`/v1/chat/completions`: a conversation through the model's chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from miniserve.core import Completion, InvalidRequest, SamplingParams, TokenLogprobs
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.fields import REFUSED_IN_CHAT
from miniserve.server.protocol import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    RenderOptions,
    TokenLogprob,
    TopLogprob,
)
from miniserve.server.reply import Answer, GenerationResponse, Header, finish_word
from miniserve.server.service import Service


class ChatAnswer(Answer):
    """One choice for each of the n sequences of the one prompt."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, header: Header, tokenizer: Tokenizer, prompt_len: int, params: SamplingParams) -> None:
        super().__init__(header, [prompt_len])
        self._tokenizer = tokenizer
        self._with_logprobs = params.logprobs is not None
        self._deltas: dict[int, list[Completion]] = {}
        self._started: set[int] = set()

    def add(self, number: int, delta: Completion) -> None:
        self._deltas.setdefault(delta.index, []).append(delta)

    def choices(self) -> list[ChatChoice]:
        return [self._choice(index) for index in sorted(self._deltas)]

    def pieces(self, number: int, delta: Completion) -> Iterator[ChatChunkChoice]:
        index = delta.index
        if index not in self._started:
            self._started.add(index)
            opening: ChatDelta = {"role": "assistant", "content": ""}
            yield {"index": index, "delta": opening, "logprobs": None, "finish_reason": None}
        self.count(number, delta)
        reason = finish_word(delta)
        if reason is None or delta.text or delta.logprobs:
            logprobs = self._logprobs([delta]) if delta.logprobs else None
            yield {"index": index, "delta": {"content": delta.text}, "logprobs": logprobs, "finish_reason": None}
        if reason is not None:
            end: ChatChunkChoice = {"index": index, "delta": {}, "logprobs": None, "finish_reason": reason}
            yield {**end, "stop_reason": delta.stop_reason}

    def _choice(self, index: int) -> ChatChoice:
        deltas = self._deltas[index]
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(delta.text for delta in deltas), "refusal": None},
            "logprobs": self._logprobs(deltas) if self._with_logprobs else None,
            "finish_reason": finish_word(deltas[-1]),
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, deltas: Sequence[Completion]) -> ChatLogprobs:
        return chat_logprobs(self._tokenizer, [entry for delta in deltas for entry in delta.logprobs or ()])


async def respond(service: Service, body: ChatCompletionRequest) -> GenerationResponse:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    service.check_alive()
    service.check_model(body.model)
    service.fields.check(body, REFUSED_IN_CHAT)
    params = service.rules.for_chat(body)
    await service.check_grammar(body)
    service.turns.check(1, params.n)
    token_ids = await render(service, body.messages, body)
    header = service.header("chatcmpl")
    answer = ChatAnswer(header, service.engine.tokenizer, len(token_ids), params)
    return GenerationResponse(await service.generation([token_ids], params, body, header), answer, body)


async def render(
    service: Service, messages: Sequence[ChatMessage], body: RenderOptions, max_chars: int | None = None
) -> list[int]:
    """The ids of a conversation, whose text is bounded as in `Service.encode`. Raises `InvalidRequest`."""
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        raise InvalidRequest(
            "chat_template is not accepted from requests, as a template is a program; the server's operator may allow "
            "it with --trust-request-chat-template.",
            "chat_template",
        )
    continues = bool(body.continue_final_message)
    rendered = service.engine.tokenizer.chat_template.submit(
        [_message(f"messages[{position}]", message) for position, message in enumerate(messages)],
        add_generation_prompt=not continues if body.add_generation_prompt is None else body.add_generation_prompt,
        continue_final_message=continues,
        documents=body.documents,
        chat_template=body.chat_template,
        variables=body.chat_template_kwargs,
    )
    text = await asyncio.wrap_future(rendered)
    (ids,) = await service.encode([text], bool(body.add_special_tokens), max_chars)
    return ids


def _message(path: str, message: ChatMessage) -> dict[str, Any]:
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequest(f"{path}.{name}: tool calls are not supported by this server.", f"{path}.{name}")
    content: Any = message.content
    if isinstance(content, list):
        content = [{**part.extras, "type": part.type, "text": part.text} for part in content]
    return {**message.extras, "role": message.role, "content": content}


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for entry in entries:
        top = [_top_logprob(tokenizer, *pair) for pair in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        content.append({**_top_logprob(tokenizer, entry.token_id, entry.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    return {
        "token": tokenizer.token_str(token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
