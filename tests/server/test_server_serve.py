"""How a server begins and ends: the port, the signals, the engine's death, the exit code."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, RunningServer, running_server, wait_until

from miniserve.core import UserError
from miniserve.server.config import ServerConfig
from miniserve.server.serve import bind, listening, loop_factory, serve


def test_a_port_in_use_is_told_before_anything_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match=r"already in use.*--port"):
        bind("127.0.0.1", taken.getsockname()[1])


def test_other_addresses_that_cannot_be_bound() -> None:
    with pytest.raises(UserError, match="no address of this machine"):
        bind("192.0.2.1", 0)
    with pytest.raises(UserError, match="--host"):
        bind("no such host", 0)
    for host in ("a..b", "a" * 300):  # which the resolver is not even asked for
        with pytest.raises(UserError, match="--host"):
            bind(host, 0)


def test_a_port_for_the_administrator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(UserError, match=r"administrator.*1023"):
        bind("127.0.0.1", 80)


def test_an_event_loop_is_chosen_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)  # closed, as by `>&-`
    loop_factory()


def test_binding_does_not_listen_yet() -> None:
    with bind("127.0.0.1", 0) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname(), timeout=5)


def test_of_two_servers_that_start_one_gets_the_port() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(UserError, match="already in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_a_server_can_follow_another_at_once() -> None:
    with running_server() as server, socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while client.recv(1000):
            pass  # the server closes first, which leaves something of the connection in its way
        assert server.stop() == 0
        bind("127.0.0.1", server.port).close()


def test_a_port_that_was_lost_while_the_model_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(socket.socket, "listen", refuse)
    engine: Any = FakeEngine()
    config = ServerConfig(port=0)
    with listening(config) as sock, pytest.raises(UserError, match="already in use"):
        asyncio.run(serve(engine, config, sock, on_ready=lambda: None, stop=asyncio.Event()))
    assert engine.shutdowns == [False]


def ask_twice(server: RunningServer) -> tuple[list[httpx.Response], list[threading.Thread]]:
    """Whole and as a stream, by clients whose requests run then; the answers are there when they have ended."""
    answers: list[httpx.Response] = []

    def ask(streams: bool) -> None:
        body = {"prompt": "x", "max_tokens": 20, "stream": streams}
        answers.append(httpx.post(f"{server.url}/completions", json=body, timeout=60))

    clients = [threading.Thread(target=ask, args=(streams,)) for streams in (False, True)]
    for client in clients:
        client.start()
    wait_until(lambda: server.engine.num_running == 2)
    return answers, clients


def test_a_stop_lets_running_requests_finish() -> None:
    engine = FakeEngine(step_seconds=0.02, hold_at=3)
    with running_server(engine) as server:
        answers, clients = ask_twice(server)
        stopper = threading.Thread(target=server.stop)
        stopper.start()
        wait_until(lambda: engine.shutdowns == [True])
        wait_until(lambda: not accepts(server.port))
        server.call(engine.gate.set)
        for thread in (*clients, stopper):
            thread.join(60)
        assert server.exit_code == 0
    assert [answer.status_code for answer in answers] == [200, 200]
    whole, stream = sorted(answers, key=lambda answer: answer.headers["content-type"])
    assert whole.json()["usage"]["completion_tokens"] == 20
    assert stream.text.endswith("data: [DONE]\n\n")
    assert '"finish_reason":"length"' in stream.text
    assert engine.shutdowns == [True, False]


def test_what_does_not_finish_in_time_is_answered_with_an_error() -> None:
    engine = FakeEngine(hold_at=1)
    with running_server(engine, drain_timeout=0.3) as server:
        answers, clients = ask_twice(server)
        assert server.stop() == 0
        for client in clients:
            client.join(60)
    whole, stream = sorted(answers, key=lambda answer: answer.headers["content-type"])
    assert whole.status_code == 503
    assert "shut down" in whole.json()["error"]["message"]
    *_, error, done = stream.text.removesuffix("\n\n").split("\n\n")
    assert "shut down" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"


def test_a_request_that_is_half_there_is_not_waited_for() -> None:
    engine = FakeEngine(hold_at=1)
    with running_server(engine) as server:
        idle = server.num_tasks()
        half = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        half.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 999\r\n\r\n{"
        )
        wait_until(lambda: server.num_tasks() > idle)
        server.request_stop()
        with half, half.makefile("rb") as file:
            assert b"shutting down" in file.read()
        assert server.join() == 0


def test_a_client_that_does_not_read_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniserve.server.serve._GRACE", 0.2)
    engine = FakeEngine()
    with running_server(engine) as server, socket.create_connection(("127.0.0.1", server.port), timeout=60) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"prompt": [[7]] * 20, "max_tokens": 250, "logprobs": 20, "stream": True}).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        client.recv(100)
        assert server.stop() == 0


def test_the_engines_death_answers_everybody_and_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(hold_at=1)
    with running_server(engine) as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"prompt": ["x", "y"], "max_tokens": 20}
            answers.append(httpx.post(f"{server.url}/completions", json=body, timeout=60))

        client = threading.Thread(target=ask)
        client.start()
        wait_until(lambda: engine.num_running == 2)
        server.call(engine.kill, "The engine died: killed by signal 9.")
        client.join(60)
        assert server.join() == 1
    assert answers[0].status_code == 503
    assert "killed by signal 9" in answers[0].json()["error"]["message"]
    assert "killed by signal 9" in caplog.text


def test_an_engine_that_is_shutting_down_takes_no_requests() -> None:
    engine = FakeEngine()
    with running_server(engine) as server:
        engine.shutdowns.append(False)
        for streams in (False, True):
            refused = httpx.post(f"{server.url}/completions", json={"prompt": "x", "stream": streams})
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "ServiceUnavailableError"


PROGRAM = """
import asyncio, signal, sys
sys.path.insert(0, sys.argv[1])
from server_fakes import FakeEngine
from miniserve.server.config import ServerConfig
from miniserve.server.serve import bind, loop_factory, serve

if sys.argv[2:] == ["ignoring"]:
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
sock = bind("127.0.0.1", 0)

async def main():
    engine = FakeEngine(hold_at=1)
    def ready():
        print(sock.getsockname()[1], flush=True)
    return await serve(engine, ServerConfig(), sock, on_ready=ready, stop=asyncio.Event())

with asyncio.Runner(loop_factory=loop_factory()) as runner:
    sys.exit(runner.run(main()))
"""


def start_program(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def port_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    return int(process.stdout.readline())


def test_the_first_signal_drains_and_the_second_ends_at_once() -> None:
    with start_program("ignoring") as idle, start_program() as busy:  # side by side: importing takes them seconds
        port = port_of(busy)
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            body = b'{"prompt": "x", "stream": true}'
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            os.kill(busy.pid, signal.SIGHUP)
            wait_until(lambda: not accepts(port))
            time.sleep(0.3)
            assert busy.poll() is None  # it waits for the running request
            os.kill(busy.pid, signal.SIGINT)
            assert busy.wait(60) == 130

        # Where nothing runs, one signal is enough, but for those that were ignored before.
        url = f"http://127.0.0.1:{port_of(idle)}/health"
        for number in (signal.SIGINT, signal.SIGHUP):
            os.kill(idle.pid, number)
            for _ in range(3):  # the server looks for signals ten times a second
                time.sleep(0.2)
                assert httpx.get(url).status_code == 200
        os.kill(idle.pid, signal.SIGTERM)
        assert idle.wait(60) == 0


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
