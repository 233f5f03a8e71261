"""A streaming client for OpenAI-compatible servers that measures: one request in, one record out.

Bytes are split into server-sent events by hand and decoded into narrow msgspec structs as they come from the socket
(`bench.connections`), so that the client uses little CPU compared with the server. Times are taken when bytes arrive,
before anything is decoded.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from miniserve.bench.connections import ConnectionPool, HttpError
from miniserve.bench.workload import Sample, ServeConfig

_MAX_ERROR_CHARS = 300


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    role: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What one request brought. Times in seconds; `start` counts from the start of the run.

    `ttft` reaches from sending to the first chunk that carries a token, `last` to the last one, `e2e` to the end of the
    stream. `itl` are the gaps between chunks that carry tokens: where a server sends several tokens a chunk there are
    fewer gaps than tokens. Token counts are those that the server reports. `error` is None where the request was
    answered in full.
    """

    start: float
    ttft: float = 0.0
    last: float = 0.0
    e2e: float = 0.0
    itl: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    num_chunks: int = 0
    finish_reason: str | None = None
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first: (last - first) / (n - 1). None where there is only one."""
        if self.completion_tokens < 2:
            return None
        return (self.last - self.ttft) / (self.completion_tokens - 1)


class SSELines:
    """Splits a stream of bytes into the payloads of its `data:` lines; comments and other fields are skipped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


async def send(pool: ConnectionPool, config: ServeConfig, sample: Sample, run_start: float) -> RequestRecord:
    """Send one request and read its stream to the end. A failure becomes the record's `error`; nothing is retried."""
    path, content = _request(config, sample)
    start = time.perf_counter()
    record = RequestRecord(start=start - run_start)
    answer = _Answer(record, start)
    try:
        status = await pool.post(path, content, answer.feed)
        record.error = record.error or answer.close(status)
    except HttpError as error:
        record.error = str(error)
    except msgspec.MsgspecError as error:
        record.error = f"a chunk of the stream does not follow OpenAI's format: {error}"
    record.e2e = time.perf_counter() - start
    if record.error is None:
        record.error = _shortcoming(record, config, sample)
    return record


def _request(config: ServeConfig, sample: Sample) -> tuple[str, bytes]:
    """Path and body."""
    body = {
        "model": config.model,
        "max_tokens": sample.output_len,
        "temperature": config.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:  # not a field of OpenAI's API: strict servers refuse it
        body["ignore_eos"] = True
    if config.endpoint == "chat":
        messages = [{"role": "user", "content": sample.prompt}]
        return "/v1/chat/completions", msgspec.json.encode(body | {"messages": messages})
    return "/v1/completions", msgspec.json.encode(body | {"prompt": sample.prompt})


class _Answer:
    """Decodes an answer's bytes as they arrive, and records its tokens and times."""

    def __init__(self, record: RequestRecord, start: float) -> None:
        self._record = record
        self._start = start
        self._lines = SSELines()
        self._done = False
        self._refusal = b""

    def feed(self, status: int, data: bytes, arrived: float) -> None:
        """`arrived` is of the clock of `start`. Raises `msgspec.MsgspecError` for what no such server sends."""
        if status != 200:
            self._refusal += data
            return
        for payload in self._lines.feed(data):
            if payload == b"[DONE]":
                self._done = True
            else:
                self._chunk(_decode_chunk(payload), arrived - self._start)

    def close(self, status: int) -> str | None:
        """The answer is over: what is wrong with it, if anything."""
        if status != 200:
            return f"HTTP {status}: {self._refusal.decode(errors='replace')[:_MAX_ERROR_CHARS]}"
        return None if self._done else "the stream ended without [DONE]"

    def _chunk(self, chunk: _Chunk, now: float) -> None:
        record = self._record
        error = bytes(chunk.error)
        if error != b"null":
            record.error = f"error in the stream: {error.decode()[:_MAX_ERROR_CHARS]}"
        if chunk.usage is not None:
            record.prompt_tokens = chunk.usage.prompt_tokens
            record.completion_tokens = chunk.usage.completion_tokens
        if not chunk.choices:
            return
        choice = chunk.choices[0]
        if _carries_token(choice):
            if record.num_chunks == 0:
                record.ttft = now
            else:
                record.itl.append(now - record.last)
            record.num_chunks += 1
            record.last = now
        if choice.finish_reason is not None:
            record.finish_reason = choice.finish_reason
            record.last = now


def _carries_token(choice: _Choice) -> bool:
    """Whether a chunk counts as a token. One with empty text does, since a token's text may be held back; the chunk
    that opens a chat answer with its role does not, nor does an empty one that only closes the answer."""
    delta = choice.delta
    text = choice.text if delta is None else delta.content or delta.reasoning or delta.reasoning_content
    if text:
        return True
    return choice.finish_reason is None and (delta is None or delta.role is None)


def _shortcoming(record: RequestRecord, config: ServeConfig, sample: Sample) -> str | None:
    if record.completion_tokens == 0:
        return "the server reported no completion tokens (it must honour stream_options.include_usage)"
    if record.num_chunks == 0:
        # One chunk with everything, closed at once and empty of text: the time of the end is the only one known.
        record.ttft = record.last
    if config.ignore_eos and record.completion_tokens != sample.output_len:
        return f"the server returned {record.completion_tokens} tokens, but ignore_eos asks for {sample.output_len}"
    return None
