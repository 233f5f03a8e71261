"""`miniserve chat` against a small OpenAI-compatible server that answers by rule."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cli_terminal as cli
import pytest

from miniserve.cli.repl import ChatClient, ChatError, ChatSettings


@dataclass
class EchoServer:
    """Answers "1 2 … n: <last message>", a word a piece, n being the number of messages. Some messages are special."""

    url: str = ""
    api_key: str | None = None
    chat_template: bool = True
    bodies: list[dict[str, Any]] = field(default_factory=list)
    hung_up: threading.Event = field(default_factory=threading.Event)


def _handler(echo: EchoServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            if not self._refused():
                self._json(200, {"object": "list", "data": [{"id": "echo-1"}, {"id": "echo-2"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self._refused():
                return
            echo.bodies.append(body)
            chat = self.path == "/v1/chat/completions"
            if chat and not echo.chat_template:
                self._error(400, "This model has no chat template; use the completions endpoint.")
            elif chat:
                messages = body["messages"]
                self._stream(f"{len(messages)}: {messages[-1]['content']}", chat)
            else:
                self._stream(f" continues {body['prompt']}", chat)

        def _stream(self, text: str, chat: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            words = text.split(" ")
            pieces = [words[0], *(f" {word}" for word in words[1:])]
            for number, piece in enumerate(pieces):
                last = number == len(pieces) - 1
                reason = ("length" if "cut" in text else "stop") if last else None
                content = {"delta": {"content": piece}} if chat else {"text": piece}
                if "pondered" in piece:
                    content["delta"] = {"reasoning": piece, "reasoning_content": piece}
                self._event({"choices": [content | {"index": 0, "finish_reason": reason}]})
                if "forever" in piece:
                    self._run_until_hung_up()
                    return
                if "boom" in piece:
                    self._event({"error": {"message": "the engine died"}})
                    return
            self.wfile.write(b"data: [DONE]\n\n")

        def _run_until_hung_up(self) -> None:
            try:
                while True:
                    self._event({"choices": [{"index": 0, "delta": {"content": "."}, "finish_reason": None}]})
                    time.sleep(0.01)
            except OSError:
                echo.hung_up.set()

        def _event(self, content: dict[str, Any]) -> None:
            self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
            self.wfile.flush()

        def _refused(self) -> bool:
            if echo.api_key is None or self.headers["Authorization"] == f"Bearer {echo.api_key}":
                return False
            self._error(401, "Unauthorized: send the API key.")
            return True

        def _error(self, status: int, message: str) -> None:
            self._json(status, {"error": {"message": message, "type": "x", "param": None, "code": status}})

        def _json(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@pytest.fixture
def echo() -> Iterator[EchoServer]:
    echo = EchoServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(echo))
    server.daemon_threads = True
    echo.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield echo
    server.shutdown()
    server.server_close()
    thread.join()


# --- one answer ---------------------------------------------------------------------------------------------------


def test_one_answer_goes_to_stdout_alone(echo: EchoServer) -> None:
    done = cli.run("chat", "--url", f"{echo.url}/v1/", "-m", "hello you", "--system", "be brief", "--max-tokens", "9")
    assert (done.returncode, done.stdout, done.stderr) == (0, "2: hello you\n", "")
    assert echo.bodies == [
        {
            "model": "echo-1",
            "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello you"}],
            "stream": True,
            "max_tokens": 9,
        }
    ]


def test_reasoning_is_shown_beside_the_answer(echo: EchoServer) -> None:
    done = cli.run("chat", "--url", echo.url, "-m", "pondered it")
    assert (done.returncode, done.stdout) == (0, "1: it\n")
    assert done.stderr.strip() == "pondered"


@pytest.mark.parametrize("arguments", [(), ("-m", "-")])
def test_piped_text_is_answered(echo: EchoServer, arguments: tuple[str, ...]) -> None:
    done = cli.run("chat", "--url", echo.url, "--model", "echo-2", "--temperature", "0", *arguments, text="one\ntwo\n")
    assert (done.returncode, done.stdout) == (0, "1: one\ntwo\n")
    assert (echo.bodies[0]["model"], echo.bodies[0]["temperature"]) == ("echo-2", 0.0)


def test_nothing_to_ask(echo: EchoServer) -> None:
    done = cli.run("chat", "--url", echo.url)
    assert done.returncode == 2 and "There is no message" in done.stderr


def test_the_key_is_sent(echo: EchoServer) -> None:
    echo.api_key = "secret"
    assert cli.run("chat", "--url", echo.url, "--api-key", "secret", "-m", "hi").stdout == "1: hi\n"
    done = cli.run("chat", "--url", echo.url, "-m", "hi")
    assert done.returncode == 2 and "Unauthorized: send the API key." in done.stderr and "--api-key" in done.stderr


def test_a_failure_while_answering_is_exit_1(echo: EchoServer) -> None:
    done = cli.run("chat", "--url", echo.url, "-m", "go boom now")
    assert done.returncode == 1
    assert done.stdout.startswith("1: go boom") and done.stderr == "error: the engine died\n"


def test_an_answer_cut_at_the_limit_is_told(echo: EchoServer) -> None:
    done = cli.run("chat", "--url", echo.url, "-m", "cut this")
    assert (done.stdout, done.stderr) == ("1: cut this\n", "(the answer was cut off at the token limit)\n")


def test_a_model_without_chat_template_continues_the_text(echo: EchoServer) -> None:
    echo.chat_template = False
    done = cli.run("chat", "--url", echo.url, "-m", "Once upon")
    assert (done.returncode, done.stdout) == (0, " continues Once upon\n")
    assert "no chat template" in done.stderr
    assert echo.bodies[1]["prompt"] == "Once upon" and echo.bodies[1]["max_tokens"] > 16


def test_a_system_prompt_without_a_chat_template_is_refused(echo: EchoServer) -> None:
    echo.chat_template = False
    done = cli.run("chat", "--url", echo.url, "-m", "Once upon", "--system", "be brief")
    assert done.returncode == 1 and done.stdout == "" and "system prompt" in done.stderr


# --- the client ---------------------------------------------------------------------------------------------------


def test_closing_the_answer_closes_the_connection(echo: EchoServer) -> None:
    client = ChatClient(echo.url)
    answer = client.answer([{"role": "user", "content": "forever"}], ChatSettings())
    assert [next(answer), next(answer)] == ["1:", " forever"]
    answer.close()
    assert echo.hung_up.wait(30)


def test_a_server_that_goes_away_is_an_error(echo: EchoServer) -> None:
    client = ChatClient(echo.url, model="echo-1")
    with pytest.raises(ChatError, match="the engine died"):
        list(client.answer([{"role": "user", "content": "boom"}], ChatSettings()))
    assert list(client.answer([{"role": "user", "content": "hi"}], ChatSettings())) == ["1:", " hi"]


# --- at a terminal ------------------------------------------------------------------------------------------------


def test_a_conversation_at_a_terminal(echo: EchoServer) -> None:
    with cli.Terminal("chat", "--url", echo.url) as terminal:
        terminal.wait_for(f"echo-1 at {echo.url}")
        terminal.wait_for(">>> ")
        for typed, shown in [
            ("hello", "1: hello\n"),
            ("again", "3: again\n"),
            ("/system be brief", "The system prompt is set."),
            ("third", "6: third\n"),
            ("/clear", "cleared"),
            ("anew", "2: anew\n"),
            ("/system", "The system prompt is removed."),
            ("/clear", "cleared"),
            ("cut", "(the answer was cut off at the token limit)"),
            ("boom", "error: the engine died"),
            ("/set temperature 0.5", "temperature is 0.5."),
            ("/set max_tokens 7", "max_tokens is 7."),
            ("/set max_tokens many", "takes a number or `default`, not 'many'."),
            ("/set colour red", "/set takes temperature or max_tokens."),
            ("/nonsense", "There is no command /nonsense"),
            ("/help", "/set temperature NUMBER"),
            ('"""first line\nsecond line"""', "first line\nsecond line\n"),
        ]:
            terminal.type(f"{typed}\n")
            terminal.wait_for(shown)
            terminal.wait_for(">>> ")
        terminal.type("/bye\n")
        assert terminal.wait() == 0
    assert echo.bodies[-1]["messages"][-1] == {"role": "user", "content": "first line\nsecond line"}
    assert (echo.bodies[-1]["temperature"], echo.bodies[-1]["max_tokens"]) == (0.5, 7)
    assert "temperature" not in echo.bodies[0]


def test_ctrl_c_stops_an_answer_and_no_more(echo: EchoServer) -> None:
    with cli.Terminal("chat", "--url", echo.url) as terminal:
        terminal.wait_for(">>> ")
        terminal.type("go on forever\n")
        terminal.wait_for("1: go on forever...")
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for(">>> ")
        assert echo.hung_up.wait(30)
        terminal.type("and then\n")
        terminal.wait_for("3: and then\n")
        terminal.wait_for(">>> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")
        terminal.interrupt_until("(Ctrl-D or /bye leaves)")
        terminal.wait_for(">>> ")
        terminal.type("\x04")
        assert terminal.wait() == 0


def test_control_characters_do_not_reach_the_terminal(echo: EchoServer) -> None:
    with cli.Terminal("chat", "--url", echo.url, "-m", "red \x1b[31m alert\x07") as terminal:
        assert terminal.wait() == 0
        assert terminal.output == "1: red [31m alert\n"
    assert cli.run("chat", "--url", echo.url, "-m", "red \x1b[31m").stdout == "1: red \x1b[31m\n"
