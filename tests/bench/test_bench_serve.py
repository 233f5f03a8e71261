from __future__ import annotations

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from bench_stub_server import Stub
from typer.testing import CliRunner

from miniserve.bench.client import RequestRecord, SSELines
from miniserve.bench.serve import ServeResult, run
from miniserve.bench.workload import ServeConfig, Shape
from miniserve.cli.bench import app
from miniserve.core import UserError


def measure(stub: Stub, **settings: object) -> ServeResult:
    shape = Shape(input_len=12, output_len=8)
    with stub.running() as url:
        defaults: dict[str, object] = {"url": url, "shape": shape, "num_prompts": 6, "concurrency": 2, "timeout": 120.0}
        if "request_rate" in settings:
            del defaults["concurrency"]
        return run(ServeConfig(**(defaults | settings)))  # type: ignore[arg-type]


def test_events_are_found_however_the_bytes_are_cut() -> None:
    stream = b': hello\n\ndata: {"a": "\xc3\xa9"}\r\n\r\nevent: x\ndata:2\n\ndata: [DONE]\n\n'
    expected = [b'{"a": "\xc3\xa9"}', b"2", b"[DONE]"]
    assert SSELines().feed(stream) == expected
    for size in range(1, len(stream)):
        lines = SSELines()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [payload for piece in pieces for payload in lines.feed(piece)] == expected


def test_tpot_is_per_token_after_the_first() -> None:
    record = RequestRecord(start=0.0, ttft=1.0, last=3.0, completion_tokens=5)
    assert record.tpot == 0.5
    assert RequestRecord(start=0.0, ttft=1.0, last=1.0, completion_tokens=1).tpot is None


def test_every_request_is_measured_once_and_in_order() -> None:
    stub = Stub(delay=0.002)
    result = measure(stub, ignore_eos=True, model="stub-model", seed=5)
    assert len(result.records) == 6
    assert not result.summary.failures
    for record in result.records:
        assert (record.prompt_tokens, record.completion_tokens, record.num_chunks) == (12, 8, 8)
        assert len(record.itl) == 7
        assert 0 < record.ttft <= record.last <= record.e2e
        assert sum(record.itl) <= record.e2e - record.ttft + 1e-9
        assert record.finish_reason == "length"
    assert [record.start for record in result.records] == sorted(record.start for record in result.records)
    assert stub.most_in_flight == 2
    assert len(stub.bodies) == 7  # one warm-up
    assert all(body["ignore_eos"] is True and body["temperature"] == 0 for body in stub.bodies)
    assert len({tuple(body["prompt"]) for body in stub.bodies}) == 7


def test_tokens_are_counted_by_the_server_not_by_chunks() -> None:
    result = measure(Stub(tokens_per_chunk=3))
    assert {(record.completion_tokens, record.num_chunks, len(record.itl)) for record in result.records} == {(8, 3, 2)}
    assert result.to_json()["tokens_per_chunk"] == pytest.approx(8 / 3)


def test_requests_of_an_open_loop_do_not_wait_for_each_other() -> None:
    stub = Stub(delay=0.05)
    result = measure(stub, request_rate=500.0, num_prompts=12, warmup=0)
    assert not result.summary.failures
    assert stub.most_in_flight > 2
    assert result.summary.lag >= 0


def test_chat_sends_calibrated_text_and_does_not_count_the_role_chunk() -> None:
    stub = Stub()
    result = measure(stub, endpoint="chat")
    assert {(record.prompt_tokens, record.num_chunks) for record in result.records} == {(12, 8)}
    assert "ignore_eos" not in stub.bodies[0]


def test_text_prompts_need_no_tokenizer() -> None:
    stub = Stub(has_tokenize=False)
    result = measure(stub, prompt_type="text")
    assert not result.summary.failures
    assert all(len(body["prompt"].split()) == 12 for body in stub.bodies)


def test_ids_need_a_vocabulary() -> None:
    with pytest.raises(UserError, match="--vocab-size"):
        measure(Stub(has_tokenize=False))
    stub = Stub(has_tokenize=False)
    measure(stub, vocab_size=3)
    assert {token for body in stub.bodies for token in body["prompt"]} == {0, 1, 2}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("500", "broken on purpose"),
        ("mid-stream", "lost the engine"),
        ("cut", r"ended without \[DONE\]"),
        ("short", "the server returned 7 tokens, but ignore_eos asks for 8"),
        ("no usage", "no completion tokens"),
    ],
)
def test_failures_are_counted_and_named(fault: str, message: str) -> None:
    result = measure(Stub(fail=lambda n: fault if n in (2, 4) else None), ignore_eos=True)
    (error,) = result.summary.failures
    assert re.search(message, error)
    assert result.summary.failures[error] == 2
    assert len(result.completed) == 4
    # Figures are of the requests that succeeded.
    assert result.summary.throughput["output_tokens_per_s"] == pytest.approx(4 * 8 / result.summary.duration)


def test_a_server_that_fails_at_once_is_a_sentence() -> None:
    with pytest.raises(UserError, match=r"warm-up request to .* failed: HTTP 500"):
        measure(Stub(fail=lambda n: "500"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match="is the server running"):
            run(ServeConfig(url=url, shape=Shape(input_len=1, output_len=1), concurrency=1))


def test_the_key_is_sent_and_never_written() -> None:
    with pytest.raises(UserError, match="--api-key"):
        measure(Stub(api_key="open sesame"))
    result = measure(Stub(api_key="open sesame"), api_key="open sesame")
    assert "sesame" not in json.dumps(result.to_json())


@pytest.mark.parametrize(
    "wrong",
    [
        {"concurrency": 1, "request_rate": 1.0},
        {"concurrency": 0},
        {"concurrency": None, "request_rate": 0.0},
        {"num_prompts": 0},
        {"warmup": -1},
        {"endpoint": "chat", "prompt_type": "ids"},
        {"endpoint": "chat", "vocab_size": 10},
        {"timeout": 0.0},
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, object]) -> None:
    fitting: dict[str, object] = {"url": "http://x", "shape": Shape(input_len=1, output_len=1), "concurrency": 1}
    ServeConfig(**fitting)  # type: ignore[arg-type]
    with pytest.raises(UserError):
        ServeConfig(**(fitting | wrong))  # type: ignore[arg-type]


def bench_command(url: str, *more: str) -> list[str]:
    lengths = ["--input-len", "5", "--output-len", "4", "--num-prompts", "8", "--concurrency", "4"]
    return ["serve", "--url", url, *lengths, *more]


def test_command_writes_json_and_picture(tmp_path: Path) -> None:
    with Stub(delay=0.001).running() as url:
        arguments = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
        result = CliRunner().invoke(app, bench_command(f"{url}/v1/", *arguments))
    assert result.exit_code == 0, result.output
    for expected in ("8 of 8 requests completed", "TTFT", "TPOT", "ITL", "p99"):
        assert expected in result.output
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["kind"] == "serve"
    assert written["server"] == {"version": "stub 1"}
    assert (written["completed"], written["failed"], written["failures"]) == (8, 0, {})
    assert (written["input_tokens"], written["output_tokens"]) == (40, 32)
    assert set(written["latency_s"]) == {"ttft", "tpot", "itl", "e2e"}
    assert set(written["latency_s"]["ttft"]) == {"count", "mean", "median", "p90", "p99", "min", "max"}
    assert written["latency_s"]["itl"]["count"] == 8 * 3
    assert len(written["requests"]) == 8
    assert {"cpu", "cores", "gpus", "versions"} <= set(written["machine"])
    assert {"command", "date", "config", "throughput", "client", "model"} <= set(written)
    picture = (tmp_path / "r.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_measuring(option: str, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "x"):
        result = CliRunner().invoke(app, ["serve", "--url", "http://127.0.0.1:9", option, str(path)])
        assert isinstance(result.exception, UserError) and "Cannot write" in str(result.exception)


def test_command_exits_1_when_a_request_failed() -> None:
    with Stub(fail=lambda n: "500" if n == 3 else None).running() as url:
        result = CliRunner().invoke(app, bench_command(url))
    assert result.exit_code == 1
    assert "7 of 8 requests completed" in result.output
    assert "1 failed: HTTP 500" in result.output


def test_a_run_without_success_still_reports() -> None:
    with Stub(fail=lambda n: "500").running() as url:
        result = CliRunner().invoke(app, bench_command(url, "--warmup", "0"))
    assert result.exit_code == 1
    assert "0 of 8 requests completed" in result.output
    assert "8 failed" in result.output


def test_plot_without_matplotlib_is_refused_before_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stub = Stub()
    with stub.running() as url:
        result = CliRunner().invoke(app, bench_command(url, "--plot", "x.png"))
    assert isinstance(result.exception, UserError)
    assert "pip install" in str(result.exception)
    assert stub.bodies == []


def test_help_names_every_command() -> None:
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("serve", "sweep", "latency", "throughput"):
        assert command in result.output
