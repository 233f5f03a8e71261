"""`/v1/chat/completions`: a conversation through the model's chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
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
from miniserve.server.service import MAX_TEXT, Service


class ChatAnswer(Answer):
    """One choice for each of the n sequences of the one prompt."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(
        self,
        header: Header,
        tokenizer: Tokenizer,
        token_ids: list[int],
        params: SamplingParams,
        body: ChatCompletionRequest,
    ) -> None:
        super().__init__(header, tokenizer, [token_ids], params, body)
        self._echo = _echoed(body)
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
            if self._echo:
                yield {"index": index, "delta": {"content": self._echo}, "logprobs": None, "finish_reason": None}
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
            "message": {
                "role": "assistant",
                "content": self._echo + "".join(delta.text for delta in deltas),
                "refusal": None,
            },
            "logprobs": self._logprobs(deltas) if self._with_logprobs else None,
            "finish_reason": finish_word(deltas[-1]),
            "stop_reason": deltas[-1].stop_reason,
        }

    def _logprobs(self, deltas: Sequence[Completion]) -> ChatLogprobs:
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        return chat_logprobs(self._tokenizer, entries, self.token_name)


async def respond(service: Service, body: ChatCompletionRequest) -> GenerationResponse:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    service.check_alive()
    service.check_model(body.model)
    service.fields.check(body, REFUSED_IN_CHAT)
    params = service.rules.for_chat(body)
    service.turns.check(1, params.n)
    max_chars = None if body.truncate_prompt_tokens is None else MAX_TEXT
    token_ids = service.truncate(await render(service, body.messages, body, max_chars), body)
    header = service.header("chatcmpl")
    answer = ChatAnswer(header, service.engine.tokenizer, token_ids, params, body)
    return service.reply(await service.generation([token_ids], params, body, header), answer, body)


def _echoed(body: ChatCompletionRequest) -> str:
    """The text that the answer begins with. Raises `InvalidRequest` where it continues none."""
    if not body.echo:
        return ""
    if not body.continue_final_message:
        raise InvalidRequest(
            "echo begins the answer with the message that it continues; it needs continue_final_message.", "echo"
        )
    content = body.messages[-1].content
    if isinstance(content, str):
        return content
    if content is not None and len(content) == 1 and content[0].text is not None:
        return content[0].text
    raise InvalidRequest("echo needs a last message whose content is one text.", "echo")


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


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], name: Callable[[int], str]) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for entry in entries:
        top = [_top_logprob(tokenizer, *pair, name) for pair in zip(entry.top_ids, entry.top_logprobs, strict=True)]
        content.append({**_top_logprob(tokenizer, entry.token_id, entry.logprob, name), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _top_logprob(tokenizer: Tokenizer, token_id: int, logprob: float, name: Callable[[int], str]) -> TopLogprob:
    return {
        "token": name(token_id),
        "logprob": logprob,
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
