"""From a running generation to the bytes of an answer: one JSON body, or server-sent events."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from miniserve import __version__
from miniserve.core import Completion, FinishReason, InvalidRequest
from miniserve.server.errors import APIError, as_api_error, json_response
from miniserve.server.generation import ClientGone, Generation, while_connected
from miniserve.server.protocol import FinishWord, GenerationBody, StreamOptions, Usage

Deltas = AsyncGenerator[tuple[int, Completion], None]
logger = logging.getLogger(__name__)

KEEP_ALIVE = 15.0  # seconds without an event after which a comment says that the stream lives
_encoder = msgspec.json.Encoder()
_EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


@dataclass(frozen=True, slots=True)
class Header:
    """The first fields of every answer of one request."""

    id: str
    created: int
    model: str

    def body(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"miniserve-{__version__}",
        }


class Answer(ABC):
    """The shape of an answer, of completions or of chat. `number` is that of the prompt. Every prompt's tokens count
    once, and the output of every choice."""

    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, header: Header, prompt_lens: Sequence[int]) -> None:
        self._header = header
        self._prompt_tokens = sum(prompt_lens)
        self._cached_tokens = [0] * len(prompt_lens)
        self._completion_tokens = 0

    @abstractmethod
    def add(self, number: int, delta: Completion) -> None:
        """Gather for `whole`."""

    @abstractmethod
    def choices(self) -> Sequence[Mapping[str, Any]]:
        """What was gathered, in order."""

    @abstractmethod
    def pieces(self, number: int, delta: Completion) -> Iterator[Mapping[str, Any]]:
        """The choices for one delta, each for a separate event; the end comes separately, too, behind the last text.
        `count`s the delta's tokens before the first choice that has some."""

    def whole(self) -> dict[str, Any]:
        return {**self._header.body(self.whole_kind), "choices": self.choices(), "usage": self.usage()}

    def chunk(self, *choices: Mapping[str, Any]) -> dict[str, Any]:
        """An event; one without choices is for the usage."""
        return {**self._header.body(self.chunk_kind), "choices": choices}

    def count(self, number: int, delta: Completion) -> None:
        """Take a delta's tokens into the usage."""
        self._completion_tokens += len(delta.token_ids)
        if delta.index == 0:
            self._cached_tokens[number] = max(delta.num_cached_tokens, self._cached_tokens[number])

    def usage(self) -> Usage:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }


class GenerationResponse(Response):
    """Runs the generation while the client is there, for one JSON body or a stream of events, as `body` asks.

    A stream begins at once, before the first token, and is never silent for long: balancers cut connections that are.
    So an error that comes later than at once is an event `{"error": …}` before `[DONE]`.
    """

    def __init__(self, generation: Generation, answer: Answer, body: GenerationBody) -> None:
        super().__init__()
        self._generation = generation
        self._answer = answer
        self._stream = bool(body.stream)
        options = body.stream_options or StreamOptions()
        self._usage_at_end = bool(options.include_usage)
        self._usage_in_every_chunk = self._usage_at_end and bool(options.continuous_usage_stats)
        self._quiet = True  # nothing was sent since the last beat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._generation as deltas:
                if self._stream:
                    await while_connected(
                        receive, self._send_events(deltas, send), every=KEEP_ALIVE, beat=lambda: self._beat(send)
                    )
                    return
                response = await while_connected(receive, self._whole(deltas))
            await response(scope, receive, send)
        except ClientGone:
            return

    async def _whole(self, deltas: Deltas) -> Response:
        async with aclosing(deltas):
            async for number, delta in deltas:
                self._answer.count(number, delta)
                self._answer.add(number, delta)
        return json_response(self._answer.whole())

    async def _send_events(self, deltas: Deltas, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM_HEADERS})
        try:
            async with aclosing(deltas):
                async for number, delta in deltas:
                    for choice in self._answer.pieces(number, delta):
                        chunk = self._answer.chunk(choice)
                        if self._usage_at_end:
                            chunk["usage"] = self._answer.usage() if self._usage_in_every_chunk else None
                        await self._send_event(send, chunk)
            if self._usage_at_end:
                await self._send_event(send, {**self._answer.chunk(), "usage": self._answer.usage()})
        except Exception as error:
            if not isinstance(error, APIError | InvalidRequest):
                logger.error("A streaming request failed.", exc_info=error)
            await self._send_event(send, as_api_error(error).envelope())
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _send_event(self, send: Send, body: object) -> None:
        self._quiet = False
        data = b"data: " + _encoder.encode(body) + b"\n\n"
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _beat(self, send: Send) -> None:
        if self._quiet:
            await send({"type": "http.response.body", "body": b": keep-alive\n\n", "more_body": True})
        self._quiet = True


def finish_word(delta: Completion) -> FinishWord | None:
    """OpenAI's word. There is no other reason here: of a failure `generate` makes an error."""
    if delta.finish_reason is None:
        return None
    return "stop" if delta.finish_reason is FinishReason.STOP else "length"
