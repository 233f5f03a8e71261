"""Bodies that would hold up everybody: bounded before anything is made of them, and read in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, RunningServer, running_server, wait_until

from miniserve.server import body


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(max_model_len=2048, num_blocks=1024)) as server:
        yield server


def post(server: RunningServer, path: str, content: str) -> httpx.Response:
    return httpx.post(server.root + path, content=content, headers={"content-type": "application/json"}, timeout=60)


def many(item: str, count: int) -> str:
    return ",".join([item] * count)


@pytest.mark.parametrize(
    ("path", "content", "what"),
    [
        ("/v1/chat/completions", '{"messages":[' + many("{}", 400_000) + "]}", "lists and objects"),
        ("/v1/chat/completions", '{"messages":[' + many('{"role":"a"}', 100_000) + "]}", "strings"),
        ("/v1/completions", '{"prompt":[' + many("5", 2_000_000) + "]}", "values"),
        ("/v1/completions", '{"prompt":[' + many('""', 1_000_000) + "]}", "strings"),
        ("/v1/completions", '{"prompt":[' + many("[5]", 500_000) + "]}", "lists and objects"),
        ("/v1/completions", '{"prompt":"a","logit_bias":{' + many('"5":1', 400_000) + "}}", "strings"),
        ("/v1/completions", '{"prompt":"a","x":' + many("[[5]", 200_000) + "}", "lists and objects"),
        ("/detokenize", '{"tokens":[' + many("5", 2_000_000) + "]}", "values"),
    ],
)
def test_a_body_of_too_many_parts_is_refused_before_it_is_decoded(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, path: str, content: str, what: str
) -> None:
    decoded = []
    monkeypatch.setattr(body, "_decode", decoded.append)
    response = post(server, path, content)
    assert response.status_code == 400
    assert what in response.json()["error"]["message"]
    assert decoded == []


def test_quotes_and_separators_within_texts_are_no_parts(server: RunningServer) -> None:
    text = '\\"[{,' * 20_000 + "\\\\" * 20_000 + '\\\\\\"' * 20_000
    response = post(server, "/tokenize", f'{{"prompt":"{text}"}}')
    assert response.status_code == 200
    detokenized = httpx.post(f"{server.root}/detokenize", json={"tokens": response.json()["tokens"]}, timeout=60)
    assert detokenized.json()["prompt"] == json.loads(f'"{text}"')


def test_texts_are_not_gone_through_where_what_they_hold_could_not_matter() -> None:
    """Each pass over them keeps the interpreter from everybody."""

    class Raw(bytes):
        def replace(self, *_: Any) -> Any:
            raise AssertionError("a pass")

    raw = b'{"prompt":"' + rb"\\" * 500_000 + b", {[" * 2000 + b'"}'
    body._check_counts(Raw(raw), 8192, 262_144)
    for many_more in (b"{" * 9000, b"," * 300_000, rb"\"" * 140_000):
        with pytest.raises(AssertionError, match="a pass"):
            body._check_counts(Raw(raw + many_more), 8192, 262_144)


def test_large_bodies_are_read_off_the_event_loop_and_mean_the_same(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    parse = body._parse

    def seen(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return parse(*arguments)

    monkeypatch.setattr(body, "_parse", seen)
    small = {"prompt": [[7, 8, 9]] * 50, "max_tokens": 1}
    large = {**small, "user": "x" * 100_000}
    answers = [
        httpx.post(f"{server.url}/completions", json=each, timeout=60).json()["choices"] for each in (small, large)
    ]
    assert answers[0] == answers[1]
    assert threads[0] is server._thread
    assert threads[1] is not server._thread
    for wrong in ({"temperature": 9e9}, {"prompt": [[7], []]}, {"stop": [5]}):
        errors = [
            httpx.post(f"{server.url}/completions", json={**each, **wrong}, timeout=60) for each in (small, large)
        ]
        assert [error.status_code for error in errors] == [400, 400]
        assert errors[0].json() == errors[1].json()
    assert post(server, "/v1/completions", '{"prompt":"a"' + " " * 100_000).status_code == 400


def test_a_client_that_leaves_takes_its_waiting_text_with_it(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long texts a few are tokenized side by side; short ones do not wait for them."""
    encode, started, go_on = server.engine.tokenizer.encode, [], threading.Event()

    def slow(text: str, add_special_tokens: bool = True) -> list[int]:
        if len(text) > 50_000:
            started.append(text[0])
            assert go_on.wait(60)
        return encode(text, add_special_tokens)

    monkeypatch.setattr(server.engine.tokenizer, "encode", slow)
    idle = server.num_tasks()
    with httpx.Client(base_url=server.root) as client:
        for letter in "abcd":
            with pytest.raises(httpx.ReadTimeout):
                client.post("/tokenize", json={"prompt": letter * 100_000}, timeout=0.5)
        assert client.post("/tokenize", json={"prompt": "short"}, timeout=60).is_success
        wait_until(lambda: server.num_tasks() == idle)
        assert started == ["a", "b"]
        go_on.set()
        assert client.post("/tokenize", json={"prompt": "e" * 100_000}, timeout=60).is_success
    assert started == ["a", "b", "e"]
