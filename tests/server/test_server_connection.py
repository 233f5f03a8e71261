"""What one client may take from the others: time, memory and connections are bounded, and what is no request of ours
is refused with a line in the log."""

from __future__ import annotations

import json
import logging
import math
import re
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("cut", [1, 100, len(HEAD) + 60, -3000])
def test_what_asks_for_an_upgrade_is_read_to_its_end(server: RunningServer, cut: int) -> None:
    """Java's client sends its first request so, with a body; it was answered as if it had none."""
    upgrade = HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    body = json.dumps({"prompt": "x", "max_tokens": 2}).encode().ljust(5000)
    request = upgrade + b"Content-Length: %d\r\n\r\n" % len(body) + body
    pieces = b"".join(b"3e8\r\n%b\r\n" % body[at : at + 1000] for at in range(0, 5000, 1000))
    last = upgrade + b"Transfer-Encoding: chunked\r\n\r\n" + pieces + b"0\r\n\r\n"
    with send(server, request[:cut]) as client:
        wait_until(lambda: healthy(server))
        client.sendall(request[cut:] + request + version(1) + last.replace(b"Upgrade,", b"close, Upgrade,"))
        with client.makefile("rb") as file:
            assert file.read().count(b"HTTP/1.1 200 OK") == 4
    assert len(server.engine.seen) == 3


def test_a_client_with_a_second_request_leaves(server: RunningServer) -> None:
    """The first, which is being answered, ends with it as if it were alone."""
    server.engine.hold_at = 0
    idle = server.num_tasks()
    with send(server, completion("x") + version(1)) as client:
        wait_until(lambda: server.engine.num_running == 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: server.engine.num_running == 0 and server.num_tasks() == idle)


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


# --- many that arrive together ------------------------------------------------------------------------------------


def completion(prompt: str, **more: object) -> bytes:
    body = json.dumps({"prompt": prompt, "max_tokens": 2, **more}).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body


def version(number: int) -> bytes:
    return b"GET /version HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: %d\r\nX: %b\r\n\r\n" % (number, b"x" * 400)


def receive(client: socket.socket) -> bytes:
    data = client.recv(1 << 16)
    assert data, "closed before its last answer"
    return data


class Turns:
    """Of an event loop."""

    def __init__(self) -> None:
        self.callbacks: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.callbacks.append(callback)

    def next(self) -> None:
        callbacks, self.callbacks = self.callbacks, []
        for callback in callbacks:
            callback()


class Pieces:
    """A connection with pieces to parse, each of which is enough for a turn."""

    def __init__(self, loop: Turns, name: str, num_pieces: int, log: list[str]) -> None:
        self.loop = loop
        self._name, self._left, self._log = name, num_pieces, log

    def read_piece(self) -> bool:
        self._log.append(self._name)
        self._left -= 1
        return self._left > 0


def test_what_arrives_is_parsed_in_its_order_and_little_in_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_READ_SECONDS", 1e-12)
    turns, guard, log = Turns(), Guard(10, 1000), []
    waiting: list[Any] = [Pieces(turns, name, num, log) for name, num in (("a", 3), ("b", 1), ("c", 2), ("d", 1))]
    for each in waiting:
        guard.read(each)
    guard.read(waiting[0])  # which waits already
    guard.forget(waiting[3])
    assert log == ["a"]
    for num_parsed in range(2, 7):
        turns.next()
        assert len(log) == num_parsed
    assert "".join(log) == "aabcac"
    turns.next()
    assert not turns.callbacks, "an idle server's loop must rest"
    guard.read(Pieces(turns, "e", 1, log))  # type: ignore[arg-type]
    assert log[6:] == ["e"]


@pytest.fixture
def slow(watched: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunningServer]:
    """Parses one small piece of what has arrived in a turn of its loop."""
    monkeypatch.setattr(connection, "_READ_SECONDS", 1e-12)
    monkeypatch.setattr(connection, "_READ_PIECE", 100)
    with running_server() as server:
        yield server


def test_hundreds_of_requests_at_once_are_all_answered(slow: RunningServer) -> None:
    clients = [socket.create_connection(("127.0.0.1", slow.port), timeout=60) for _ in range(300)]
    for number, client in enumerate(clients):
        prompt = f"Number {number} " * (400 if number % 100 == 99 else 1)
        client.sendall(completion(prompt, truncate_prompt_tokens=8, stream=bool(number % 2)))
    assert healthy(slow)
    for client in clients:
        text = b""
        while not text.endswith((b"}", b"0\r\n\r\n")):
            text += receive(client)
        assert text.startswith(b"HTTP/1.1 200") and text.count(b'"finish_reason":"length"') == 1
        client.close()
    assert len(slow.engine.seen) == 300
    wait_until(lambda: not (guard().connections or guard()._unread))
    assert guard().body_bytes == 0


def test_clients_that_leave_while_they_wait_leave_nothing(slow: RunningServer) -> None:
    idle = slow.num_tasks()
    for number in range(300):
        client = send(slow, completion("x" * 200, max_tokens=200))
        if number % 2:  # so that the server gets a reset
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
    wait_until(lambda: not (guard().connections or guard()._unread or slow.engine.num_running))
    wait_until(lambda: slow.num_tasks() == idle)
    assert healthy(slow)


def test_one_client_may_send_requests_without_waiting(watched: None) -> None:
    """They are answered in their order, and do not pile up where the first takes its time."""
    with running_server() as server:
        server.engine.hold_at = 0
        with ThreadPoolExecutor() as pool, send(server, completion("x")) as client:
            wait_until(lambda: server.engine.num_running == 1)
            requests = b"".join(map(version, range(4000)))  # more than fits into the sockets' buffers
            sending = pool.submit(client.sendall, requests)
            (served,) = guard().connections
            wait_until(lambda: served.pipeline)
            assert healthy(server)
            most = connection._READ_PIECE // 400
            assert len(served.pipeline) <= most
            server.call(server.engine.gate.set)
            rest, ids = b"", []
            while len(ids) < 4000:
                *lines, rest = (rest + receive(client)).split(b"\n")
                ids += [int(line[14:]) for line in lines if line.startswith(b"x-request-id: ") and len(line) < 20]
                assert len(served.pipeline) <= most and len(served.held) <= 1 << 20
            sending.result()
            assert ids == list(range(4000))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how large the table is")
def test_the_table_of_open_files_need_not_grow(server: RunningServer) -> None:
    (size,) = re.findall(r"FDSize:\s*(\d+)", Path("/proc/self/status").read_text())
    assert int(size) > serve._max_connections()


def test_what_has_arrived_is_answered_before_the_server_ends(watched: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server() as server:
        monkeypatch.setattr(Guard, "_read", lambda self: None)
        monkeypatch.setattr(connection, "_HEAD_SECONDS", 0.0)
        with send(server, version(0)) as client:
            wait_until(lambda: any(each.held for each in guard().connections))
            sweep(server)  # it is not the client who is late
            server.request_stop()
            assert receive(client).startswith(b"HTTP/1.1 200")


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
