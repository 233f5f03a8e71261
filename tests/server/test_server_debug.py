"""Where the engine's time goes, as told from outside: /debug/steps, the roofline in /metrics, the line in the log."""

from __future__ import annotations

import asyncio
import logging
import threading
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, RunningServer, running_server, wait_until

from miniserve.core import StepRecord, StepTotals
from miniserve.server import steps as steps_module
from miniserve.server.steps import ProgressLine, chrome_trace

# A GPU's: the second step was launched while the first ran, and waited for it.
FIRST = StepRecord(
    7, 100.0, "prefill", 0, 1, 9, 0, 1, 0.001, 0.002, 0.004, 0.010, 0.001, 0.0105, None, 10**9, 9000
)  # fmt: skip
SECOND = StepRecord(
    8, 100.003, "decode", 3, 0, 3, 4, 0, 0.0005, 0.0005, 0.012, 0.004, 0.001, 0.006, 0.0001, 10**9, 30_000
)  # fmt: skip


@pytest.fixture
def real(real_server: RunningServer) -> RunningServer:
    return real_server


def complete(server: RunningServer, **body: Any) -> None:
    body = {"prompt": "Once upon a time", "ignore_eos": True, **body}
    assert httpx.post(f"{server.url}/completions", json=body, timeout=120).status_code == 200


def steps(server: RunningServer, **query: Any) -> dict[str, Any]:
    response = httpx.get(f"{server.root}/debug/steps", params=query, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_steps_tell_what_a_request_took(real: RunningServer) -> None:
    complete(real, max_tokens=20, n=3)
    told = steps(real)
    assert [step["kind"] for step in told["steps"][-19:]] == ["decode"] * 19
    assert {step["rows"] for step in told["steps"][-19:]} == {3}
    traffic = told["traffic"]
    ((window, token),) = traffic["kv"]
    assert window is None and traffic["bandwidth"] > 1e8
    before, last = told["steps"][-2:]
    assert last["kv_bytes"] - before["kv_bytes"] == 3 * token  # each row's context is a token longer
    assert last["weight_bytes"] == traffic["weights"] > 1e6
    assert last["device"] is None and last["launch"] > 0
    totals = told["totals"]
    assert totals["decode_steps"] >= 19 and totals["decode_rows"] >= 57 and totals["prefill_tokens"] > 0
    assert "weights" in told["summary"] and "/s ·" in told["summary"]
    assert steps(real, limit=2)["steps"] == told["steps"][-2:]
    assert steps(real, limit=0)["steps"] == []


def test_steps_can_be_read_while_others_run(real: RunningServer) -> None:
    client = threading.Thread(target=complete, args=(real,), kwargs={"max_tokens": 400})
    client.start()
    wait_until(lambda: real.engine.stats.num_running == 1)
    first = steps(real, limit=1)["steps"][0]["number"]
    wait_until(lambda: steps(real, limit=1)["steps"][0]["number"] > first)
    client.join(60)


def test_the_pool_is_seen_while_requests_run(real: RunningServer) -> None:
    def look() -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{real.root}/debug/engine", timeout=60).json()
        return answer

    seen: list[dict[str, Any]] = []
    while not seen or len(seen[-1]["pool"]["num_tokens"]) < 3:  # they may have ended before the look
        client = threading.Thread(target=complete, args=(real,), kwargs={"max_tokens": 200, "n": 3})
        client.start()
        wait_until(lambda client=client: real.engine.stats.num_running == 3 or not client.is_alive())
        seen.append(look())
        client.join(60)
    pool = seen[-1]["pool"]
    rows = {int(row) for row in pool["num_tokens"]}
    assert rows <= set(pool["owners"]) <= rows | {-1, -2, -3} and len(rows) == 3
    assert len(pool["owners"]) == -(-seen[-1]["num_blocks"] // pool["stride"]) <= 2048
    wait_until(lambda: real.engine.stats.num_running == 0)
    wait_until(lambda: set(look()["pool"]["owners"]) == {-1, -2})  # a look serves for half a second


def test_the_key_is_asked_for() -> None:
    with running_server(api_keys=("k",)) as server:
        assert httpx.get(f"{server.root}/debug/steps").status_code == 401
        assert httpx.get(f"{server.root}/debug/steps", headers={"x-api-key": "k"}).status_code == 200
        assert httpx.get(f"{server.root}/metrics").status_code == 200


def test_the_roofline_is_among_the_metrics(real: RunningServer) -> None:
    complete(real, max_tokens=5)
    lines = httpx.get(f"{real.root}/metrics").text.splitlines()
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("miniserve:")}
    told = steps(real, limit=0)
    assert values["miniserve:decode_steps_total"] == told["totals"]["decode_steps"]
    assert values["miniserve:decode_kv_bytes_total"] == told["totals"]["kv_bytes"]
    assert values["miniserve:memory_bandwidth_bytes_per_second"] == told["traffic"]["bandwidth"]
    assert "miniserve:device_idle_seconds_total" not in values  # a CPU has no clock of its own
    assert values["miniserve:roofline_ratio"] >= 0


def test_a_line_says_how_it_goes_while_requests_run(real: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    def lines() -> list[str]:  # a first one may come before any step that decodes
        said = [record.getMessage() for record in caplog.records if record.name == "miniserve.server.steps"]
        return [line for line in said if " · weights " in line]

    with caplog.at_level(logging.INFO):
        while not lines():
            complete(real, max_tokens=300, n=4)
    assert " running, " in lines()[0] and "tokens/s, prefill " in lines()[0]


# --- with engines that say what the test wants ---------------------------------------------------------------------


@pytest.mark.parametrize("query", ["format=xml", "limit=-1", "limit=1025", "limit=x"])
def test_what_cannot_be_shown_is_named(query: str) -> None:
    with running_server() as server:
        refused = httpx.get(f"{server.root}/debug/steps?{query}")
        assert refused.status_code == 400
        assert query.partition("=")[0] in refused.json()["error"]["param"]
        assert httpx.get(f"{server.root}/debug/steps").json()["steps"] == []


def test_a_long_step_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "_PATIENCE", 0.05)
    with running_server() as server:
        server.engine.age = 7.0
        server.engine.steps = lambda limit: asyncio.sleep(60)
        answer = httpx.get(f"{server.root}/debug/steps")
        assert answer.status_code == 503 and "ended 7 s ago" in answer.json()["error"]["message"]


def test_a_trace_draws_the_host_above_the_device() -> None:
    engine = FakeEngine()
    engine.records = [FIRST, SECOND]
    with running_server(engine) as server:
        trace = httpx.get(f"{server.root}/debug/steps?format=chrome").json()
    spans = {(span["name"], span["args"].get("number")): span for span in trace["traceEvents"] if span["ph"] == "X"}
    assert {span["args"]["name"] for span in trace["traceEvents"] if span["ph"] == "M"} == {"host", "device"}
    assert spans["schedule", 7]["ts"] == 0.0
    assert spans["launch", 8]["ts"] == pytest.approx(3500)
    assert (spans["wait", 7]["ts"], spans["wait", 7]["dur"]) == pytest.approx((4000, 10_000))
    first, second = spans["prefill", 7], spans["decode", 8]
    assert first["ts"] + first["dur"] == pytest.approx(14_000)  # when the host had its result
    assert (second["ts"], second["dur"]) == pytest.approx((14_000, 6000))  # not before the first one's end
    assert second["args"]["bucket"] == 4
    assert {first["tid"], second["tid"]}.isdisjoint({spans["wait", 7]["tid"]})


def test_without_a_devices_clock_launch_or_wait_is_the_computing() -> None:
    on_host = StepRecord(1, 50.0, "decode", 1, 0, 1, 0, 0, 0.001, 0.008, 0.009, 0.0, 0.001, None, None, None, None)
    *_, span = chrome_trace([on_host])["traceEvents"]
    assert (span["name"], span["ts"], span["dur"]) == ("decode", pytest.approx(1000), pytest.approx(8000))
    assert chrome_trace([])["traceEvents"]


def test_gauges_are_of_the_recent_steps_and_counters_of_all() -> None:
    engine = FakeEngine()
    engine.totals = StepTotals(decode_steps=90, decode_seconds=9.0, timed_host=3.0, timed_idle=1.5, padded_rows=8)
    engine.recent = StepTotals(
        decode_steps=9,
        decode_seconds=0.9,
        weight_bytes=6 * 10**11,
        kv_bytes=3 * 10**10,
        timed_host=0.2,
        timed_idle=0.01,
    )
    with running_server(engine) as server:
        text = httpx.get(f"{server.root}/metrics").text
    labels = '{engine="0",model_name="tiny/fake"}'
    assert f"miniserve:roofline_ratio{labels} 0.7" in text
    assert f"miniserve:cpu_hidden_ratio{labels} 0.95" in text
    assert f"miniserve:device_idle_seconds_total{labels} 1.5" in text
    assert f"miniserve:decode_padded_rows_total{labels} 8.0" in text


def test_the_line_comes_once_an_interval_and_never_at_rest(caplog: pytest.LogCaptureFixture) -> None:
    clock = [0.0]
    engine: Any = FakeEngine()
    line, silent = (ProgressLine(engine, interval, lambda: clock[0]) for interval in (10.0, 0.0))
    with caplog.at_level(logging.INFO):
        for second in range(60):
            clock[0] = float(second)
            if second == 12:
                engine.totals = StepTotals(
                    decode_steps=10, decode_rows=500, decode_seconds=0.05, mixed_rows=100, prefill_tokens=1000,
                    weight_bytes=10**10, kv_bytes=10**9,
                )  # fmt: skip
                engine.num_running = 2
                engine.guesses = (20, 100, 30)
            line.tick()
            silent.tick()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message == (
        "2 running, 0 waiting · decode 53 tokens/s, prefill 100 · 30 % of guesses right, 2.5 tokens where guessed"
        " · step 5 ms · 22 % of 1.0 TB/s · weights 91 % KV 9 %"
    )
