"""A client that goes away frees what its request held, whatever the request was doing."""

from __future__ import annotations

import asyncio
import json
import random
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, RunningServer, greedy, running_server, tokenizer, wait_until

CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "x", "max_tokens": 200}),
    ("/v1/completions", {"prompt": ["x", "y", "z"], "n": 2, "max_tokens": 200}),
    ("/v1/chat/completions", {**CHAT, "n": 2}),
]


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(step_seconds=0.05)) as server:
        yield server


def post(server: RunningServer, path: str, body: dict[str, Any]) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES)
def test_closing_the_connection_aborts(server: RunningServer, path: str, body: dict[str, Any], streams: bool) -> None:
    idle = server.num_tasks()
    num_prompts = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 1
    connection = post(server, path, {**body, "stream": streams})
    wait_until(lambda: server.engine.num_running == num_prompts * body.get("n", 1))
    if streams:
        assert connection.recv(65_536).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(lambda: server.engine.aborted == num_prompts)
    assert server.engine.num_running == 0
    wait_until(lambda: server.num_tasks() == idle)
    text = httpx.get(f"{server.root}/metrics").text
    aborted = num_prompts * body.get("n", 1)
    assert f'finished_reason="abort",model_name="tiny/fake"}} {aborted}.0' in text


@pytest.mark.parametrize("streams", [False, True])
def test_half_a_connection_is_none(server: RunningServer, streams: bool) -> None:
    """As docs/API.md says: closing one half looks like leaving."""
    with post(server, "/v1/completions", {"prompt": "x", "max_tokens": 200, "stream": streams}) as connection:
        wait_until(lambda: server.engine.num_running == 1)
        connection.shutdown(socket.SHUT_WR)
        wait_until(lambda: server.engine.aborted == 1)
        with connection.makefile("rb") as file:
            assert b"[DONE]" not in file.read()


def test_a_client_that_does_not_read_and_goes_away(server: RunningServer) -> None:
    server.engine.step_seconds = 0.0
    body = {"prompt": [[7]] * 60, "max_tokens": 250, "logprobs": 20, "stream": True}
    connection = post(server, "/v1/completions", body)
    connection.recv(1000)
    wait_until(lambda: server.engine.num_running > 0)
    connection.close()
    wait_until(lambda: server.engine.num_running == 0)
    wait_until(lambda: httpx.get(f"{server.root}/health").status_code == 200)


def test_going_away_before_the_body_is_there(server: RunningServer) -> None:
    idle = server.num_tasks()
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 999\r\n\r\n{"
    )
    wait_until(lambda: server.num_tasks() > idle)
    connection.close()
    wait_until(lambda: server.num_tasks() == idle)
    assert server.engine.seen == []


def test_two_hundred_clients_of_which_a_third_leave() -> None:
    """Those that stay get their full, correct text; afterwards nothing runs and no task is left."""
    rng = random.Random(0)
    prompts = [[rng.randrange(2000) for _ in range(rng.randrange(1, 20))] for _ in range(200)]
    leavers = len(range(0, 200, 3))

    async def ask(client: httpx.AsyncClient, url: str, number: int) -> str | None:
        body = {"prompt": prompts[number], "max_tokens": 20, "stream": True}
        texts: list[str] = []
        async with client.stream("POST", url, json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if number % 3 == 0 and texts:
                    return None
                if line.startswith("data: {"):
                    texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
        return "".join(texts)

    async def ask_all(server: RunningServer) -> list[str | None]:
        async def open_gate() -> None:
            while server.engine.aborted < leavers:
                await asyncio.sleep(0.01)
            server.call(server.engine.gate.set)

        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120) as client, asyncio.timeout(120):
            opener = asyncio.create_task(open_gate())
            answers = await asyncio.gather(*(ask(client, f"{server.url}/completions", i) for i in range(200)))
            await opener
            return answers

    with running_server(FakeEngine(step_seconds=0.05, hold_at=10)) as server:
        idle = server.num_tasks()
        for number, text in enumerate(asyncio.run(ask_all(server))):
            expected = tokenizer().decode(greedy(prompts[number], 20)) if number % 3 else None
            assert text == expected
        assert server.engine.num_running == 0
        assert server.engine.aborted == leavers
        wait_until(lambda: server.num_tasks() == idle)
