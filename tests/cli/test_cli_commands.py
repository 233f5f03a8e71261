"""The commands: what they are called, what they refuse, and how they say so. No model is loaded here."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cli_terminal as cli
import pytest

from miniserve import __version__
from miniserve.cli.run import with_all_keys
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.server.config import ServerConfig


@pytest.fixture(scope="module")
def forked() -> Iterator[cli.Forked]:
    forked = cli.Forked()
    yield forked
    forked.close()


def test_help_names_all_commands() -> None:
    done = cli.run("--help")
    assert done.returncode == 0
    for command in ("run", "serve", "chat", "bench", "version"):
        assert f" {command} " in done.stdout


def test_help_is_fast_because_it_imports_little() -> None:
    code = (
        "import sys\nsys.argv = ['miniserve', 'run', '--help']\n"
        "from miniserve.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'uvicorn', 'zmq', 'huggingface_hub', 'numpy', 'httpx'}\n"
        "print('imported:', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_run_has_a_flag_for_each_setting_of_the_engine() -> None:
    done = subprocess.run(
        [*cli.COMMAND, "run", "--help"],
        env=cli.environment() | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    for setting in dataclasses.fields(EngineConfig):
        if setting.name not in ("model", "data_parallel_rank"):  # the second is counted, not asked for
            assert re.search(rf"--{setting.name.replace('_', '-')}[ ,]", done.stdout)
    for flag in ("--host", "--port", "--api-key", "--served-model-name", "--no-chat", "--no-prefix-caching", "-p "):
        assert flag in done.stdout


def test_serve_is_run_without_chat(forked: cli.Forked) -> None:
    help_text = forked.run("serve", "--help").stdout
    assert "--max-num-seqs" in help_text and "--prompt" not in help_text and "--no-chat" not in help_text


@pytest.mark.parametrize("arguments", [("version",), ("--version",)])
def test_version(arguments: tuple[str, ...], forked: cli.Forked) -> None:
    done = (forked if arguments == ("version",) else cli).run(*arguments)
    assert (done.returncode, done.stdout) == (0, f"miniserve {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run", "--no-such-flag"), "--no-such-flag"),
        (("run", "--port", "eight"), "--port"),
        (("run", "--port", "70000"), "--port must be between 0 and 65535, not 70000."),
        (("run", "--dtype", "int3"), "--dtype 'int3' is not known"),
        (
            ("run", "--kv-layout", "round"),
            "--kv-layout 'round' is not known; choose one of auto, linear, shuffled",
        ),
        (("run", "--max-model-len", "8q"), "--max-model-len must be a whole number such as 8192"),
        (("run", "--max_model_len", "8q"), "--max-model-len must be a whole number such as 8192"),
        (("run", "--tensor-parallel-size", "two"), "--tensor-parallel-size must be a number of GPUs or auto"),
        (("run", "--kv-cache-memory", "much"), "--kv-cache-memory must be a size in bytes such as 512M or 4G"),
        (("run", "--max-itl-ratio", "1"), "--max-itl-ratio must be above 1, for example 2, or 0 for no bound"),
        (("serve", "--max-itl-ratio", "-2"), "--max-itl-ratio must be above 1"),
        (("run", "--speculative", "ngram:17"), "--speculative 'ngram:17' is not known; give it as ngram:K with K"),
        (("serve", "--speculative", "draft"), "between 1 and 16, for example ngram:4."),
        (("run", "--speculative", "ngram:4", "--max-num-seqs", "4"), "raise --max-num-seqs from 4."),
        (("run", "--speculative", "ngram:4", "--async-scheduling"), "leave --async-scheduling out."),
        (("run", "--max-itl-ratio", "nan"), "--max-itl-ratio must be above 1"),
        (("run", "--gpu-memory-utilization", "1.5"), "--gpu-memory-utilization must be above 0 and at most 1"),
        (("run", "--log-level", "loud"), "--log-level 'loud' is not known"),
        (("run", "--generation-config", "x"), "--generation-config 'x' is not known; choose one of auto, none."),
        (("run", "--max-model-len", "9" * 20), "--max-model-len must be a positive number of 64 bits"),
        (("run", "--max-num-seqs", "1000M"), "--max-num-seqs must be at most 65536"),
        (("run", "--served-model-name", "\udcff"), "The arguments are not valid UTF-8"),
        (("bench", "serve", "--url", "http://a:99999"), "'http://a:99999' is not a URL (Port out of range"),
        (("bench", "serve", "--url", "http://[::1"), "is not a URL (Invalid IPv6 URL)"),
        (("bench", "serve", "--api-key", "é"), "--api-key must be made of printable ASCII"),
        (("bench", "latency", "--input-len", "9" * 12), "--input-len and --output-len must be 1 or more, and at most"),
        (("chat", "--url", "http://[::1", "-m", "hi"), "'http://[::1' is not a URL"),
        (("chat", "--api-key", "é", "-m", "hi"), "--api-key must be made of printable ASCII"),
        (("run", "--api-key", ""), "--api-key and MINISERVE_API_KEY must not be empty"),
        (("serve", "--api-key-file", "/nowhere/keys"), "--api-key-file /nowhere/keys cannot be read: No such file"),
        (("serve", "--api-key-file", "/dev/null"), "--api-key-file /dev/null is empty: write one key on a line."),
        (("serve", "--allowed-host", "http://a"), "--allowed-host 'http://a' is no host name"),
        (("run", "--step-timeout", "0"), "--step-timeout must be a number of seconds above 0"),
        (("run", "-p", " "), "There is nothing to answer"),
        (("run", "-p", "Hi", "--port", "8123"), "--port: one answer has no use for this; leave it out"),
        (("run", "-p", "Hi", "--port", "8000", "--host", "127.0.0.1"), "--host, --port: one answer has no use"),
        (("run", "-p", "Hi", "--uds", "socket"), "--uds: one answer"),
        (("run", "-p", "Hi", "--ssl-keyfile", "k", "--ssl-certfile", "c"), "--ssl-keyfile, --ssl-certfile: one answer"),
        (("run", "-p", "Hi", "--log-requests"), "--log-requests: one answer"),
        (("run", "-p", "Hi", "--served-model-name", "x"), "--served-model-name: one answer"),
        (("serve", "--uds", "socket", "--port", "8000"), "--port: with --uds the server listens on that socket alone"),
        (("check", "--all", "--kv-layout", "auto"), "--kv-layout: --all checks every one that works here"),
        (
            ("bench", "sweep", "x/y", "--url", "http://127.0.0.1:9", "--max-num-seqs", "256"),
            "MODEL, --max-num-seqs: --url names a running server, which has its own; leave this out.",
        ),
        (("run", "--port", "0", "./nowhere"), "There is no directory './nowhere'"),
        (
            ("run", "--port", "0", "nobody/nothing"),
            "nobody/nothing is not (or not completely) in the Hugging Face cache",
        ),
        (("run", "--port", "0", "--revision", "x"), "--revision x means nothing for the built-in model"),
        (("run", "--host", "192.0.2.1"), "--host '192.0.2.1' is no address of this machine"),
        (("chat", "--url", "http://127.0.0.1:9", "-m", "hi"), "No server answers at http://127.0.0.1:9"),
        (("chat", "--url", "ftp://x", "-m", "hi"), "'ftp://x' is not a URL"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(arguments: tuple[str, ...], said: str, forked: cli.Forked) -> None:
    done = forked.run(*arguments)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    if "--no-such-flag" not in arguments and "eight" not in arguments:  # these two are told by the parser, in a box
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_keys_of_the_flag_the_file_and_the_environment_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "keys").write_text("b\nc\n")
    monkeypatch.setenv("MINISERVE_API_KEY", "d")
    assert with_all_keys(ServerConfig(), None).api_keys == ("d",)
    assert capsys.readouterr().err == ""
    assert with_all_keys(ServerConfig(api_keys=("a",)), tmp_path / "keys").api_keys == ("a", "b", "c", "d")
    assert "process list" in capsys.readouterr().err
    monkeypatch.setenv("MINISERVE_API_KEY", "")
    with pytest.raises(UserError, match="MINISERVE_API_KEY must not be empty"):
        with_all_keys(ServerConfig(), None)


def test_an_alias_is_told_also_where_the_model_cannot_be_had(forked: cli.Forked) -> None:
    done = forked.run("run", "--port", "0", "Qwen/Qwen3-235B")
    assert done.returncode == 2
    assert "Qwen/Qwen3-235B is not a repository on the Hugging Face hub; taking Qwen/Qwen3-235B-A22B." in done.stderr
    assert "error: Qwen/Qwen3-235B-A22B is not" in done.stderr


def test_debug_shows_the_traceback(forked: cli.Forked) -> None:
    for arguments in (("--debug", "run", "--port", "0", "./x"), ("run", "--port", "0", "--log-level", "debug", "./x")):
        done = forked.run(*arguments)
        assert done.returncode != 0 and "Traceback" in done.stderr and "UserError" in done.stderr


def test_a_port_in_use_is_told_before_the_model_is_looked_for(forked: cli.Forked) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = forked.run("run", "./nowhere", "--port", str(port))
    assert done.returncode == 2
    assert f"Port {port} on 127.0.0.1 is already in use" in done.stderr and "--port" in done.stderr
    assert "nowhere" not in done.stderr
