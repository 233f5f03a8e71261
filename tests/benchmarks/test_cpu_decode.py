"""The comparison with transformers on a CPU: its sizes, its arithmetic, and one small run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import pytest

from benchmarks import cpu_decode
from benchmarks.decode_worker import Job, Measured


def write_config(folder: Path, **changes: object) -> Path:
    (folder / "config.json").write_text(json.dumps(cpu_decode.SMALL_LLAMA | changes))
    return folder


def test_sizes_count_what_a_step_reads(tmp_path: Path) -> None:
    sizes = cpu_decode.model_sizes(write_config(tmp_path))
    layer = 512 * (512 + 256 + 256 + 512) + 3 * 512 * 1408 + 2 * 512
    assert sizes.weights == 2 * (8 * layer + 512 + 8192 * 512)  # the untied embedding is not read
    assert sizes.kv_per_token == 2 * 8 * 4 * 64 * 2
    tied = cpu_decode.model_sizes(write_config(tmp_path, tie_word_embeddings=True))
    assert tied.weights == sizes.weights  # read once, as the head


def test_figures_of_known_times(monkeypatch: pytest.MonkeyPatch) -> None:
    # Turn by turn; ours takes 0.1, 0.2 and 0.4 s a step, transformers twice that.
    steps = {"miniserve": [0.1, 0.2, 0.4], "transformers": [0.2, 0.4, 0.8]}
    asked: list[Job] = []

    def answer(job: Job) -> object:
        asked.append(job)
        turn = sum(other.engine == job.engine for other in asked) - 1
        whole = 1.0 + 10 * steps[job.engine][turn]
        return msgspec.to_builtins(Measured(first=[1.0], whole=[whole], baseline=100, peak=100 + 50 * (turn + 1)))

    monkeypatch.setattr(cpu_decode, "run_worker", answer)
    job = Job(engine="miniserve", batch=4, prompt_len=16, output_len=11, kv_bytes_per_token=10)
    case = cpu_decode.measure_case(job, turns=3, bandwidth=1e4, weight_bytes=140, name="x")
    assert [one.engine for one in asked] == ["miniserve", "transformers"] * 3
    assert len({one.seed for one in asked}) == 3
    ours = case.engines["miniserve"]
    assert ours.step_s == pytest.approx(0.2)
    assert ours.decode_tokens_per_s == pytest.approx(20.0)
    assert ours.turns == pytest.approx([40.0, 20.0, 10.0])
    assert (ours.first_s, ours.memory) == (1.0, 100)
    assert case.ratio == pytest.approx(2.0)
    assert case.kv_bytes == 4 * 21.5 * 10
    assert case.floor_step_s == pytest.approx((140 + 860) / 1e4)
    assert case.floor_share == pytest.approx(0.5)


def test_a_worker_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="no-such-model"):
        cpu_decode.run_worker(Job(engine="transformers", model="./no-such-model", vocab_size=10))


def test_the_comparison_runs(tmp_path: Path) -> None:
    write_config(tmp_path, hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
    path = tmp_path / "result.json"
    cpu_decode.main(
        config=tmp_path, small=False, batch=[2], prompt_len=5, output_len=4, turns=1, threads=1, json_path=path
    )
    written = json.loads(path.read_text())
    (case,) = written["cases"]
    assert set(case["engines"]) == {"miniserve", "transformers"}
    for figures in case["engines"].values():
        # Of so few steps a busy machine may make less than nothing: that it was computed is what can be said.
        assert math.isfinite(figures["decode_tokens_per_s"])
        assert figures["memory"] > 0
    assert math.isfinite(case["floor_share"])
    assert written["bandwidth_bytes_per_s"] > 1e8
