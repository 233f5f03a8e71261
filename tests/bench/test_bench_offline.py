from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
from engine_fakes import fake_info
from typer.testing import CliRunner

from miniserve.bench import offline
from miniserve.bench.decode_steps import DecodeSteps
from miniserve.bench.workload import Shape
from miniserve.cli.bench import app
from miniserve.config import EngineConfig
from miniserve.core import Completion, EngineInfo, SamplingParams, StepTotals, UserError
from miniserve.llm import Generation

INFO = msgspec.structs.replace(fake_info(EngineConfig()), vocab_size=50)


@dataclass
class FakeEngine:
    """Its own clock: 1 s of prefill, then 0.25 s a decode step. `limit` cuts an answer short."""

    now: float = 0.0
    limit: int = 10**9
    calls: list[tuple[list[list[int]], list[SamplingParams]]] = field(default_factory=list)

    info: EngineInfo = INFO

    def generate(self, prompts: list[list[int]], params: list[SamplingParams], progress: bool) -> list[Generation]:
        self.calls.append((prompts, params))
        counts = [min(one.max_tokens or 0, self.limit) for one in params]
        self.now += 1.0 + 0.25 * (max(counts) - 1)
        answers = [Completion(index=0, text="", token_ids=[0] * count, finish_reason=None) for count in counts]
        return [
            Generation(prompt=None, prompt_token_ids=[], outputs=[answer], prompt_logprobs=None, num_cached_tokens=0)
            for answer in answers
        ]

    @property
    def step_totals(self) -> StepTotals:
        return StepTotals(decode_steps=len(self.calls), decode_seconds=self.now)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(offline.time, "perf_counter", lambda: fake.now)
    return fake


def test_latency_separates_prefill_from_decode(engine: FakeEngine) -> None:
    result = offline.measure_latency(
        engine,
        batch_size=4,
        shape=Shape(input_len=10, output_len=9),
        warmup=2,
        repeats=3,
        seed=0,
    )
    assert (result.whole, result.first, result.step) == ([3.0] * 3, [1.0] * 3, [0.25] * 3)
    assert result.decode_tokens_per_s == 16.0
    assert len(engine.calls) == 10
    prompts = [tuple(prompt) for batch, _ in engine.calls for prompt in batch]
    assert len(set(prompts)) == len(prompts) == 40  # none can be found in a prefix cache
    assert all(len(prompt) == 10 and max(prompt) < 50 for prompt in prompts)
    assert all(one.ignore_eos and one.greedy for _, params in engine.calls for one in params)
    written = json.loads(msgspec.json.encode(result.to_json(INFO)))
    assert written["kind"] == "latency"
    assert written["latency_s"]["step"]["median"] == 0.25
    assert written["engine"]["kv_layout"] == "linear"


def test_steps_are_counted_behind_the_warm_up(engine: FakeEngine) -> None:
    load = {"batch_size": 1, "shape": Shape(input_len=10, output_len=9), "seed": 0}
    result = offline.measure_latency(engine, **load, warmup=2, repeats=3)
    assert result.steps == DecodeSteps(StepTotals(decode_steps=6, decode_seconds=12.0), None)


def test_one_token_has_no_decode_step(engine: FakeEngine) -> None:
    load = {"batch_size": 1, "shape": Shape(input_len=1, output_len=1), "seed": 0}
    result = offline.measure_latency(engine, **load, warmup=0, repeats=1)
    assert result.step == []
    assert result.decode_tokens_per_s is None
    assert result.summaries()["step"] is None


def test_throughput_counts_every_token(engine: FakeEngine) -> None:
    shape = Shape(input_len=20, output_len=8, range_ratio=0.5)
    result = offline.measure_throughput(engine, num_prompts=30, shape=shape, seed=1)
    prompts, params = engine.calls[-1]
    assert result.input_tokens == sum(map(len, prompts))
    assert result.output_tokens == sum(one.max_tokens or 0 for one in params)
    assert len({one.max_tokens for one in params}) > 1
    assert result.duration == 1.0 + 0.25 * 11
    assert result.rates()["output_tokens_per_s"] == pytest.approx(result.output_tokens / result.duration)
    assert json.loads(msgspec.json.encode(result.to_json(INFO)))["throughput"]["requests_per_s"] == 30 / result.duration


def test_figures_over_fewer_tokens_are_refused(engine: FakeEngine) -> None:
    engine.limit = 5
    with pytest.raises(UserError, match="got 5 tokens instead of 9"):
        offline.measure_latency(
            engine,
            batch_size=1,
            shape=Shape(input_len=1, output_len=9),
            warmup=0,
            repeats=1,
            seed=0,
        )


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"repeats": 0}, {"warmup": -1}])
def test_counts_out_of_range_are_refused(engine: FakeEngine, wrong: dict[str, int]) -> None:
    counts = {"batch_size": 1, "warmup": 0, "repeats": 1, "seed": 0} | wrong
    with pytest.raises(UserError):
        offline.measure_latency(engine, shape=Shape(), **counts)


def test_latency_and_throughput_run_the_engine(tmp_path: Path) -> None:
    small = ["--input-len", "6", "--output-len", "3", "--load-format", "dummy", "--kv-cache-memory", "8M"]
    commands = (["latency", "--batch-size", "2", "--repeats", "2"], ["throughput", "--num-prompts", "5"])
    for command in commands:
        path = tmp_path / f"{command[0]}.json"
        result = CliRunner().invoke(app, [*command, *small, "--max-num-seqs", "4", "--json", str(path)])
        assert result.exit_code == 0, (result.output, result.exception)
        written = json.loads(path.read_text())
        assert written["kind"] == command[0]
        assert written["engine"]["device"] == "cpu"
        assert written["engine"]["max_num_seqs"] == 4
        assert written["steps"]["decode_steps"] >= 2 and written["steps"]["weight_bytes"] > 0
        assert "decode: step " in result.output
    assert written["output_tokens"] == 15
    assert "output tokens/s" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int3"], "--dtype"),
        (["--repeats", "0"], "--repeats"),
        (["--input-len", "0"], "--input-len"),
        (["--input-len", "60", "--output-len", "60", "--max-model-len", "64"], "got 4 tokens instead of 60"),
        (["--input-len", "80", "--max-model-len", "64"], "refuses"),
    ],
)
def test_what_cannot_be_measured_is_a_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["latency", "--load-format", "dummy", "--kv-cache-memory", "8M", *arguments])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
