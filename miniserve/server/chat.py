"""`/v1/chat/completions`: a conversation through the model's chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from miniserve.core import CompletionDelta, InvalidRequest, SamplingParams
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.fields import REFUSED_IN_CHAT
from miniserve.server.logprobs import chat_logprobs
from miniserve.server.protocol import ChatCompletionRequest, ChatMessage, RenderOptions
from miniserve.server.reply import Answer, GenerationResponse, Header, finish_word
from miniserve.server.responses import ChatChoice, ChatChunkChoice, ChatDelta, ChatLogprobs
from miniserve.server.service import Service

# `chat_template_kwargs` are variables for the template; under these names they would be options of the renderer.
_RESERVED_KWARGS = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "documents",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "self",
    "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip


class ChatAnswer(Answer):
    """One choice for each of the n sequences of the one prompt."""

    whole_kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, header: Header, tokenizer: Tokenizer, prompt_len: int, params: SamplingParams) -> None:
        super().__init__(header, [prompt_len])
        self._tokenizer = tokenizer
        self._with_logprobs = params.logprobs is not None
        self._deltas: dict[int, list[CompletionDelta]] = {}
        self._started: set[int] = set()

    def add(self, number: int, delta: CompletionDelta) -> None:
        self._deltas.setdefault(delta.index, []).append(delta)

    def choices(self) -> list[ChatChoice]:
        return [self._choice(index) for index in sorted(self._deltas)]

    def pieces(self, number: int, delta: CompletionDelta) -> Iterator[ChatChunkChoice]:
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

    def _logprobs(self, deltas: Sequence[CompletionDelta]) -> ChatLogprobs:
        return chat_logprobs(self._tokenizer, [entry for delta in deltas for entry in delta.logprobs or ()])


async def respond(service: Service, body: ChatCompletionRequest) -> GenerationResponse:
    """Raises `InvalidRequest` or `APIError` for what cannot be answered."""
    service.check_alive()
    service.check_model(body.model)
    service.fields.check(body, REFUSED_IN_CHAT)
    params = service.rules.for_chat(body)
    service.turns.check(params.n)
    token_ids = await render(service, body.messages, body)
    service.check_length(len(token_ids), params, body)
    header = service.header("chatcmpl")
    answer = ChatAnswer(header, service.engine.tokenizer, len(token_ids), params)
    return GenerationResponse(service.generation([token_ids], params, header), answer, body)


async def render(service: Service, messages: Sequence[ChatMessage], body: RenderOptions) -> list[int]:
    """The ids of a conversation; the template writes all special tokens. Raises `InvalidRequest`."""
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        raise InvalidRequest(
            "chat_template is not accepted from requests, as a template is a program; the server's operator may allow "
            "it with --trust-request-chat-template.",
            "chat_template",
        )
    kwargs = body.chat_template_kwargs or {}
    reserved = _RESERVED_KWARGS.intersection(kwargs)
    if reserved:
        raise InvalidRequest(f"chat_template_kwargs must not hold {min(reserved)!r}.", "chat_template_kwargs")
    continues = bool(body.continue_final_message)
    if continues and body.add_generation_prompt:
        raise InvalidRequest(
            "continue_final_message and add_generation_prompt exclude each other.", "continue_final_message"
        )
    conversation = [_message(position, message) for position, message in enumerate(messages)]
    opens = not continues if body.add_generation_prompt is None else body.add_generation_prompt

    def apply() -> list[int]:
        try:
            return service.engine.tokenizer.apply_chat_template(
                conversation,
                add_generation_prompt=opens,
                continue_final_message=continues,
                documents=body.documents,
                chat_template=body.chat_template,
                **kwargs,
            )
        except InvalidRequest:
            raise
        except Exception as error:  # a template is a program that runs on the client's data
            message = f"The chat template fails on these messages ({type(error).__name__}: {error})."
            raise InvalidRequest(message, "messages") from error

    num_chars = sum(len(message["content"]) for message in conversation)
    service.check_text(num_chars)
    return await service.off_loop(num_chars, apply)


def _message(position: int, message: ChatMessage) -> dict[str, Any]:
    """As templates know it: `developer` is OpenAI's newer word for `system`, parts of text are joined by newlines."""
    path = f"messages[{position}]"
    for name in ("tool_calls", "function_call"):
        if getattr(message, name):
            raise InvalidRequest(f"{path}.{name}: tool calls are not supported by this server.", f"{path}.{name}")
    role = "system" if message.role == "developer" else message.role
    return {**message.extras, "role": role, "content": _content(path, message)}


def _content(path: str, message: ChatMessage) -> str:
    if message.content is None:
        if message.role != "assistant":
            raise InvalidRequest(f"{path}.content must be a text or a list of parts.", f"{path}.content")
        return ""
    texts = []
    for position, part in enumerate(message.content):
        where = f"{path}.content[{position}]"
        if part.type not in ("text", "input_text") or part.text is None:
            raise InvalidRequest(
                f"{where}: this server takes parts of type text only, with their text.", f"{where}.type"
            )
        texts.append(part.text)
    return "\n".join(texts)
