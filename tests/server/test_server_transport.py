"""What is around a request: its id, the path before its path, the socket and TLS below it, its line in the log."""

from __future__ import annotations

import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, RunningServer, running_server, wait_until

from miniserve.core import UserError
from miniserve.server import serve
from miniserve.server.config import ServerConfig
from miniserve.server.serve import bind_unix, check_tls, listening

COMPLETION: dict[str, Any] = {"prompt": "Once", "max_tokens": 3}

# For localhost and 127.0.0.1, made for these tests alone.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBnDCCAUGgAwIBAgIUaPVFvN6fEwnToDlsETXdPHn/Q+4wCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTIwMTAxNTIzOVoYDzIxMjYxMTA3
MDE1MjM5WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQLeoCuI7xk+3z45lzIv2OGN4jOC7em0tGSwX1tQNbY3enrwRbOl+xV
p+qRO8h3ZoaCnhlGZlsytvPeKJV9BR35o28wbTAdBgNVHQ4EFgQU0+MXuvUv5f6u
jQBCUP9Bhuhz47cwHwYDVR0jBBgwFoAU0+MXuvUv5f6ujQBCUP9Bhuhz47cwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSQAwRgIhAK4EKAsVpVifAtoD15iwQQ638LeD9iUk5JKJG3L9FQDVAiEA
738VvpqQlYjk+VRptKhy1qQLSairTotZ2qx2TQ2yalc=
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg4NHkAmYO3g760uZs
GaLxEIM1xahYuVImH/jAJXSdfgmhRANCAAQLeoCuI7xk+3z45lzIv2OGN4jOC7em
0tGSwX1tQNbY3enrwRbOl+xVp+qRO8h3ZoaCnhlGZlsytvPeKJV9BR35
-----END PRIVATE KEY-----
"""
ENCRYPTED_KEY = """\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,AAC49A9BBC212B027CD409A7621A347B

h4L/HkrikQp5y1pmLHI7kxtPPXBweHP/ICRI4+h3e0nYmODBW5p8Q8mjo/xQWnOq
waJUjdnS3+c/Uctf0h5kZvSbCEwziIrCjoudoShsMj4lY+KJv2anuEIEVpg/lw57
PICchosT0q1+UgeM721bY0IwqW2zWnfmaWvKOBFXhqY=
-----END EC PRIVATE KEY-----
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    for name, text in (("cert.pem", CERTIFICATE), ("key.pem", KEY), ("encrypted.pem", ENCRYPTED_KEY)):
        (folder / name).write_text(text)
    return {"ssl_certfile": str(folder / "cert.pem"), "ssl_keyfile": str(folder / "key.pem")}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(max_body_bytes=5000, root_path="/models/small", api_keys=("k",)) as server:
        yield server


KEYED = {"x-api-key": "k"}


def test_every_answer_has_an_id(server: RunningServer) -> None:
    def ask(method: str = "POST", path: str = "/v1/completions", **more: Any) -> httpx.Response:
        headers = {"x-request-id": "mine-1"} | KEYED
        return httpx.request(method, server.root + path, **{"headers": headers, "json": COMPLETION} | more)

    answers = [
        ask(),
        ask(json={**COMPLETION, "stream": True}),
        ask(json={**COMPLETION, "max_tokens": -1}),
        ask(json={"prompt": "a" * 6000}),
        ask(headers={"x-request-id": "mine-1"}),
        ask("GET", "/nowhere"),
        ask("GET", "/health"),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 413, 401, 404, 200]
    assert {answer.headers["x-request-id"] for answer in answers} == {"mine-1"}
    new = [ask(headers=KEYED).headers["x-request-id"] for _ in range(2)]
    assert len(new[0]) == 32 and new[0] != new[1]
    for wrong in ("a" * 129, "ä".encode(), "a\tb"):
        refused = ask(headers={"x-request-id": wrong} | KEYED)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "x-request-id")
        assert len(refused.headers["x-request-id"]) == 32


def test_a_bug_has_an_id_too() -> None:
    engine = FakeEngine()
    with running_server(engine) as server:
        engine.generate = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
        answer = httpx.post(f"{server.url}/completions", json=COMPLETION, headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")


@pytest.mark.parametrize(("head", "known"), [("X-Request-Id: mine", True), ("A: b", False)])
def test_what_is_no_http_is_refused_with_an_id(server: RunningServer, head: str, known: bool) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\nA: {'b' * 70_000}\r\n\r\n".encode()
        )
        answer = client.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 431")
    assert ("X-Request-Id: mine\r\n" in answer) == known
    assert "X-Request-Id: " in answer


def test_a_path_may_begin_with_what_a_proxy_puts_before_it(server: RunningServer) -> None:
    for before in ("", "/models/small"):
        url = server.root + before
        assert httpx.post(f"{url}/v1/completions", json=COMPLETION, headers=KEYED).is_success
        assert httpx.get(f"{url}/v1/models/", headers=KEYED).is_success
        assert httpx.get(f"{url}/v1/models").status_code == 401, "the key is asked for whatever stands before"
        assert httpx.get(f"{url}/health").is_success
        assert httpx.get(f"{url}/openapi.json").is_success
    for wrong in ("/models/smaller", "/models/small/models/small", "/models/small/models/small/models/small"):
        for path in ("/health", "/v1/models", "/"):
            assert httpx.get(server.root + wrong + path, headers=KEYED).status_code == 404
    assert httpx.get(f"{server.root}/openapi.json").json()["servers"] == [{"url": "/models/small"}]


@pytest.mark.parametrize("path", ["models", "/models/", "/a b", "//"])
def test_root_paths_that_are_none(path: str) -> None:
    with pytest.raises(UserError, match="--root-path"):
        ServerConfig(root_path=path)


@pytest.mark.parametrize("path", ["/v1", "/v1/chat", "/health"])
def test_a_root_path_that_is_ours_is_refused(path: str) -> None:
    from miniserve.server.app import create_app

    with pytest.raises(UserError, match="choose another"):
        create_app(FakeEngine(), ServerConfig(root_path=path))  # type: ignore[arg-type]


def test_a_unix_socket_serves_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with running_server(uds=str(path)):
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://any.name") as client:
            assert client.post("/v1/completions", json=COMPLETION).is_success
            assert client.get("/health").headers["x-request-id"]
        with pytest.raises(UserError, match="there already"):
            bind_unix(str(path))
    assert not path.exists()


@pytest.mark.parametrize("other", [{"host": "0.0.0.0"}, {"port": 8312}])
def test_a_unix_socket_has_no_port(other: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="leave these out"):
        ServerConfig(uds="socket", **other)


def test_a_unix_socket_takes_the_place_of_one_left_behind_and_of_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    bind_unix(str(path)).close()
    assert path.exists()
    with listening(ServerConfig(uds=str(path))) as sock:
        sock.listen()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(UserError, match="there already"):
        bind_unix(str(path))
    assert path.read_text() == "precious"
    with pytest.raises(UserError, match="cannot be made"):
        bind_unix(str(tmp_path / "nowhere" / "socket"))
    for wrong in ("", "a" * 108):
        with pytest.raises(UserError, match="--uds"):
            ServerConfig(uds=wrong)


def test_tls_serves_streams_and_refuses_like_http(files: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_max_connections", lambda: 2)
    context = ssl.create_default_context(cadata=CERTIFICATE)
    with running_server(**files) as server:
        url = server.root.replace("http:", "https:")
        with httpx.Client(verify=context, base_url=url, timeout=60) as client:
            assert client.get("/health").is_success
            streamed = client.post("/v1/completions", json={**COMPLETION, "stream": True})
            assert streamed.text.endswith("data: [DONE]\n\n")

        def connect() -> ssl.SSLSocket:
            plain = socket.create_connection(("127.0.0.1", server.port), timeout=60)
            return context.wrap_socket(plain, server_hostname="localhost")

        with connect() as client:
            client.sendall(b"nonsense\r\n\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 400")
        with connect() as first, connect() as second, connect() as third:
            assert first.recv(1) == b"", "the oldest idle connection went at the limit"
            third.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert third.recv(1000).startswith(b"HTTP/1.1 200")
            second.close()


def test_files_for_tls_that_will_not_do(files: dict[str, str], tmp_path: Path) -> None:
    check_tls(ServerConfig(**files))  # type: ignore[arg-type]
    for name in files:
        with pytest.raises(UserError, match="belong together"):
            ServerConfig(**{name: files[name]})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} .*cannot be read"):
            check_tls(ServerConfig(**{**files, name: str(tmp_path / "missing")}))  # type: ignore[arg-type]
    swapped = dict(zip(files, reversed(list(files.values())), strict=True))
    with pytest.raises(UserError, match="no certificate and its key"):
        check_tls(ServerConfig(**swapped))  # type: ignore[arg-type]
    encrypted = files["ssl_keyfile"].replace("key.pem", "encrypted.pem")
    with pytest.raises(UserError, match="passphrase"):
        check_tls(ServerConfig(**{**files, "ssl_keyfile": encrypted}))  # type: ignore[arg-type]


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "miniserve.server.request_log"]


def test_load_counts_requests_and_each_has_a_line_when_it_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(hold_at=1)
    with caplog.at_level(logging.INFO, "miniserve"), running_server(engine) as server:

        def load() -> int:
            return int(httpx.get(f"{server.root}/load").json()["server_load"])

        assert load() == 0
        body = {"prompt": ["secret words", "b"], "n": 2, "max_tokens": 3, "stream": True}
        headers = {"x-request-id": "mine"}
        with httpx.stream("POST", f"{server.url}/completions", json=body, headers=headers, timeout=60) as response:
            wait_until(lambda: load() == 1)
            with httpx.stream("POST", f"{server.url}/completions", json=body | {"n": 1}, timeout=60) as other:
                wait_until(lambda: load() == 2)
                assert other.is_success
            wait_until(lambda: load() == 1)
            server.call(engine.gate.set)
            response.read()
        wait_until(lambda: load() == 0)
        refused = httpx.post(f"{server.url}/completions", json={**body, "max_tokens": -1})
        assert refused.status_code == 400
        wait_until(lambda: len(lines(caplog)) == 2)
    gone, done = [record.fields for record in lines(caplog)]  # type: ignore[attr-defined]
    assert gone["finish"] == "2 abort"
    assert done["id"].startswith("cmpl-") and done["request_id"] == "mine"
    assert (done["in"], done["out"], done["finish"]) == (sum(len(ids) for ids, _ in engine.seen[:2]), 12, "4 length")
    assert done["ttft"] >= 0 and done["tpot"] >= 0 and "prompt" not in done
    message = lines(caplog)[1].getMessage()
    assert (
        message.startswith(f"id={done['id']} request_id=mine in=")
        and 'finish="4 length"' in message
        and "secret" not in message
    )


@pytest.mark.parametrize("path", ["/completions", "/chat/completions"])
def test_prompts_are_logged_on_demand_alone_and_cut(caplog: pytest.LogCaptureFixture, path: str) -> None:
    text = "secret words\n" + "a " * 100
    body = COMPLETION | (
        {"prompt": text} if path == "/completions" else {"messages": [{"role": "user", "content": text}]}
    )
    body = {name: value for name, value in body.items() if name != "prompt" or path == "/completions"}
    with caplog.at_level(logging.INFO, "miniserve"):
        for config in ({}, {"log_prompts": True}, {"log_requests": False}):
            with running_server(FakeEngine(max_model_len=4000), **config) as server:
                assert httpx.post(server.url + path, json=body, timeout=60).is_success
    plain, shown = lines(caplog)
    assert "secret" not in plain.getMessage()
    assert "secret words\n" in shown.fields["prompt"]  # type: ignore[attr-defined]
    assert "\n" not in shown.getMessage()
    with pytest.raises(UserError, match="--log-prompts"):
        ServerConfig(log_prompts=True, log_requests=False)
