"""What is told while a model starts."""

from __future__ import annotations

import json
import shlex

import msgspec
import pytest
from engine_fakes import fake_info

from miniserve.cli.report import Report, client_url, curl_line, human_bytes
from miniserve.config import EngineConfig

INFO = msgspec.structs.replace(
    fake_info(EngineConfig(max_model_len=4096), num_blocks=1024),
    architecture="Qwen3ForCausalLM",
    dtype="bfloat16",
    memory=[("weights", 3 << 30), ("KV cache", 512 << 20)],
    attention=["CPU_ATTN, because the device is a CPU", "TORCH_ATTN: slower"],
)


def test_the_memory_plan_and_the_attention_path(capsys: pytest.CaptureFixture[str]) -> None:
    Report().engine(INFO)
    out, err = capsys.readouterr()
    assert out == ""
    rows = [[cell.strip() for cell in line.strip("│\n").split("│")] for line in err.splitlines() if "│" in line]
    assert rows == [
        ["weights", "3.00 GiB"],
        ["KV cache", "512.0 MiB"],
        ["tokens in the KV cache", "16,384"],
        ["max concurrency at 4,096 tokens", "4.0x"],
    ]
    assert err.endswith("CPU_ATTN, because the device is a CPU\nTORCH_ATTN: slower\n")


def test_speculation_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    Report().engine(msgspec.structs.replace(INFO, speculative="ngram:4"))
    assert "speculation ngram:4, in batch rows that no running request needs\n" in capsys.readouterr().err


def test_quiet_leaves_notes(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report(quiet=True)
    report.engine(INFO)
    report.line("not this")
    report.ready("http://127.0.0.1:8000", "m", with_key=False)
    report.note("an [alias] was taken")
    assert capsys.readouterr() == ("", "an [alias] was taken\n")


def test_a_load_without_a_terminal_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Report().loading() as progress:
        for done in range(101):
            progress("weights", done, 100)
        progress("chunk graphs", 40, 40)
        progress("no graphs", 0, 0)
    lines = ["weights: 100% of 0.0 MiB", "chunk graphs: 100% of 40", "no graphs: 100% of 0"]
    assert capsys.readouterr().err == "".join(f"loading {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("gpu7", "http://gpu7:8000"),
    ],
)
def test_the_url_is_one_that_a_client_can_use(host: str, url: str) -> None:
    assert client_url(host, 8000) == url


def test_the_curl_line_survives_a_shell() -> None:
    words = shlex.split(curl_line("http://127.0.0.1:8000", 'it\'s a "model"', with_key=True))
    assert words[:2] == ["curl", "http://127.0.0.1:8000/v1/completions"]
    assert words[words.index("-d") + 1 :] == [
        json.dumps({"model": 'it\'s a "model"', "prompt": "Once upon a time", "max_tokens": 64})
    ]
    assert "Authorization: Bearer $API_KEY" in words


def test_sizes() -> None:
    assert [human_bytes(size) for size in (0, 1 << 20, 5 << 30)] == ["0.0 MiB", "1.0 MiB", "5.00 GiB"]
