"""From a running generation to the bytes of an answer: one JSON body, or server-sent events."""

from __future__ import annotations

import logging
import time
import uuid
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import msgspec
from fastapi import Response
from starlette.types import Receive, Scope, Send

from miniserve import __version__
from miniserve.core import Completion, FinishReason, InvalidRequest, SamplingParams, TokenLogprobs
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.config import ServerConfig
from miniserve.server.connection import direct_writer
from miniserve.server.errors import APIError, as_api_error, json_response
from miniserve.server.generation import ClientGone, Generation, while_connected
from miniserve.server.metrics import RequestMetrics
from miniserve.server.protocol import (
    FinishWord,
    GenerationBody,
    PromptLogprob,
    PromptLogprobs,
    StreamOptions,
    Usage,
)
from miniserve.server.request_log import log_request

logger = logging.getLogger(__name__)

KEEP_ALIVE = 15.0  # seconds without an event after which a comment says that the stream lives
_LOGGED_TOKENS, _LOGGED_CHARS = 1000, 2000  # of prompts in the log
_FINGERPRINT = f"miniserve-{__version__}"
_encoder = msgspec.json.Encoder()
_EVENT_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


class Answer(ABC):
    """The shape of an answer, as a whole or as events. `number` is that of the prompt. Every prompt's tokens count
    once, and the output of every sequence."""

    id_prefix: ClassVar[str]
    names_events: ClassVar[bool] = False  # by their `type`, in a line before the data
    beat: ClassVar[bytes] = b": keep-alive\n\n"
    end: ClassVar[bytes] = b"data: [DONE]\n\n"

    def __init__(self, model: str, tokenizer: Tokenizer, token_ids: Sequence[list[int]]) -> None:
        self.id = f"{self.id_prefix}{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.token_ids = token_ids  # of each prompt
        self._tokenizer = tokenizer
        self._prompt_tokens = sum(map(len, token_ids))
        self._cached_tokens = [0] * len(token_ids)
        self._completion_tokens = 0

    @abstractmethod
    def add(self, number: int, delta: Completion) -> None:
        """Gather for `whole`."""

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """What was gathered."""

    @abstractmethod
    def events(self, number: int, delta: Completion) -> Iterator[dict[str, Any]]:
        """Those of one delta."""

    def text_event(self, number: int, delta: Completion) -> bytes | None:
        """`events`, encoded, of a delta that brings nothing but text; None where a template does not serve."""
        return None

    def opening(self) -> Iterable[dict[str, Any]]:
        """The events before any token."""
        return ()

    def closing(self) -> Iterable[dict[str, Any]]:
        """The events behind those of the last delta."""
        return ()

    def failure(self, error: APIError) -> Iterable[dict[str, Any]]:
        """The events of a generation that failed."""
        return (error.envelope(),)

    def encode(self, event: dict[str, Any]) -> bytes:
        """As it goes over the wire."""
        name = b"event: " + event["type"].encode() + b"\n" if self.names_events else b""
        return name + b"data: " + _encoder.encode(event) + b"\n\n"

    def count(self, number: int, delta: Completion) -> None:
        """Take a delta's tokens into the usage."""
        self._completion_tokens += len(delta.token_ids)
        if delta.index == 0:
            self._cached_tokens[number] = max(delta.num_cached_tokens, self._cached_tokens[number])

    def log(self, request_id: str, records: Sequence[RequestMetrics], with_prompts: bool) -> None:
        """The request's line in the log; see `log_request`."""
        text = None
        if with_prompts:
            text = " | ".join(self._tokenizer.decode(ids[:_LOGGED_TOKENS], False) for ids in self.token_ids)
            text = text[:_LOGGED_CHARS]
        log_request(self.id, request_id, self._prompt_tokens, sum(self._cached_tokens), records, text)


class ChoicesAnswer(Answer):
    """Of completions or of chat: one choice for each sequence, numbered prompt · n + the sequence's index."""

    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prompt_in_choice: ClassVar[bool] = False  # else what is said of the prompt stands beside the choices

    def __init__(
        self,
        model: str,
        tokenizer: Tokenizer,
        token_ids: Sequence[list[int]],
        params: SamplingParams,
        body: GenerationBody,
    ) -> None:
        super().__init__(model, tokenizer, token_ids)
        self._params = params
        self._body = body
        self._chunk_head = b"data: " + _encoder.encode(self._head(self.chunk_kind)).removesuffix(b"}")
        self._shows_tokens = bool(body.return_token_ids) or body.prompt_logprobs is not None
        options = body.stream_options or StreamOptions()
        self._usage_at_end = bool(options.include_usage)
        self._usage_in_every_chunk = self._usage_at_end and bool(options.continuous_usage_stats)
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}  # by the prompt
        self._new_ids: defaultdict[int, list[int]] = defaultdict(list)  # generated and not shown yet, by the choice
        self._begun: set[int] = set()  # choices
        self._around_text: dict[int, tuple[bytes, bytes]] = {}  # of an event with nothing but text, by the choice

    @abstractmethod
    def text_choice(self, index: int, text: str) -> Mapping[str, Any] | None:
        """The one of `pieces` for a delta that is text alone, not its choice's first and not its last; None where there
        may be more to say."""

    @abstractmethod
    def choices(self) -> Iterable[Mapping[str, Any]]:
        """What was gathered, in the order in which it is shown."""

    @abstractmethod
    def pieces(self, number: int, delta: Completion) -> Iterator[Mapping[str, Any]]:
        """The choices for one delta, each for a separate event; the end comes separately, too, behind the last text.
        `count`s the delta's tokens before the first choice that has some."""

    def whole(self) -> dict[str, Any]:
        choices = [{**choice, **self._ids_of(choice["index"])} for choice in self.choices()]
        beside = {} if self.prompt_in_choice else self._about_prompt(0)
        return {
            **self._head(self.whole_kind),
            "choices": [{**choice, "index": index} for index, choice in enumerate(choices)],
            "usage": self.usage(),
            **beside,
        }

    def events(self, number: int, delta: Completion) -> Iterator[dict[str, Any]]:
        """The chunks for one delta, without what all have; see `encode`."""
        for choice in self.pieces(number, delta):
            event: dict[str, Any] = self._with_tokens(choice) if self._shows_tokens else {"choices": (choice,)}
            if self._usage_at_end:
                event["usage"] = self.usage() if self._usage_in_every_chunk else None
            yield event
        index = self.index(number, delta)
        if index in self._around_text or self._shows_tokens or self._usage_in_every_chunk:
            return
        if (text_choice := self.text_choice(index, "?")) is not None:
            usage = {"usage": None} if self._usage_at_end else {}
            before, after = self.encode({"choices": (text_choice,), **usage}).rsplit(b'"?"', 1)
            self._around_text[index] = before, after

    def text_event(self, number: int, delta: Completion) -> bytes | None:
        around = self._around_text.get(self.index(number, delta))
        if around is None or delta.logprobs is not None or delta.finish_reason is not None:
            return None
        self.count(number, delta)
        return b"%b%b%b" % (around[0], _encoder.encode(delta.text), around[1])

    def closing(self) -> Iterator[dict[str, Any]]:
        if self._usage_at_end:
            yield {"choices": (), "usage": self.usage()}

    def encode(self, event: dict[str, Any]) -> bytes:
        if "choices" not in event:  # an error
            return super().encode(event)
        # Their beginnings are the same, so it is encoded once.
        return b"%b,%b\n\n" % (self._chunk_head, _encoder.encode(event)[1:])

    def _with_tokens(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """An event that says of tokens what was asked for. Their ids come with the first piece that is not the mere
        opening of a message."""
        index = choice["index"]
        is_first = index not in self._begun
        beside = {} if self._begun or self.prompt_in_choice else self._about_prompt(0)
        self._begun.add(index)
        if "role" not in choice.get("delta", ()):
            choice = {**choice, **self._ids_of(index, with_prompt=is_first)}
        return {"choices": (choice,), **beside}

    def count(self, number: int, delta: Completion) -> None:
        super().count(number, delta)
        if not self._shows_tokens:
            return
        if self._body.return_token_ids:
            self._new_ids[self.index(number, delta)] += delta.token_ids
        if self._body.prompt_logprobs is not None and delta.prompt_logprobs and number not in self._prompt_logprobs:
            self._prompt_logprobs[number] = [self._prompt_logprob(entry) for entry in delta.prompt_logprobs]

    def index(self, number: int, delta: Completion) -> int:
        """The choice that a delta is of."""
        return number * self._params.n + delta.index

    def token_name(self, token_id: int) -> str:
        """How logprobs call a token: by its text or, on demand, by its id, which no two tokens share."""
        return f"token_id:{token_id}" if self._body.return_tokens_as_token_ids else self._tokenizer.token_str(token_id)

    def usage(self) -> Usage:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached_tokens)},
        }

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "system_fingerprint": _FINGERPRINT}

    def _ids_of(self, index: int, with_prompt: bool = True) -> dict[str, Any]:
        """What a choice says of tokens beside its text, where it was asked for."""
        prompt = self._about_prompt(index // self._params.n) if self.prompt_in_choice and with_prompt else {}
        return {"token_ids": self._new_ids.pop(index, []), **prompt} if self._body.return_token_ids else prompt

    def _about_prompt(self, number: int) -> dict[str, Any]:
        about: dict[str, Any] = {}
        if self._body.return_token_ids:
            about["prompt_token_ids"] = self.token_ids[number]
        if self._body.prompt_logprobs is not None:
            about["prompt_logprobs"] = self._prompt_logprobs.get(number)
        return about

    def _prompt_logprob(self, entry: TokenLogprobs | None) -> dict[str, PromptLogprob] | None:
        """The best tokens at a place of the prompt and the one that stands there, by their ids."""
        if entry is None:
            return None
        best = zip(entry.top_ids, entry.top_logprobs, range(1, len(entry.top_ids) + 1), strict=True)
        return {
            str(token_id): {"logprob": logprob, "rank": rank, "decoded_token": self.token_name(token_id)}
            for token_id, logprob, rank in [(entry.token_id, entry.logprob, entry.rank), *best]
        }


class GenerationResponse(Response):
    """Runs the generation while the client is there, for one JSON body or a stream of events.

    A stream begins at once, before the first token, and is never silent for long: balancers cut connections that are.
    So an error that comes later than at once is an event, too.
    """

    def __init__(self, generation: Generation, answer: Answer, stream: bool, config: ServerConfig) -> None:
        super().__init__()
        self._config = config
        self._generation = generation
        self._answer = answer
        self._stream = stream
        self._quiet = True  # nothing was sent since the last beat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._generation:
                if self._stream:
                    await while_connected(
                        receive, self._send_events(scope, send), every=KEEP_ALIVE, beat=lambda: self._beat(send)
                    )
                    return
                response = await while_connected(receive, self._whole())
            await response(scope, receive, send)
        except ClientGone:
            return
        finally:
            if self._config.log_requests and self._generation.records:
                request_id = scope.get("state", {}).get("request_id", "")
                self._answer.log(request_id, self._generation.records, self._config.log_prompts)

    async def _whole(self) -> Response:
        self._generation.is_ready, self._generation.take = lambda: True, self._answer.add
        while (item := await self._generation.next()) is not None:
            self._answer.add(*item)
        return json_response(self._answer.whole())

    async def _send_events(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM_HEADERS})
        generation, answer = self._generation, self._answer
        if (direct := direct_writer(scope)) is not None:

            def take(number: int, delta: Completion) -> None:
                if (data := answer.text_event(number, delta)) is None:
                    data = b"".join(map(answer.encode, answer.events(number, delta)))
                if data:
                    self._quiet = False
                    direct.write(data)

            generation.is_ready, generation.take = direct.is_ready, take
        try:
            await self._send(send, answer.opening())
            while (item := await generation.next()) is not None:
                await self._send(send, answer.events(*item))
            await self._send(send, answer.closing())
        except Exception as error:
            if not isinstance(error, APIError | InvalidRequest):
                logger.error("A streaming request failed.", exc_info=error)
            await self._send(send, answer.failure(as_api_error(error)))
        await send({"type": "http.response.body", "body": answer.end, "more_body": False})

    async def _send(self, send: Send, events: Iterable[dict[str, Any]]) -> None:
        if data := b"".join(map(self._answer.encode, events)):
            self._quiet = False
            await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _beat(self, send: Send) -> None:
        if self._quiet:
            await send({"type": "http.response.body", "body": self._answer.beat, "more_body": True})
        self._quiet = True


def finish_word(delta: Completion) -> FinishWord | None:
    """OpenAI's word. There is no other reason here: of a failure `generate` makes an error."""
    if delta.finish_reason is None:
        return None
    return "stop" if delta.finish_reason is FinishReason.STOP else "length"
