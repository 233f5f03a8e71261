"""From a running generation to the bytes of an answer: one JSON body, or server-sent events."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from miniserve.core import CompletionDelta, FinishReason, InvalidRequest
from miniserve.server.errors import APIError, from_invalid_request, json_response
from miniserve.server.generation import ClientGone, Generation, while_connected
from miniserve.server.responses import FinishWord, Usage

logger = logging.getLogger(__name__)

_encoder = msgspec.json.Encoder()
_EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class UsageCount:
    """Tokens of one HTTP request: every prompt once, the output of every choice."""

    def __init__(self, prompt_lens: Sequence[int]) -> None:
        self._prompt_tokens = sum(prompt_lens)
        self._cached: dict[int, int] = {}
        self._completion_tokens = 0

    def add(self, number: int, delta: CompletionDelta) -> None:
        self._completion_tokens += len(delta.token_ids)
        if delta.index == 0:
            self._cached[number] = max(delta.num_cached_tokens, self._cached.get(number, 0))

    def result(self) -> Usage:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class Answer(Protocol):
    """The shape of an answer, of completions or of chat. `number` is that of the prompt."""

    usage: UsageCount

    def add(self, number: int, delta: CompletionDelta) -> None:
        """Gather for `whole`."""

    def whole(self) -> object: ...

    def chunks(self, number: int, delta: CompletionDelta) -> Iterator[dict[str, Any]]:
        """The events for one delta, each with exactly one choice, without usage."""

    def empty_chunk(self) -> dict[str, Any]:
        """An event without choices, for the usage."""


class StreamMode(msgspec.Struct, frozen=True):
    """What the client asked for in `stream_options`."""

    usage_at_end: bool = False
    usage_in_every_chunk: bool = False


class GenerationResponse(Response):
    """Runs the generation while the client is there. `stream` None answers with one JSON body.

    Until the first token is there an error is an HTTP error; after that it is an event `{"error": …}` before `[DONE]`.
    """

    def __init__(self, generation: Generation, answer: Answer, stream: StreamMode | None) -> None:
        super().__init__()
        self._generation = generation
        self._answer = answer
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._stream is None:
                response = await while_connected(receive, self._whole())
                await response(scope, receive, send)
            else:
                await while_connected(receive, self._send_events(send, self._stream))
        except ClientGone:
            return

    async def _whole(self) -> Response:
        async with self._generation, aclosing(self._generation.deltas()) as deltas:
            async for number, delta in deltas:
                self._answer.usage.add(number, delta)
                self._answer.add(number, delta)
        return json_response(self._answer.whole())

    async def _send_events(self, send: Send, mode: StreamMode) -> None:
        async with self._generation, aclosing(self._generation.deltas()) as deltas:
            first = await anext(deltas)
            await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM_HEADERS})
            try:
                await self._send_chunks(send, mode, *first)
                async for number, delta in deltas:
                    await self._send_chunks(send, mode, number, delta)
                if mode.usage_at_end:
                    await _send_event(send, {**self._answer.empty_chunk(), "usage": self._answer.usage.result()})
            except Exception as error:
                await _send_event(send, _as_api_error(error).envelope())
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _send_chunks(self, send: Send, mode: StreamMode, number: int, delta: CompletionDelta) -> None:
        usage = self._answer.usage
        usage.add(number, delta)
        for chunk in self._answer.chunks(number, delta):
            if mode.usage_at_end:
                chunk["usage"] = usage.result() if mode.usage_in_every_chunk else None
            await _send_event(send, chunk)


def finish_word(delta: CompletionDelta) -> FinishWord | None:
    """OpenAI's word; `Generation` has raised for the other reasons."""
    if delta.finish_reason is None:
        return None
    return "stop" if delta.finish_reason is FinishReason.STOP else "length"


async def _send_event(send: Send, body: object) -> None:
    data = b"data: " + _encoder.encode(body) + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


def _as_api_error(error: Exception) -> APIError:
    if isinstance(error, APIError):
        return error
    if isinstance(error, InvalidRequest):
        return from_invalid_request(error)
    logger.error("A streaming request failed.", exc_info=error)
    return APIError(500, f"The server failed on this request ({type(error).__name__}); its log says more.")
