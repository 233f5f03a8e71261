"""What one client may take from the others: time, memory and connections are bounded, and what is no request of ours
is refused with a line in the log."""

from __future__ import annotations

import json
import logging
import math
import socket
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
from server_fakes import RunningServer, running_server, wait_until

from miniserve.server import connection, serve
from miniserve.server.connection import Guard
from miniserve.server.gate import ThrottledLog

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HALF = HEAD + b"Content-Length: 999999\r\n\r\n{"


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


class WatchedGuard(Guard):
    made: WatchedGuard

    def __init__(self, max_connections: int, max_body_bytes: int) -> None:
        super().__init__(max_connections, max_body_bytes)
        WatchedGuard.made = self


def guard() -> Guard:
    return WatchedGuard.made


def bytes_seen() -> int:
    return sum(each._unparsed + each._piece for each in guard().connections)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "Guard", WatchedGuard)


@pytest.fixture
def impatient(watched: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """Gives a request no time at all, but looks only in `sweep`."""
    for name, value in (("_HEAD_SECONDS", 0.0), ("_BODY_SECONDS", 0.0), ("_BODY_PIECE", 1)):
        monkeypatch.setattr(connection, name, value)
    monkeypatch.setattr(serve, "_SWEEP_INTERVAL", math.inf)
    with running_server() as server:
        yield server


def sweep(server: RunningServer) -> None:
    server.call(guard().sweep)


def send(server: RunningServer, data: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    client.sendall(data)
    return client


def answer(client: socket.socket) -> tuple[int, str]:
    """The status and the error's message of an answer after which the server closes; 0 where it only closes."""
    with client, client.makefile("rb") as file:
        text = file.read()
    if not text:
        return 0, ""
    head, _, body = text.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def healthy(server: RunningServer) -> bool:
    return httpx.get(f"{server.root}/health").status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"", 0), (b"GET /health HTT", 408), (b"\r\n", 0), (HEAD, 408)],
    ids=["nothing", "half a line", "no line", "half the headers"],
)
def test_a_request_that_does_not_arrive_is_ended(impatient: RunningServer, sent: bytes, status: int) -> None:
    client = send(impatient, sent)
    wait_until(lambda: len(guard().connections) == 1 and bytes_seen() == len(sent))
    sweep(impatient)
    assert answer(client)[0] == status


def test_a_body_has_time_while_it_goes_on(impatient: RunningServer) -> None:
    client = send(impatient, HALF)
    wait_until(lambda: bytes_seen() == 1)
    sweep(impatient)
    client.sendall(b" ")
    wait_until(lambda: bytes_seen() == 1)
    for _ in range(2):  # the first time there are new bytes
        assert guard().connections
        sweep(impatient)
    assert answer(client)[0] == 408
    assert impatient.engine.seen == []


def test_an_answer_has_all_the_time_it_needs(impatient: RunningServer) -> None:
    impatient.engine.hold_at = 1
    body = b'{"prompt": "x", "max_tokens": 2, "stream": true}'
    # Behind it half of the next request, which the client need not finish before it has its answer.
    half = b"GET /hea"
    client = send(impatient, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body + half)
    wait_until(lambda: impatient.engine.num_running == 1)
    sweep(impatient)
    impatient.call(impatient.engine.gate.set)
    text = b""
    while b"data: [DONE]" not in text:
        text += client.recv(10_000)
    wait_until(lambda: not any(each.answering for each in guard().connections))
    sweep(impatient)
    with client.makefile("rb") as file:
        assert b"408 Request Timeout" in file.read()


def test_a_body_behind_its_answer_gets_no_second_one(impatient: RunningServer) -> None:
    client = send(impatient, HALF.replace(b"999999", b"999999999"))
    wait_until(lambda: bytes_seen() == 1 and not any(each.answering for each in guard().connections))
    wait_until(lambda: any(each.cycle.response_complete for each in guard().connections))
    sweep(impatient)
    assert answer(client)[0] == 413  # and nothing behind it, which would not be JSON


def test_a_connection_at_rest_is_kept(impatient: RunningServer) -> None:
    with httpx.Client() as client:
        for _ in range(2):
            assert client.get(f"{impatient.root}/health").status_code == 200
            wait_until(lambda: not any(each.answering for each in guard().connections))
            sweep(impatient)
        assert len(guard().connections) == 1


@pytest.mark.parametrize(
    "request_line_and_headers",
    [b"GET /health HTTP/1.1\r\nX: " + b"a" * 10_000_000, b"GET /?" + b"a" * 70_000 + b" HTTP/1.1\r\nX: a"],
)
def test_large_headers_are_431(server: RunningServer, request_line_and_headers: bytes) -> None:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    with suppress(OSError):  # it reads only so much of them
        client.sendall(request_line_and_headers + b"\r\n\r\n")
    status, message = answer(client)
    assert (status, "65536 bytes" in message) == (431, True)


def test_endless_trailers_are_431(server: RunningServer) -> None:
    client = send(server, HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n")
    with suppress(OSError):
        client.sendall(b"0\r\n" + b"X: a\r\n" * 300_000)
    assert answer(client)[0] == 431


def test_incomplete_bodies_share_a_bound(watched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_BODY_MEMORY", 100_000)
    with running_server(max_body_bytes=50_000) as server:
        half = HALF.replace(b"999999", b"49999") + b" " * 40_000
        clients = []
        for number in (1, 2):
            clients.append(send(server, half))
            wait_until(lambda: guard().body_bytes == number * 40_001)  # noqa: B023
        clients.append(send(server, half))
        assert answer(clients[0])[0] == 503  # the oldest makes room
        wait_until(lambda: guard().body_bytes == 2 * 40_001)
        for client in clients[1:]:
            client.close()
        wait_until(lambda: guard().body_bytes == 0)
        for _ in range(5):  # complete ones do not count
            assert httpx.post(f"{server.url}/completions", content=b" " * 40_000).status_code == 400
        assert guard().body_bytes == 0


def test_silent_connections_make_room(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(serve, "_max_connections", lambda: 8)
    with running_server() as server:
        clients = [send(server, HALF if index % 2 else b"") for index in range(30)]
        assert healthy(server)
        for client in clients:
            client.close()
    assert "All 8 connections" in caplog.text


def test_connections_that_are_at_work_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_max_connections", lambda: 2)
    with running_server() as server:
        server.engine.hold_at = 0
        body = b'{"prompt": "x", "max_tokens": 1}'
        clients = [send(server, HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body) for _ in range(2)]
        wait_until(lambda: server.engine.num_running == 2)
        assert answer(send(server)) == (503, "The server has as many connections as it can open; try again later.")
        server.call(server.engine.gate.set)
        for client in clients:
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            client.close()


def test_what_is_not_http_is_a_line_with_its_address(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    client = send(server, b"NONSENSE\r\n\r\n")
    address = "{}:{}".format(*client.getsockname())
    status, message = answer(client)
    assert status == 400 and "not valid HTTP" in message
    assert f"{address}: The request is not valid HTTP (Invalid method encountered)." in caplog.text
    assert "uvicorn" not in {record.name for record in caplog.records}


def test_a_missing_key_is_a_line_with_its_address(caplog: pytest.LogCaptureFixture) -> None:
    with running_server(api_keys=("k",)) as server:
        assert httpx.get(f"{server.url}/models").status_code == 401
    assert "127.0.0.1:" in caplog.text and "its API key is missing or wrong." in caplog.text


def test_an_upgrade_is_not_made(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        headers = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": ""}
        assert httpx.get(f"{server.root}/version", headers=headers).status_code == 200
    assert "pgrade" not in caplog.text


def test_warnings_are_limited_by_kind(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    log = ThrottledLog(logging.getLogger("test"), clock=lambda: now)
    for index in range(50):
        log.warning("%s: wrong", index)
    log.warning("%s: other", "a")
    assert [record.getMessage() for record in caplog.records] == [*(f"{i}: wrong" for i in range(10)), "a: other"]
    caplog.clear()
    now = 61.0
    log.warning("%s: wrong", "b")
    log.warning("%s: wrong", "c")
    messages = [record.getMessage() for record in caplog.records]
    assert messages == ["b: wrong (40 more like this were left out before.)", "c: wrong"]


# --- whose name the server goes by --------------------------------------------------------------------------------


def test_a_local_server_without_a_key_asks_for_a_known_host(server: RunningServer) -> None:
    def status(host: str) -> int:
        return httpx.get(f"{server.root}/version", headers={"Host": host}).status_code

    for host in ("localhost", "LOCALHOST:1", "localhost.", "127.0.0.1:8000", "[::1]:8000", "192.0.2.7"):
        assert status(host) == 200, host
    for host in ("evil.example", "localhost.evil.example:80", "", "127.0.0.1.evil.example", "[evil]:1"):
        assert status(host) == 403, host


@pytest.mark.parametrize(
    ("config", "status"),
    [({"api_keys": ("k",)}, 200), ({"allowed_hosts": ("a.example",)}, 200), ({"allowed_hosts": ("*",)}, 200),
     ({"allowed_hosts": ("b.example",)}, 403), ({"allowed_hosts": ("b.example",), "api_keys": ("k",)}, 403)],
)  # fmt: skip
def test_other_hosts_are_for_whoever_has_a_key_or_was_allowed(config: dict[str, tuple[str]], status: int) -> None:
    with running_server(**config) as server:
        answer = httpx.get(f"{server.root}/version", headers={"Host": "A.example:80"})
    assert answer.status_code == status
    assert status == 200 or "--allowed-host" in answer.json()["error"]["message"]
