"""The event stream, byte for byte."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import openai
import pytest
from server_fakes import FakeEngine, RunningServer, running_server, tokenizer

SCRIPT = tokenizer().encode("one two")[:2]
WORDS = [tokenizer().decode([token]) for token in SCRIPT]
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(script=SCRIPT, step_seconds=0.005)) as server:
        yield server


def stream(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[httpx.Response, list[dict[str, Any]]]:
    """The events before `[DONE]`; fails on anything but `data:` lines and blank lines between them."""
    response = httpx.post(server.root + path, json={**body, "stream": True}, timeout=30)
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("\n\ndata: [DONE]\n\n")
    blocks = response.text.removesuffix("\n\n").split("\n\n")
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return response, [json.loads(block.removeprefix("data: ")) for block in blocks[:-1]]


def test_a_completion_stream_byte_for_byte(server: RunningServer) -> None:
    response, events = stream(server, "/v1/completions", {"prompt": "x", "max_tokens": 2})
    head = {key: events[0][key] for key in ("id", "object", "created", "model", "system_fingerprint")}
    assert head["object"] == "text_completion"

    def event(text: str, reason: str | None) -> str:
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        return "data: " + json.dumps({**head, "choices": [choice]}, separators=(",", ":")) + "\n\n"

    words = event(WORDS[0], None) + event(WORDS[1], None)
    assert response.text == words + event("", "length") + "data: [DONE]\n\n"


def test_a_chat_stream_byte_for_byte(server: RunningServer) -> None:
    response, events = stream(server, "/v1/chat/completions", {**CHAT, "max_tokens": 2})
    head = {key: events[0][key] for key in ("id", "object", "created", "model", "system_fingerprint")}
    assert head["object"] == "chat.completion.chunk"

    def event(delta: dict[str, str], reason: str | None = None) -> str:
        choice: dict[str, Any] = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        if reason is not None:
            choice["stop_reason"] = None
        return "data: " + json.dumps({**head, "choices": [choice]}, separators=(",", ":")) + "\n\n"

    assert response.text == (
        event({"role": "assistant", "content": ""})
        + event({"content": WORDS[0]})
        + event({"content": WORDS[1]})
        + event({}, "length")
        + "data: [DONE]\n\n"
    )


def test_white_space_of_a_plain_chat_streams_at_once() -> None:
    """Only where reasoning or calls could begin it may have to wait for what follows."""
    script = tokenizer().encode("\n\n one\n two \n", False)
    with running_server(FakeEngine(script=script)) as server:
        _, events = stream(server, "/v1/chat/completions", {**CHAT, "max_tokens": len(script)})
    first, *deltas, last = [event["choices"][0]["delta"].get("content") for event in events]
    assert (first, last) == ("", None)
    assert deltas == [tokenizer().decode([token]) for token in script]


@pytest.mark.parametrize(("path", "body"), [("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)])
def test_usage_comes_as_asked(server: RunningServer, path: str, body: dict[str, Any]) -> None:
    body = {**body, "max_tokens": 3}
    for options in (None, {}, {"include_usage": False}):
        _, events = stream(server, path, {**body, "stream_options": options})
        assert all("usage" not in event and len(event["choices"]) == 1 for event in events)

    _, events = stream(server, path, {**body, "stream_options": {"include_usage": True}})
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events[:-1])
    assert events[-1]["choices"] == []
    total = events[-1]["usage"]
    whole = httpx.post(server.root + path, json=body).json()["usage"]
    assert total == whole
    assert total["completion_tokens"] == 3

    options = {"include_usage": True, "continuous_usage_stats": True}
    _, events = stream(server, path, {**body, "stream_options": options})
    counts = [event["usage"]["completion_tokens"] for event in events]
    opening = [0] if "chat" in path else []
    assert counts == [*opening, 1, 2, 3, 3, 3]
    assert events[-1]["usage"] == events[-2]["usage"] == total


def test_every_event_has_one_choice_and_every_choice_one_end(server: RunningServer) -> None:
    _, events = stream(server, "/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 3})
    assert all(len(event["choices"]) == 1 for event in events)
    ends = [event["choices"][0]["index"] for event in events if event["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2, 3]
    _, events = stream(server, "/v1/chat/completions", {**CHAT, "n": 2, "max_tokens": 2})
    roles = [e["choices"][0]["index"] for e in events if "role" in e["choices"][0]["delta"]]
    assert sorted(roles) == [0, 1]
    assert all(len(event["choices"]) == 1 for event in events)


def test_the_echo_comes_with_the_first_event_of_every_choice(server: RunningServer) -> None:
    body = {"prompt": ["ab", "cd"], "n": 2, "echo": True, "max_tokens": 2, "logprobs": 1}
    _, events = stream(server, "/v1/completions", body)
    whole = httpx.post(f"{server.url}/completions", json=body).json()["choices"]
    for index in range(4):
        pieces = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert (
            "".join(piece["text"] for piece in pieces)
            == whole[index]["text"]
            == ["ab", "cd"][index // 2] + "".join(WORDS)
        )
        for name, values in whole[index]["logprobs"].items():
            assert [value for piece in pieces for value in (piece["logprobs"] or {name: []})[name]] == values


def test_the_echo_alone(server: RunningServer) -> None:
    body = {"prompt": "Once upon", "echo": True, "max_tokens": 0, "logprobs": 0}
    whole = httpx.post(f"{server.url}/completions", json=body).json()
    assert whole["choices"][0]["text"] == "Once upon"
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["completion_tokens"] == 0
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == whole["usage"]["prompt_tokens"]
    _, (event, end) = stream(server, "/v1/completions", body)
    assert [{**event["choices"][0], "finish_reason": "length"}] == whole["choices"]
    assert end["choices"] == [{**whole["choices"][0], "text": "", "logprobs": None}]


def test_what_is_wrong_at_once_is_an_http_error_and_what_comes_later_an_event() -> None:
    with running_server(FakeEngine(fail_after=0)) as server:
        for path, body in (("/v1/completions", {"prompt": "x"}), ("/v1/chat/completions", CHAT)):
            response = httpx.post(server.root + path, json=body)
            assert response.status_code == 500
            assert response.json()["error"]["message"] == "The fake device broke."
            _, events = stream(server, path, body)
            assert [event["error"]["message"] for event in events] == ["The fake device broke."]
        refused = httpx.post(f"{server.url}/completions", json={"prompt": [[5] * 300], "stream": True})
        assert refused.status_code == 400
        for prompt in ([[5], [5000]], [[5000]]):
            refused = httpx.post(f"{server.url}/completions", json={"prompt": prompt, "stream": True})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")
        server.call(server.engine.shutdowns.append, True)
        refused = httpx.post(f"{server.url}/completions", json={"prompt": "x", "stream": True})
        assert refused.status_code == 503
        server.call(server.engine.shutdowns.clear)
        assert server.engine.num_running == 0


def test_a_streams_headers_wait_for_nothing() -> None:
    with running_server(FakeEngine(script=SCRIPT, hold_at=0)) as server:
        body = {"prompt": "x", "max_tokens": 2, "stream": True}
        with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=10) as response:
            assert response.status_code == 200
            server.call(server.engine.gate.set)
            assert response.read().endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("max_num_seqs", [256, 1])
def test_a_stream_begins_before_its_first_token_and_is_never_silent(
    monkeypatch: pytest.MonkeyPatch, max_num_seqs: int
) -> None:
    """Whether its request waits in the engine or, behind others, before it."""
    monkeypatch.setattr("miniserve.server.reply.KEEP_ALIVE", 0.05)
    with running_server(FakeEngine(script=SCRIPT, hold_at=0, max_num_seqs=max_num_seqs)) as server:
        body = {"prompt": "x", "max_tokens": 2, "stream": True}
        with ExitStack() as others:
            for _ in range(2):
                others.enter_context(httpx.stream("POST", f"{server.url}/completions", json=body, timeout=30))
            with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=30) as response:
                assert response.status_code == 200
                lines = response.iter_lines()
                assert [next(lines) for _ in range(4)] == [": keep-alive", ""] * 2
                server.call(server.engine.gate.set)
                data = [line for line in lines if line.startswith("data: ")]
        assert len(data) == 4
        assert data[-1] == "data: [DONE]"


def test_openais_client_reads_over_the_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniserve.server.reply.KEEP_ALIVE", 0.01)
    with running_server(FakeEngine(script=SCRIPT, step_seconds=0.1)) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
        chunks = list(client.completions.create(model="", prompt="x", max_tokens=2, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "".join(WORDS)


@pytest.mark.parametrize("prompt", ["x", ["x", "y"]])
def test_an_error_in_the_middle_is_an_event_before_the_end(prompt: object) -> None:
    with running_server(FakeEngine(script=SCRIPT, fail_after=2, step_seconds=0.01)) as server:
        body = {"prompt": prompt, "max_tokens": 9, "stream_options": {"include_usage": True}}
        _, events = stream(server, "/v1/completions", body)
        assert events[-1] == {
            "error": {
                "message": "The fake device broke.",
                "type": "InternalServerError",
                "param": None,
                "code": None,
            }
        }
        assert all(event["choices"] for event in events[:-1])
        assert any(event["choices"][0]["text"] for event in events[:-1])


def test_events_leave_as_soon_as_their_token_is_there() -> None:
    with running_server(FakeEngine(script=SCRIPT, step_seconds=0.2)) as server:
        body = json.dumps({"prompt": "x", "max_tokens": 4, "stream": True}).encode()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            received, reads = b"", 0
            while b"[DONE]" not in received:
                received += connection.recv(65_536)
                reads += 1
        assert reads >= 4


def test_a_keep_alive_connection_serves_stream_after_stream(server: RunningServer) -> None:
    with httpx.Client(base_url=server.root, limits=httpx.Limits(max_connections=1)) as client:
        for _ in range(3):
            with client.stream("POST", "/v1/completions", json={"prompt": "x", "max_tokens": 2, "stream": True}) as got:
                assert got.read().endswith(b"data: [DONE]\n\n")
