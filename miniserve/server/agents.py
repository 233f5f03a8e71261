"""What agents' APIs (`/v1/messages`, `/v1/responses`) share: a request becomes that of a chat, and its answer is shown
in parts, one behind the other: reasoning, text, calls."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from miniserve.core import Completion, InvalidRequest
from miniserve.engine.tokenizer import Tokenizer
from miniserve.scheduler.limits import ContextExceeded
from miniserve.server.chat import Chat, prepare
from miniserve.server.fields import ASK_CHAT, LEAVE_OUT, OTHER_LENGTHS, REFUSED, Body, Refusal, Refused
from miniserve.server.protocol import (
    ChatCompletionRequest,
    ChatMessage,
    ContentPart,
    FunctionDefinition,
    MessageToolCall,
    Tool,
)
from miniserve.server.reading import AnswerReader, Part
from miniserve.server.reply import Answer, GenerationResponse
from miniserve.server.service import Service

T = TypeVar("T")
_MESSAGE = re.compile(r"messages\[(\d+)\]")
_SAME_REMEDY = ("previous_response_id", "conversation", "context", "verbosity")  # as in chat


def refused_beside(
    body: type[Body],
    names: Mapping[str, str],
    more: Mapping[str, tuple[object, ...]],
    remedies: Mapping[str, str],
) -> Refused:
    """Of a request that is a chat's under other names: what chat takes or refuses and `body` has not, and `more`, by
    their neutral values. `names`: see `Translation`."""
    instead = dict.fromkeys(ChatCompletionRequest.model_fields, ASK_CHAT)
    for name, refusal in REFUSED.items():
        instead[name] = refusal.remedy if name in _SAME_REMEDY or refusal.remedy == LEAVE_OUT else ASK_CHAT
    length = names.get("max_tokens", "max_tokens")
    instead |= dict.fromkeys((*OTHER_LENGTHS, "max_completion_tokens"), f"use {length}")
    instead |= {name: f"use {own}" for name, own in names.items()}
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
    request. too_long: the API's own sentence about a length, where its clients look for one."""

    chat: ChatCompletionRequest
    names: Mapping[str, str]
    turns: Sequence[Turn]
    too_long: Callable[[ContextExceeded], str] = str

    async def prepared(self, service: Service) -> Chat:
        """Raises `InvalidRequest` in the request's words, or `APIError`."""
        with self._own_words():
            return await prepare(service, self.chat)

    async def respond(self, service: Service, answer: Callable[[Chat], Answer]) -> GenerationResponse:
        """Raises what `prepared` does."""
        with self._own_words():
            chat = await prepare(service, self.chat)
            return await service.respond(answer(chat), chat.params, self.chat)

    @contextmanager
    def _own_words(self) -> Iterator[None]:
        try:
            yield
        except InvalidRequest as error:
            message = self.too_long(error) if isinstance(error, ContextExceeded) else str(error)
            param = error.param or ""
            place, root = _MESSAGE.match(param), re.split(r"[.\[]", param)[0]
            if place is not None:
                param = self._source(place)
            elif root in self.names:
                param = self.names[root]
                message = re.sub(rf"\b{root}\b(?!\[)", param, message)
            raise InvalidRequest(_MESSAGE.sub(self._source, message), param or None, error.code) from error

    def _source(self, place: re.Match[str]) -> str:
        return self.turns[int(place[1])].source


class PartsAnswer(Answer):
    """Of one sequence, with names for its events."""

    names_events = True
    end = b""

    def __init__(self, model: str, tokenizer: Tokenizer, chat: Chat) -> None:
        super().__init__(model, tokenizer, [chat.token_ids])
        self._reader = AnswerReader(chat.reading, tokenizer)
        self._begun = False
        self._last: Completion | None = None  # once all has come

    def first(self) -> Iterable[dict[str, Any]]:
        """The events before all parts, not before the first token: only then it is known what was cached."""
        return ()

    @abstractmethod
    def begun(self, part: Part) -> Iterator[dict[str, Any]]:
        """The events of a part's beginning."""

    @abstractmethod
    def piece(self, part: Part, text: str) -> dict[str, Any]:
        """The event of a part's next text."""

    @abstractmethod
    def ended(self, part: Part) -> Iterator[dict[str, Any]]:
        """The events of a part's end."""

    def add(self, number: int, delta: Completion) -> None:
        for _ in self.events(number, delta):
            pass

    def events(self, number: int, delta: Completion) -> Iterator[dict[str, Any]]:
        self.count(number, delta)
        if not self._begun:
            self._begun = True
            yield from self.first()
        for kind, part, text in self._reader.push(delta):
            match kind:
                case "begin":
                    yield from self.begun(part)
                case "text":
                    part.pieces.append(text)
                    yield self.piece(part, text)
                case "end":
                    yield from self.ended(part)
        if delta.finish_reason is not None:
            self._last = delta


def needed(path: str, name: str, value: T | None) -> T:
    """A field that what stands at `path` must have. Raises `InvalidRequest`."""
    if value is None:
        raise InvalidRequest(f"{path}.{name} is missing.", f"{path}.{name}")
    return value


def called(path: str, call_id: str | None, name: str | None, arguments: dict[str, Any] | None) -> MessageToolCall:
    """A call of an earlier turn. Raises `InvalidRequest` for what it lacks."""
    function = {"name": needed(path, "name", name), "arguments": arguments or {}}
    return MessageToolCall.model_validate({"id": call_id, "function": function})


class TextPiece(Protocol):
    type: str
    text: str | None


def texts_of(path: str, content: str | Sequence[TextPiece], kinds: Collection[str] = ("text",)) -> list[str]:
    """Raises `InvalidRequest` for a piece whose type is none of `kinds`."""
    if isinstance(content, str):
        return [content]
    for index, piece in enumerate(content):
        if piece.type not in kinds:
            where = f"{path}[{index}].type"
            raise InvalidRequest(f"{where}: {piece.type[:50]!r} is not supported; only text is.", where)
    return [needed(f"{path}[{index}]", "text", piece.text) for index, piece in enumerate(content)]


def function_tool(name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None) -> Tool:
    function = FunctionDefinition(name=name, description=description, parameters=parameters, strict=strict)
    return Tool(type="function", function=function)
