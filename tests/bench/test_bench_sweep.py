"""The sweep: over servers of its own with the built-in model, and over the stub for what can go wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import IO, Any

import msgspec
import pytest
from bench_stub_server import Stub
from typer.testing import CliRunner

import miniserve
from miniserve.bench import sweep as sweeping
from miniserve.bench.display import print_sweep
from miniserve.bench.serve import ServeResult, run
from miniserve.bench.sweep import AS_SERVED, SweepConfig, SweepResult, layouts_of, running_server, sweep
from miniserve.bench.workload import ServeConfig, Shape
from miniserve.cli.bench import app
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.server.config import ServerConfig
from miniserve.server.process import ServerStart

DEEPSEEK = str(Path(miniserve.__file__).parent / "assets" / "tiny-deepseek")
SMALL = ["--device", "cpu", "--kv-cache-memory", "16M", "--max-num-seqs", "4"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield


def config(**settings: Any) -> SweepConfig:
    shapes = [Shape(input_len=6, output_len=5), Shape(input_len=3, output_len=4)]
    return SweepConfig(**({"engine": EngineConfig(), "shapes": shapes, "concurrencies": [1, 3]} | settings))


def test_both_layouts_are_measured_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # for the figures of a busy machine
    paths = [str(tmp_path / name) for name in ("r.json", "r.png")]
    options = ["--lengths", "12/6,24/3", "--concurrency", "1,2", "--json", paths[0], "--plot", paths[1]]
    result = CliRunner().invoke(app, ["sweep", *SMALL, *options])
    assert result.exit_code == 0, (result.output, result.exception)
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["kind"], written["model"], written["refused"]) == ("sweep", "tiny-qwen3", {})
    found = [
        (point["layout"], point["input_len"], point["output_len"], point["concurrency"]) for point in written["points"]
    ]
    cases = [(12, 6, 1), (12, 6, 2), (24, 3, 1), (24, 3, 2)]
    assert found == [(layout, *case) for layout in ("linear", "shuffled") for case in cases]
    for point in written["points"]:
        assert point["completed"] == 4 and point["failures"] == {}
        assert point["throughput"]["output_tokens_per_s"] > 0
        assert point["latency_s"]["tpot"]["count"] == point["latency_s"]["ttft"]["count"] == point["completed"]
        steps = point["steps"]
        assert steps["prefill_tokens"] == point["completed"] * point["input_len"]
        # One after the other there is nothing to mix: each request's tokens but the first are decode steps.
        if point["concurrency"] == 1:
            assert steps["decode_steps"] == steps["decode_rows"] == 4 * (point["output_len"] - 1)
        assert sum(point["time_shares"].values()) == pytest.approx(1)
        assert steps["bandwidth"] > 0 and steps["share_of_bandwidth"] > 0
    assert "12/6" in result.output and "shuffled" in result.output and "TPOT" in result.output
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_a_layout_that_cannot_be_had_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[EngineConfig] = []

    @contextmanager
    def server(engine: EngineConfig) -> Iterator[str]:
        started.append(engine)
        if engine.kv_layout == "shuffled":
            raise UserError("The server did not start: no such blocks.")
        with Stub().running() as url:
            yield url

    monkeypatch.setattr(sweeping, "running_server", server)
    *_, result = sweep(config(rounds=1), lambda text: None)
    assert [(engine.kv_layout, engine.max_model_len) for engine in started] == [("linear", 11), ("shuffled", 11)]
    assert result.refused == {"shuffled": "The server did not start: no such blocks."}
    assert {point.layout for point in result.points} == {"linear"}
    with pytest.raises(UserError, match="no such blocks"):
        list(sweep(config(engine=EngineConfig(kv_layout="shuffled")), lambda text: None))


OTHER_SETTINGS: dict[str, Any] = {
    "model": "-m",
    "revision": "r",
    "dtype": "float32",
    "device": "cpu",
    "load_format": "dummy",
    "kv_layout": "linear",
    "kv_cache_dtype": "fp8",
    "attention_backend": "B",
    "gpu_memory_utilization": 0.5,
    "async_scheduling": False,
    "speculative": "ngram:2",
    "tensor_parallel_size": 154,
    "data_parallel_size": 1,  # several hosts have none
    "data_parallel_rank": 0,
    "node_rank": 3,
    "master_addr": "h",
    "generation_config": "none",
    "seed": -3,
    "log_level": "error",
    "log_format": "json",
}


def test_a_server_of_its_own_gets_every_setting() -> None:
    def other(field: Field[Any]) -> Any:
        return OTHER_SETTINGS.get(field.name, not field.default if isinstance(field.default, bool) else 77)

    engine = EngineConfig(**{field.name: other(field) for field in fields(EngineConfig)})
    server = ServerConfig(port=7, api_keys=("a", "b"), allowed_hosts=("h",), step_timeout=1.5)
    start = ServerStart(engine=engine, server=server, quiet=True, parent_pid=1)
    assert msgspec.json.decode(msgspec.json.encode(start), type=ServerStart) == start


def test_a_server_that_does_not_start_says_why() -> None:
    with pytest.raises(UserError, match=r"did not start.*/nowhere"), running_server(EngineConfig(model="/nowhere")):
        pass


def test_a_server_that_ends_by_itself_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        url, exit_code = "http://x", 1

        def __init__(self, engine: EngineConfig, server: ServerConfig, *, quiet: bool, log: IO[bytes]) -> None:
            log.write(b"all is well\nout of memory\n")

        def __enter__(self) -> Dying:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(sweeping, "ServerProcess", Dying)
    said = r"exit code 1\. The server's log ends: all is well\nout of memory"
    with pytest.raises(UserError, match=said), running_server(EngineConfig()):
        pass


def test_a_server_that_runs_already_is_measured_as_it_is() -> None:
    stub = Stub()
    points: list[int] = []
    with stub.running() as url:
        for result in sweep(config(url=url, rounds=2, api_key="k"), lambda text: None):
            points.append(len(result.points))
    assert [(p.layout, p.shape.input_len, p.shape.output_len, p.concurrency) for p in result.points] == [
        (AS_SERVED, 6, 5, 1), (AS_SERVED, 6, 5, 3), (AS_SERVED, 3, 4, 1), (AS_SERVED, 3, 4, 3),
    ]  # fmt: skip
    assert points == [1, 2, 3, 4, 4]
    assert len(stub.bodies) == 3 + (4 + 6 + 4 + 6)  # the warm-up is as wide as the widest point
    assert len({tuple(body["prompt"]) for body in stub.bodies}) == len(stub.bodies)
    assert all(point.summary.steps is None for point in result.points)
    assert result.to_json()["config"]["api_key"] == "***"


def test_its_prompts_are_drawn_from_the_seed() -> None:
    stub = Stub()
    with stub.running() as url:
        for seed in ("1", "1", "2"):
            load = ["--lengths", "4/3", "--concurrency", "1", "--rounds", "1", "--seed", seed]
            result = CliRunner().invoke(app, ["sweep", "--url", url, *load])
            assert result.exit_code == 0, (result.output, result.exception)
    first, again, other = (stub.bodies[at : at + 5] for at in (0, 5, 10))
    assert first == again != other


def test_failures_are_told_and_end_with_1() -> None:
    with Stub(fail=lambda n: "500" if n == 5 else None).running() as url:
        result = CliRunner().invoke(app, ["sweep", "--url", url, "--lengths", "4/3,5/3", "--concurrency", "2"])
    assert result.exit_code == 1
    assert "1 failed (as served, 4/3, 2 at a time): HTTP 500" in result.output
    assert "5/3" in result.output


def test_a_point_that_ends_its_server_does_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first server does not outlive the first point; no server outlives the third."""
    started: list[Stub] = []

    @contextmanager
    def server(engine: EngineConfig) -> Iterator[str]:
        started.append(Stub())
        with started[-1].running() as url:
            yield url

    def run_until_it_dies(asked: ServeConfig) -> ServeResult:
        point = asked.shape.input_len, asked.concurrency
        if asked.num_prompts == 4 and (point == (3, 1) or (point == (6, 3) and len(started) == 1)):
            raise UserError("Cannot reach it.")
        return run(asked)

    monkeypatch.setattr(sweeping, "running_server", server)
    monkeypatch.setattr(sweeping, "run", run_until_it_dies)
    *_, result = sweep(config(engine=EngineConfig(kv_layout="linear"), rounds=1), lambda text: None)
    assert len(started) == 4
    assert [(point.shape.input_len, point.concurrency) for point in result.points] == [(6, 1), (6, 3), (3, 3)]
    assert result.missed == {"linear, 3/4, 1 at a time": "Cannot reach it."}
    assert (result.failed, result.to_json()["missed"]) == (1, result.missed)
    print_sweep(result)
    assert "not measured (linear, 3/4, 1 at a time): Cannot reach it." in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        {"shapes": []},
        {"concurrencies": [0]},
        {"rounds": 0},
        {"url": "http://x", "engine": EngineConfig(block_size=32)},
        {"api_key": "k"},
        {"model": "m"},
        {"concurrencies": [257]},
    ],
)
def test_settings_that_do_not_fit_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        config(**wrong)


def test_one_layout_can_be_asked_for() -> None:
    assert layouts_of(config(engine=EngineConfig(kv_layout="shuffled"))) == ("shuffled",)
    assert layouts_of(config()) == ("linear", "shuffled")
    assert layouts_of(config(engine=EngineConfig(model=DEEPSEEK))) == ("latent",)
    assert SweepResult(config=config()).failed == 0


@pytest.mark.parametrize("lengths", ["12", "12/x", "0/4", ""])
def test_lengths_come_in_pairs(lengths: str) -> None:
    result = CliRunner().invoke(app, ["sweep", "--url", "http://127.0.0.1:1", "--lengths", lengths])
    assert isinstance(result.exception, UserError)
