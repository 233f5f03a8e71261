"""`--config`, and the log as JSON."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from miniserve.cli.config_file import ConfigFile
from miniserve.cli.main import State
from miniserve.cli.report import Report
from miniserve.cli.settings import with_settings
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.engine.launch import set_up_logging
from miniserve.server.config import ServerConfig

FOUND: list[tuple[EngineConfig, ServerConfig, str]] = []


@with_settings()
def command(engine: EngineConfig, server: ServerConfig, config: ConfigFile = None, note: str = "none") -> None:
    FOUND.append((engine, server, note))


def run(tmp_path: Path, text: str, *arguments: str) -> tuple[EngineConfig, ServerConfig, str]:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    app = typer.Typer(context_settings={"token_normalize_func": lambda token: token.replace("_", "-")})
    app.command()(command)
    result = CliRunner().invoke(app, ["--config", str(file), *arguments], obj=State(), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return FOUND.pop()


def test_every_kind_of_setting_comes_from_the_file_unless_the_command_line_has_it(tmp_path: Path) -> None:
    text = """
    model: some/model
    max-model-len: 8k
    max_num_seqs: 16
    seed: 7
    gpu-memory-utilization: 0.5
    enforce-eager: true
    no-prefix-caching: true
    aiter: false
    kv-cache-memory: 1G
    port: 1234
    allowed-origin: [https://a.example, https://b.example]
    served-model-name: one
    revision: null
    note: yes please
    """
    engine, server, note = run(tmp_path, text)
    assert engine == EngineConfig(
        model="some/model", max_model_len=8000, max_num_seqs=16, seed=7, gpu_memory_utilization=0.5, enforce_eager=True,
        enable_prefix_caching=False, aiter=False, kv_cache_memory=2**30,
    )  # fmt: skip
    assert server == ServerConfig(
        port=1234, allowed_origins=("https://a.example", "https://b.example"), served_model_names=("one",)
    )
    assert note == "yes please"
    flags = ("other/model", "--max-model-len", "2K", "--aiter", "--served-model-name", "two", "--enable-prefix-caching")
    engine, server, _ = run(tmp_path, text, *flags)
    assert (engine.model, engine.max_model_len, engine.aiter, engine.max_num_seqs) == ("other/model", 2048, True, 16)
    assert (engine.enable_prefix_caching, server.served_model_names, server.port) == (True, ("two",), 1234)
    assert run(tmp_path, "# nothing\n")[0] == EngineConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max-model-length: 5", "max-model-length is no setting; did you mean max-model-len"),
        ("zebra: 5", "zebra is no setting; `miniserve"),
        ("help: true", "help is no setting"),
        ("config: other.yaml", "config is no setting"),
        ("port: 1\nport: 2", "port is set twice"),
        ("max-num-seqs: 1\nmax_num_seqs: 2", "max_num_seqs is set twice"),
        ("aiter: true\nno-aiter: true", "no-aiter is set twice"),
        ("enforce-eager: 1", "enforce-eager must be true or false"),
        ("port: [1, 2]", "port takes one value"),
        ("port: {a: 1}", "port must be a text or a number"),
        ("port: true", "port must be a text or a number"),
        ("api-key: [a, null]", "api-key must be a text or a number"),
        ("- port", "it holds no names with values"),
        ("port", "it holds no names with values"),
        ("a: [", "no YAML of settings"),
        ("? [1]\n: 2", "no YAML of settings"),
        ("port: !!python/object:os.system x", "no YAML of settings"),
        ("max-model-len: many", "--max-model-len must be a whole number"),
    ],
)
def test_what_is_no_setting_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        run(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(command)
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read"):
        CliRunner().invoke(app, ["--config", str(tmp_path / "nowhere.yaml")], obj=State(), catch_exceptions=False)


def set_up(monkeypatch: pytest.MonkeyPatch, log_format: str) -> None:
    """As at the start of a process, where nothing logs yet."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    set_up_logging("info", log_format)


def test_a_log_of_json_has_an_object_on_each_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_up(monkeypatch, "json")
    log = logging.getLogger("miniserve.test")
    log.info("two\nlines of %s", "text")
    log.info("in=%d", 5, extra={"fields": {"in": 5, "finish": "stop"}})
    try:
        raise ValueError("bad")
    except ValueError:
        log.exception("It failed.")
    Report(logs=True).line("Serving it")
    lines: list[dict[str, Any]] = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["level"] for line in lines] == ["info", "info", "error", "info"]
    assert lines[0]["message"] == "two\nlines of text"
    assert {"time", "level", "logger", "in", "finish"} == set(lines[1])
    assert "ValueError: bad" in lines[2]["traceback"]
    assert lines[3]["message"] == "Serving it"


def test_a_log_of_text_is_as_ever(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    set_up(monkeypatch, "text")
    logging.getLogger("miniserve.test").info("in=%d", 5, extra={"fields": {"in": 5}})
    assert capsys.readouterr().err.endswith("INFO miniserve.test: in=5\n")
