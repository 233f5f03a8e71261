"""`miniserve run` with the real engine and the built-in model, as a user starts it and ends it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cli_terminal as cli
import httpx
import pytest

# Small and the same everywhere, whatever the machine has.
ENGINE = ("--device", "cpu", "--max-model-len", "1K", "--max-num-seqs", "16", "--kv-cache-memory", "256M")
FLAGS = (*ENGINE, "--port", "0")
SHORT = (*ENGINE, "--max-model-len", "128")
CHAT_TEMPLATE = Path(__file__).parents[2] / "miniserve/assets/tiny-qwen3/chat_template.jinja"


def url_of(output: str) -> str:
    found = re.search(r"at (http://\S+)", output)
    assert found is not None, output
    return found[1]


def ask(url: str, **settings: Any) -> dict[str, Any]:
    body = {"model": "tiny-qwen3", "prompt": "Once upon a time", "temperature": 0} | settings
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=cli.TIMEOUT, trust_env=False)
    assert answer.status_code == 200, answer.text
    content: dict[str, Any] = answer.json()
    return content


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[cli.Running]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\nsecret\n other \n")
    with cli.Running("run", *FLAGS, "--api-key-file", str(keys), "--served-model-name", "my model") as running:
        running.wait_for("curl http")
        yield running


# --- the start ----------------------------------------------------------------------------------------------------


def test_the_start_is_told_in_order(server: cli.Running) -> None:
    text = server.wait_for("max_tokens")
    order = ["tiny-qwen3, built in (", "loading weights: 100%", "Memory plan", "weights", "KV cache", "max concurrency"]
    order += ["at 1,024 tokens", "Qwen3ForCausalLM in", "on cpu", "Serving my model at http://127.0.0.1:", "curl http"]
    place = 0
    for part in order:
        assert part in text[place:], (part, text)
        place = text.index(part, place) + len(part)
    assert "\x1b" not in text and "\r" not in text  # no colours, no bars
    assert "secret" not in text and "process list" not in text


def test_the_curl_line_works(server: cli.Running) -> None:
    [line] = [line for line in server.wait_for("max_tokens").splitlines() if line.startswith("curl ")]
    environment = {**os.environ, "API_KEY": "secret", "no_proxy": "*"}
    done = subprocess.run(
        ["sh", "-c", line], env=environment, capture_output=True, text=True, check=True, timeout=cli.TIMEOUT
    )
    assert '"object":"text_completion"' in done.stdout and '"model":"my model"' in done.stdout, done.stdout


def test_chat_talks_to_it(server: cli.Running) -> None:
    url = url_of(server.stderr)
    done = cli.run(
        "chat", "--url", url, "--api-key", "secret", "-m", "hello", "--max-tokens", "8", "--temperature", "0"
    )
    assert done.returncode == 0 and done.stdout.strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINISERVE_API_KEY", "other")
        assert cli.run("chat", "--url", url, "-m", "hello", "--max-tokens", "8").returncode == 0
    refused = cli.run("chat", "--url", url, "-m", "hello")
    assert refused.returncode == 2 and "--api-key" in refused.stderr


def test_a_second_server_on_its_port_is_refused(server: cli.Running) -> None:
    port = url_of(server.stderr).rpartition(":")[2]
    done = cli.run("run", "--port", port)
    assert done.returncode == 2 and f"Port {port} on 127.0.0.1 is already in use" in done.stderr


def test_what_the_engine_refuses_is_one_sentence() -> None:
    done = cli.run("run", *FLAGS, "--max-model-len", "1M")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and "--max-model-len" in done.stderr
    assert "Traceback" not in done.stderr


# --- the end ------------------------------------------------------------------------------------------------------


def test_ctrl_c_lets_running_requests_finish() -> None:
    with cli.Running("run", *FLAGS) as running:
        url = url_of(running.wait_for("max_tokens"))
        with stream(url, max_tokens=60) as pieces:
            next(pieces)
            running.signal(signal.SIGINT)
            running.wait_for("Shutting down")
            rest = list(pieces)
        assert running.wait() == 0
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2]
    assert "Traceback" not in running.stderr


def test_ctrl_c_waits_no_longer_than_drain_timeout() -> None:
    with cli.Running("run", *FLAGS, "--drain-timeout", "0") as running:
        url = url_of(running.wait_for("max_tokens"))
        with stream(url, max_tokens=900, n=16) as pieces:
            next(pieces)
            running.signal(signal.SIGINT)
            rest = list(pieces)
        assert running.wait() == 0
    assert rest[-1] == "data: [DONE]" and "The engine was shut down." in rest[-2]


def test_a_second_ctrl_c_ends_at_once() -> None:
    with cli.Running("run", *FLAGS) as running:
        url = url_of(running.wait_for("max_tokens"))
        with stream(url, max_tokens=900, n=16) as pieces:
            next(pieces)
            running.signal(signal.SIGINT)
            running.wait_for("Shutting down")
            running.signal(signal.SIGINT)
            assert running.wait() == 130
            with pytest.raises(httpx.HTTPError):
                list(pieces)
    assert "Traceback" not in running.stderr


@contextmanager
def stream(url: str, **settings: Any) -> Iterator[Iterator[str]]:
    """The lines of a completion that goes on to its limit of tokens, as they come."""
    body = {"model": "tiny-qwen3", "prompt": "Once upon a time", "ignore_eos": True, "stream": True} | settings
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=cli.TIMEOUT, trust_env=False) as response:
        yield filter(None, response.iter_lines())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_loading(number: signal.Signals, code: int) -> None:
    with cli.Running("run", *FLAGS) as running:
        running.wait_for("built in (")
        engine = wait_for_engine(running.process.pid)
        running.signal(number)
        assert running.wait() == code
    assert "Traceback" not in running.stderr
    assert not Path(f"/proc/{engine}").exists()


def test_an_engine_that_dies_while_loading_is_exit_1() -> None:
    with cli.Running("run", *FLAGS) as running:
        os.kill(wait_for_engine(running.process.pid), signal.SIGKILL)
        assert running.wait() == 1
    assert running.stderr.splitlines()[-1].startswith("error: The engine did not start: ")
    assert "SIGKILL" in running.stderr and "Traceback" not in running.stderr


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
def test_the_death_of_the_engine_is_exit_1(name: str) -> None:
    with cli.Running("run", *FLAGS) as running:
        running.wait_for("max_tokens")
        engine = wait_for_engine(running.process.pid)
        os.kill(engine, signal.Signals[name])
        if name == "SIGSTOP":
            running.signal(signal.SIGTERM)  # which waits for no request of it
        assert running.wait() == 1
    assert name in running.stderr and "Traceback" not in running.stderr
    assert not Path(f"/proc/{engine}").exists()


def wait_for_engine(pid: int) -> int:
    """The process id of the engine process beneath `pid`."""
    deadline = time.monotonic() + cli.TIMEOUT
    while time.monotonic() < deadline:
        for child in descendants(pid):
            if b"miniserve.engine.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                return child
        time.sleep(0.01)
    raise AssertionError("there is no engine process")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            yield child
            yield from descendants(child)


# --- one answer ---------------------------------------------------------------------------------------------------


def test_piped_text_is_answered() -> None:
    """As `-p` is, whose answer the test of a full disk waits for."""
    piped = cli.run(
        "run",
        *SHORT,
        "--generation-config",
        "none",
        "--seed",
        "3",
        text="Tom has 2 apples and buys 3 more. How many has he?\n",
    )
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.strip() and "Traceback" not in piped.stderr


def test_a_closed_standard_output_is_told() -> None:
    command = [sys.executable, "-m", "miniserve", "run", *ENGINE, "-p", "Hi"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=cli.TIMEOUT,
        check=False,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: Standard output is closed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a disk that is always full")
@pytest.mark.parametrize("command", [["run", *SHORT, "-p", "Hi"], ["version"], ["--help"]])
def test_a_full_disk_is_one_sentence(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "miniserve", *command],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=cli.TIMEOUT,
            check=False,
        )
    where = "standard output, or a file"
    told = f"error: No space left on device: {where}; make room there and try again.\n"
    assert (done.returncode, done.stderr) == (1, told)


def test_bytes_that_are_no_text_are_one_sentence() -> None:
    done = cli.run("run", *ENGINE, "-p", "a\udcff")
    assert done.returncode == 2 and done.stderr.startswith("error: The arguments are not valid UTF-8")
    code = "import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO(b'a\\xff'), 'utf-8'); "
    code += "from miniserve.cli.repl import read_text; read_text()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UserError: Standard input is not valid UTF-8" in done.stderr


def test_a_silent_pipe_is_no_question() -> None:
    command = [*cli.COMMAND, "run", "--port", "0", "./nowhere"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=cli.environment(), **pipes) as silent:  # held open, as by a supervisor
        assert silent.stderr is not None
        # It went on to look for the model instead of waiting for a text that does not come.
        assert "There is no directory" in silent.stderr.read()
    assert cli.run("run", "--port", "0", "./nowhere", text="").stderr.startswith("error: There is no directory")


def test_a_question_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "question.txt").write_text("What is it?")
    code = "import sys; from miniserve.cli.repl import read_piped_text; print(repr(read_piped_text()))"
    for source, text in [(tmp_path / "question.txt", "'What is it?'"), (Path("/dev/null"), "None")]:
        with source.open() as stdin:
            done = subprocess.run([sys.executable, "-c", code], stdin=stdin, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == text
    closed = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "{code}" <&-'], capture_output=True, text=True, check=True
    )
    assert closed.stdout.strip() == "None"


# --- at a terminal ------------------------------------------------------------------------------------------------


def test_chat_at_a_terminal_beneath_which_the_server_runs() -> None:
    with cli.Terminal("run", *FLAGS) as terminal:
        url = url_of(terminal.wait_for("max_tokens"))
        terminal.wait_for(">>> ")
        assert ask(url, max_tokens=4)["usage"]["completion_tokens"] == 4
        terminal.type("/set max_tokens 5\n")
        terminal.wait_for(">>> ")
        terminal.type("Tell me a story.\n")
        assert terminal.wait_for(">>> ").strip()
        assert terminal.interrupt_and_wait() == 0
        assert "Traceback" not in terminal.output


def test_the_death_of_the_engine_ends_a_chat() -> None:
    with cli.Terminal("run", *FLAGS) as terminal:
        terminal.wait_for(">>> ")
        os.kill(wait_for_engine(terminal.process.pid), signal.SIGKILL)
        assert terminal.wait() == 1
        assert "SIGKILL" in terminal.output and "Traceback" not in terminal.output


def test_a_killed_chat_leaves_no_process_behind() -> None:
    with cli.Terminal("run", *FLAGS) as terminal:
        terminal.wait_for(">>> ")
        below = list(descendants(terminal.process.pid))
        assert len(below) >= 2  # the server's and the engine's
        terminal.process.kill()
        deadline = time.monotonic() + cli.TIMEOUT
        while any(map(alive, below)):
            assert time.monotonic() < deadline, below
            time.sleep(0.01)


def test_a_chat_whose_server_does_not_start_ends_as_the_server_does(server: cli.Running) -> None:
    port = url_of(server.stderr).rpartition(":")[2]
    with cli.Terminal("run", *ENGINE, "--port", port) as terminal:
        assert terminal.wait() == 2
        assert terminal.output.startswith(f"error: Port {port} on 127.0.0.1 is already in use")
        assert len(terminal.output.splitlines()) == 1


def test_a_chat_logs_no_prompts() -> None:
    with cli.Terminal("run", *FLAGS, "--log-prompts") as terminal:
        assert terminal.wait() == 2
        assert terminal.output.startswith("error: --log-prompts: no line stands between those of a chat")


def test_no_chat_at_a_terminal() -> None:
    with cli.Terminal("run", *FLAGS, "--no-chat") as terminal:
        terminal.wait_for("max_tokens")
        os.kill(terminal.process.pid, signal.SIGTERM)
        terminal.wait_for("Shutting down")
        assert terminal.wait() == 0
        assert ">>> " not in terminal.output
