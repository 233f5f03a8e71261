"""What agents' APIs (`/v1/messages`, `/v1/responses`) share: a request becomes that of a chat, and its answer is told
in parts, one behind the other: reasoning, text, calls."""

from __future__ import annotations

import re
import uuid
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from miniserve.core import Completion, FinishReason, InvalidRequest
from miniserve.engine.call_reader import CallArguments, CallBegin, CallEnd, Content, Thought
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.chat import Chat, prepare
from miniserve.server.fields import ASK_CHAT, LEAVE_OUT, OTHER_LENGTHS, REFUSED, Body, Refusal, Refused
from miniserve.server.protocol import ChatCompletionRequest, ChatMessage, ContentPart, MessageToolCall
from miniserve.server.reading import AnswerReader
from miniserve.server.reply import Answer, GenerationResponse, Header
from miniserve.server.service import Service

T = TypeVar("T")
_MESSAGE = re.compile(r"messages\[(\d+)\]")
_SAME_REMEDY = ("previous_response_id", "conversation", "context", "verbosity")  # as in chat


def refused_beside(
    body: type[Body], length: str, more: Mapping[str, tuple[object, ...]], remedies: Mapping[str, str]
) -> Refused:
    """Of a request that is a chat's under other names: what chat takes or refuses and `body` has not, and `more`, by
    their neutral values. `length`: what it calls max_tokens."""
    instead = dict.fromkeys(ChatCompletionRequest.model_fields, ASK_CHAT)
    for name, refusal in REFUSED.items():
        instead[name] = refusal.remedy if name in _SAME_REMEDY or refusal.remedy == LEAVE_OUT else ASK_CHAT
    instead |= dict.fromkeys((*OTHER_LENGTHS, "max_tokens", "max_completion_tokens"), f"use {length}")
    neutrals: dict[str, tuple[object, ...]] = dict.fromkeys(ChatCompletionRequest.model_fields, ())
    neutrals |= {"n": (1,), "logprobs": (False,), "do_sample": ()}
    neutrals |= {name: refusal.neutrals for name, refusal in REFUSED.items()}
    return {
        name: Refusal(values, {**instead, **remedies}.get(name, LEAVE_OUT))
        for name, values in {**neutrals, **more}.items()
        if name not in body.model_fields
    }


@dataclass(slots=True)
class Turn:
    """A message of the chat. source: where in the request it begins. answers: the id of the call whose result it is."""

    source: str
    role: str
    texts: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[MessageToolCall] = field(default_factory=list)
    answers: str | None = None

    def message(self) -> ChatMessage:
        content: Any = [ContentPart(type="text", text=text) for text in self.texts]
        if len(self.texts) < 2:
            content = self.texts[0] if self.texts else None if self.calls else ""
        beside: dict[str, Any] = {"tool_calls": self.calls} if self.calls else {}
        if self.thoughts:
            beside["reasoning_content"] = "\n".join(self.thoughts)
        if self.answers is not None:
            beside["tool_call_id"] = self.answers
        return ChatMessage(role=self.role, content=content, **beside)


@dataclass(frozen=True, slots=True)
class Translation:
    """A request as one of a chat, whose messages the turns are. names: what fields of the chat are called in the
    request."""

    chat: ChatCompletionRequest
    names: Mapping[str, str]
    turns: Sequence[Turn]

    async def prepared(self, service: Service) -> Chat:
        """Raises `InvalidRequest` in the request's words, or `APIError`."""
        with self._own_words():
            return await prepare(service, self.chat)

    async def respond(
        self, service: Service, prefix: str, stream: bool, answer: Callable[[Header, Chat], Answer]
    ) -> GenerationResponse:
        """`prefix`: of the answer's id. Raises `InvalidRequest` in the request's words, or `APIError`."""
        chat = await self.prepared(service)
        header = service.header(prefix)
        with self._own_words():
            generation = await service.generation([chat.token_ids], chat.params, self.chat, header)
        return service.reply(generation, answer(header, chat), stream)

    @contextmanager
    def _own_words(self) -> Iterator[None]:
        try:
            yield
        except InvalidRequest as error:
            message, param = str(error), error.param or ""
            place, root = _MESSAGE.match(param), re.split(r"[.\[]", param)[0]
            if place is not None:
                param = self._source(place)
            elif root in self.names:
                param = self.names[root]
                message = re.sub(rf"\b{root}\b(?!\[)", param, message)
            raise InvalidRequest(_MESSAGE.sub(self._source, message), param or None, error.code) from error

    def _source(self, place: re.Match[str]) -> str:
        return self.turns[int(place[1])].source


@dataclass(slots=True)
class Part:
    """id: of a call as the model's template takes it. name: of the called function. complete: the answer went on behind
    the part, or ended by itself; of a call: its end was read."""

    kind: Literal["thought", "text", "call"]
    id: str
    name: str = ""
    complete: bool = False
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Of a call, the JSON text of its arguments as the model wrote it."""
        return "".join(self.pieces)


class PartsAnswer(Answer):
    """Of one sequence, with names for its events."""

    names_events = True
    end = b""

    def __init__(self, header: Header, tokenizer: Tokenizer, chat: Chat) -> None:
        super().__init__(header, tokenizer, [chat.token_ids])
        self._reading = chat.reading
        self._reader = AnswerReader(chat.reading, tokenizer)
        self._parts: list[Part] = []

    @abstractmethod
    def begun(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        """The events of a part's beginning."""

    @abstractmethod
    def piece(self, index: int, part: Part, text: str) -> dict[str, Any]:
        """The event of a part's next text."""

    @abstractmethod
    def ended(self, index: int, part: Part) -> Iterator[dict[str, Any]]:
        """The events of a part's end."""

    @abstractmethod
    def finished(self, delta: Completion) -> Iterator[dict[str, Any]]:
        """The events behind all parts; `delta` is the last."""

    def add(self, number: int, delta: Completion) -> None:
        for _ in self.told(delta):
            pass

    def events(self, number: int, delta: Completion) -> Iterator[dict[str, Any]]:
        self.count(number, delta)
        yield from self.told(delta)

    def told(self, delta: Completion) -> Iterator[dict[str, Any]]:
        for event in self._reader.push(delta):
            match event:
                case Thought(text):
                    yield from self._take("thought", text)
                case Content(text):
                    yield from self._take("text", text)
                case CallBegin(_, name):
                    yield from self._begin(Part("call", self._reading.call_id(), name))
                case CallArguments(_, text):
                    yield from self._take("call", text)
                case CallEnd():
                    self._parts[-1].complete = True
        if delta.finish_reason is not None:
            yield from self._end(complete=delta.finish_reason is FinishReason.STOP)
            yield from self.finished(delta)

    def _take(self, kind: Literal["thought", "text", "call"], text: str) -> Iterator[dict[str, Any]]:
        if not self._parts or self._parts[-1].kind != kind:
            yield from self._begin(Part(kind, uuid.uuid4().hex))
        self._parts[-1].pieces.append(text)
        yield self.piece(len(self._parts) - 1, self._parts[-1], text)

    def _begin(self, part: Part) -> Iterator[dict[str, Any]]:
        yield from self._end(complete=True)
        self._parts.append(part)
        yield from self.begun(len(self._parts) - 1, part)

    def _end(self, complete: bool) -> Iterator[dict[str, Any]]:
        if self._parts:
            part = self._parts[-1]
            part.complete = part.complete or (complete and part.kind != "call")
            yield from self.ended(len(self._parts) - 1, part)


def needed(path: str, name: str, value: T | None) -> T:
    """A field that what stands at `path` must have. Raises `InvalidRequest`."""
    if value is None:
        raise InvalidRequest(f"{path}.{name} is missing.", f"{path}.{name}")
    return value


def called(path: str, call_id: str | None, name: str | None, arguments: dict[str, Any] | None) -> MessageToolCall:
    """A call of an earlier turn. Raises `InvalidRequest` for what it lacks."""
    function = {"name": needed(path, "name", name), "arguments": arguments or {}}
    return MessageToolCall.model_validate({"id": call_id, "function": function})
