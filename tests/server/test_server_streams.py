"""From the engine's deltas to the socket: written at once where the client keeps up, else joined for it."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import time
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, greedy, running_server, tokenizer, wait_until
from starlette.types import Message, Receive, Scope, Send

from miniserve.core import Completion, FinishReason, Reasoning, SamplingParams, TokenLogprobs
from miniserve.server.app import create_app
from miniserve.server.chat import Chat, ChatAnswer
from miniserve.server.completions import CompletionAnswer
from miniserve.server.config import ServerConfig
from miniserve.server.connection import DirectWriter
from miniserve.server.gate import PaceMiddleware
from miniserve.server.protocol import ChatCompletionRequest, CompletionRequest
from miniserve.server.reading import Reading

SCRIPT = tokenizer().encode("one two")[:2]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def request(path: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


def chunks(answer: bytes) -> list[bytes]:
    """The bodies of chunks of one answer, whose lengths must be right, without the last, which is empty."""
    rest, found = answer.partition(b"\r\n\r\n")[2], []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        assert rest[length : length + 2] == b"\r\n"
        found.append(rest[:length])
        rest = rest[length + 2 :]
    assert found.pop() == b""
    return found


def texts(data: bytes) -> list[str]:
    """Of the events before `[DONE]`, which must be the last."""
    *events, end = re.findall(rb"data: (.*)\n\n", data)
    assert end == b"[DONE]"
    return [json.loads(event)["choices"][0]["text"] for event in events]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """What goes the direct way."""
    found: list[bytes] = []
    write = DirectWriter.write
    monkeypatch.setattr(DirectWriter, "write", lambda self, data: (found.append(data), write(self, data)))
    yield found


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)])
def test_each_token_is_an_event_that_is_written_at_once(
    path: str, body: dict[str, Any], n: int, written: list[bytes]
) -> None:
    with running_server(FakeEngine(script=SCRIPT, step_seconds=0.01)) as server:
        answer = httpx.post(server.root + path, json={**body, "max_tokens": 6, "n": n, "stream": True}, timeout=60)
    direct = b"".join(written)
    assert direct == answer.content.removesuffix(b"data: [DONE]\n\n")
    assert direct.count(b"one") + direct.count(b" two") >= 6 * n
    assert all(data.endswith(b"\n\n") for data in written)


@pytest.mark.parametrize("direct", [True, False])
def test_a_client_of_http_1_0_gets_no_chunks(
    direct: bool, written: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no length ends with the connection."""
    if not direct:
        monkeypatch.setattr(DirectWriter, "is_ready", lambda self: False)
    with running_server(FakeEngine(script=SCRIPT, step_seconds=0.01)) as server:

        def ask(data: bytes) -> tuple[bytes, bytes]:
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as client, client.makefile() as file:
                client.sendall(data.replace(b" HTTP/1.1\r\n", b" HTTP/1.0\r\nExpect: 100-continue\r\n"))
                head, _, body = file.buffer.read().partition(b"\r\n\r\n")
            return head.lower(), body

        head, body = ask(request("/v1/completions", {"prompt": "x", "max_tokens": 6, "stream": True}))
        assert b"transfer-encoding" not in head and b"connection: close" in head
        assert "".join(texts(body)) == tokenizer().decode(SCRIPT) * 3
        head, body = ask(request("/v1/completions", {"prompt": "x", "max_tokens": 6}))
        assert b"content-length: %d\r\n" % len(body) in head
        assert json.loads(body)["choices"][0]["text"] == tokenizer().decode(SCRIPT) * 3
        head, body = ask(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert head.startswith(b"http/1.1 200") and not body
    assert bool(written) == direct


def test_tokens_are_joined_for_a_client_that_reads_slowly(tmp_path: Path, written: list[bytes]) -> None:
    count, path = 6000, str(tmp_path / "socket")
    engine = FakeEngine(script=SCRIPT, max_model_len=10_000, num_blocks=1000)
    with running_server(engine, uds=path) as server, socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(path)
        options = {"include_usage": True, "continuous_usage_stats": True}
        body = {"prompt": "x", "max_tokens": count, "stream": True, "stream_options": options}
        client.sendall(request("/v1/completions", body))
        wait_until(lambda: server.engine.seen and not server.engine.num_running)  # nobody waited for the client
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            answer += client.recv(65_536)
    events = [json.loads(event) for event in re.findall(rb"data: (\{.*)\n\n", b"".join(chunks(answer)))]
    pieces = [event["choices"][0]["text"] for event in events if event["choices"]]
    assert "".join(pieces) == tokenizer().decode(SCRIPT) * (count // 2)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == count
    assert counts[:100] == list(range(1, 101)), "as long as there is room each has its own event"
    assert len(written) < len(pieces) < count * 3 // 4
    assert max(b - a for a, b in pairwise(counts)) > count // 4


def test_the_direct_way_and_that_of_asgi_say_the_same() -> None:
    """A server that is not ours, as Ray's, has no direct way. Its reader may get several tokens at once."""
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/completions", {"prompt": ["x", "y z"], "n": 2, "max_tokens": 12, "logprobs": 2, "stop": "er"}),
        ("/v1/completions", {"prompt": "x", "max_tokens": 20, "return_token_ids": True}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 9, "stream_options": {"include_usage": True}}),
        ("/v1/messages", {**CHAT, "max_tokens": 9}),
    ]

    async def elsewhere() -> list[str]:
        transport = httpx.ASGITransport(create_app(FakeEngine(), ServerConfig()))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return [(await client.post(path, json={**body, "stream": True})).text for path, body in bodies]

    def said(text: str) -> dict[str, Any]:
        """All values at each place of the events, put together."""
        places: dict[str, Any] = {}

        def take(value: Any, place: str) -> None:
            match value:
                case dict():
                    mark = f"{place}[{value['index']}]" if "index" in value else place
                    for name, each in value.items():
                        take(each, f"{mark}.{name}")
                case list():
                    for each in value:
                        take(each, place)
                case str() if place.endswith((".text", ".content")):
                    places[place] = places.get(place, "") + value
                case _:
                    places.setdefault(place, []).append(value)

        for event in re.findall(r"data: (\{.*)\n\n", text):
            take(json.loads(event), "")
        ours = (".object", ".model", ".id", ".created", ".system_fingerprint", ".index", ".type", "reason", ".logprobs")
        return {
            place: values if isinstance(values, str) or not place.endswith(ours) else values[-1]
            for place, values in places.items()
            if not place.endswith((".id", ".created"))
        }

    others = asyncio.run(elsewhere())
    with running_server(FakeEngine()) as server:
        for (path, body), other in zip(bodies, others, strict=True):
            own = httpx.post(server.root + path, json={**body, "stream": True}, timeout=60).text
            assert said(own) == said(other) and len(said(own)) > 5


@pytest.mark.parametrize(
    "usage", [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}]
)
@pytest.mark.parametrize(
    ("fields", "is_plain"),
    [
        ({}, True),
        ({"logprobs": 1}, False),
        ({"echo": True}, False),
        ({"return_token_ids": True}, False),
        ({"messages": True}, True),
        ({"messages": True, "return_token_ids": True}, False),
        ({"messages": True, "reasoning": True}, False),
    ],
)
def test_the_template_of_a_text_says_what_its_event_does(
    fields: dict[str, Any], is_plain: bool, usage: dict[str, bool] | None
) -> None:
    tokenizer, params, prompts = FakeEngine().tokenizer, SamplingParams(n=2), [[300, 301], [302]]
    fields, is_chat, reasons = dict(fields), fields.get("messages"), fields.get("reasoning")

    def make() -> ChatAnswer | CompletionAnswer:
        answer: ChatAnswer | CompletionAnswer
        options = {"stream": True, "n": 2, "stream_options": usage}
        rest = {name: value for name, value in fields.items() if name not in ("messages", "reasoning")} | options
        if is_chat:
            reading = Reading(Reasoning("<think>", "</think>", False) if reasons else None)
            body = ChatCompletionRequest.model_validate({**CHAT, **rest})
            answer = ChatAnswer('a "?" model', tokenizer, Chat(prompts[0], params, reading, ""), body)
        else:
            whole = CompletionRequest.model_validate({"prompt": ["x", "y"], **rest})
            answer = CompletionAnswer('a "?" model', tokenizer, ["x", "y"], prompts, params, whole)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=1))
        patch.setattr(time, "time", lambda: 1.0)
        first, second = make(), make()
    used = 0
    pieces = ["a", '"?"', "", 'é🤗 \n "quoted" \\', "\x00", "the end", ""]
    for position, text in enumerate(pieces):
        for number, index in ((0, 0), (0, 1)) if is_chat else ((0, 0), (1, 1), (1, 0)):
            is_last = position == len(pieces) - 1
            delta = Completion(
                index=index,
                text=text,
                token_ids=[300 + position],
                logprobs=[TokenLogprobs(300, -1.0, 1, [300], [-1.0])] if fields.get("logprobs") else None,
                finish_reason=FinishReason.LENGTH if is_last else None,
            )
            expected = b"".join(map(first.encode, first.events(number, delta)))
            got = second.text_event(number, delta)
            used += got is not None
            if got is None:
                got = b"".join(map(second.encode, second.events(number, delta)))
            assert got == expected
    assert first.usage() == second.usage()
    continuous = usage is not None and "continuous_usage_stats" in usage
    assert used == (0 if continuous or not is_plain else 5 * (2 if is_chat else 3))


def test_streams_one_behind_the_other_on_one_connection() -> None:
    bodies = [{"prompt": "x", "max_tokens": count, "stream": True} for count in (4, 2, 6)]
    received = b""
    with (
        running_server(FakeEngine(script=SCRIPT, step_seconds=0.01)) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=60) as client,
    ):
        client.sendall(b"".join(request("/v1/completions", body) for body in bodies))
        while received.count(b"\r\n0\r\n\r\n") < 3:
            received += client.recv(65_536)
    answers = [part + b"\r\n0\r\n\r\n" for part in received.split(b"\r\n0\r\n\r\n")[:-1]]
    for body, answer in zip(bodies, answers, strict=True):
        assert "".join(texts(b"".join(chunks(answer)))) == tokenizer().decode(SCRIPT) * (body["max_tokens"] // 2)


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_of_ours_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    count = CompletionAnswer.count

    def failing(self: CompletionAnswer, number: int, delta: Completion) -> None:
        if self.token_ids[number] == [666] and self._completion_tokens == 2:
            raise RuntimeError("a slip")
        count(self, number, delta)

    monkeypatch.setattr(CompletionAnswer, "count", failing)
    with running_server(FakeEngine(step_seconds=0.01)) as server:
        idle = server.num_tasks()
        body = {"prompt": [5], "max_tokens": 50, "stream": True}
        with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=60) as other:
            failed = httpx.post(f"{server.url}/completions", json={**body, "prompt": [666], "stream": stream})
            assert "RuntimeError" in failed.text
            assert failed.text.endswith("data: [DONE]\n\n") == stream
            assert failed.status_code == (200 if stream else 500)
            wait_until(lambda: server.engine.aborted == 1)
            assert "".join(texts(other.read())) == tokenizer().decode(greedy([5], 50))
        wait_until(lambda: server.num_tasks() == idle and server.engine.num_running == 0)


def test_of_many_requests_at_once_a_few_begin_in_each_turn_of_the_loop() -> None:
    async def body() -> None:
        begun: list[int] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            begun.append(scope["number"])

        async def nothing() -> Message:
            raise AssertionError

        async def ignore(message: Message) -> None:
            raise AssertionError

        def ask(number: int, method: str = "POST") -> asyncio.Task[None]:
            scope = {"type": "http", "method": method, "number": number}
            return asyncio.create_task(pace(scope, nothing, ignore))  # type: ignore[arg-type]

        pace = PaceMiddleware(app)
        tasks = [ask(number) for number in range(100)]
        health = ask(1000, "GET")
        tasks[9].cancel()
        tasks[50].cancel()
        sizes = [0]
        while sizes[-1] < 99:
            await asyncio.sleep(0)
            assert sum(each < 1000 for each in begun) - sum(each < 1000 for each in begun[: sizes[-1]]) <= 2
            sizes.append(len(begun))
            if len(sizes) == 2:
                assert health.done()
                tasks[60].cancel()
                tasks.append(ask(100))
        assert [each for each in begun if each < 1000] == [each for each in range(101) if each not in (9, 50, 60)]
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)
        late = ask(101)
        await asyncio.sleep(0)
        assert late.done(), "at rest nobody waits"

    asyncio.run(body())


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_leaves_nothing_that_the_garbage_collector_must_find(stream: bool) -> None:
    """Which would hold up all streams to do so, or memory would grow until it does."""
    bodies = [
        ("/v1/completions", {"prompt": ["x", "y"], "n": 2}),
        ("/v1/chat/completions", CHAT),
        ("/v1/messages", CHAT),
    ]
    with running_server(FakeEngine()) as server:

        def ask() -> None:
            for path, body in bodies:
                answer = httpx.post(server.root + path, json={**body, "max_tokens": 5, "stream": stream}, timeout=60)
                assert answer.is_success

        idle = server.num_tasks()
        ask()
        wait_until(lambda: server.num_tasks() == idle)
        gc.collect()
        gc.disable()
        try:
            ask()
            wait_until(lambda: server.num_tasks() == idle)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            found = {f"{type(each).__module__}.{type(each).__name__}" for each in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not [name for name in found if name.startswith(("miniserve.", "uvicorn.", "starlette.", "fastapi."))]
