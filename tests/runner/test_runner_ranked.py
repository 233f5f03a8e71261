"""Ranks as processes, without a model: plans on the wire, and what becomes of an engine whose ranks end or hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import msgspec
import pytest
from ranked_fakes import BUILDER, PHASES, fake_config, make_rank

from miniserve.config import EngineConfig
from miniserve.core import Chunk, DraftRun, Request, RowStart, SamplingParams, Step, StepPlan
from miniserve.runner import ranked as ranked_module
from miniserve.runner.ranked import PlanReader, RankedRunner, RankFailed, Ranks, RankStart, encode_plan

PLAN = StepPlan([], [], [], [0, 1], [])
STEADY = msgspec.structs.replace(PLAN, same_rows=True)
SILENCE = 2.0  # seconds, of ranks that are stopped; in a served model 4
SLACK = 60.0  # seconds, for a busy machine


def start_ranks(file: Path, config: EngineConfig, size: int = 3, silence: float = 10.0) -> Ranks:
    file.write_bytes(bytes(16 * size))
    config, ranks = replace(config, tensor_parallel_size=size), Ranks(silence)
    ranks.start(
        [
            RankStart(config=config, source_path=str(file), rank=rank, builder=BUILDER, parent_pid=os.getpid())
            for rank in range(1, size)
        ]
    )
    return ranks


@contextmanager
def ranked(file: Path, config: EngineConfig, size: int = 3, silence: float = 10.0) -> Iterator[RankedRunner]:
    ranks = start_ranks(file, config, size, silence)
    try:
        ranks.meet()
        yield RankedRunner(make_rank(file, 0, size, config), ranks)
    finally:
        ranks.close()
        for peer in ranks._peers:
            assert peer.process is not None and peer.process.returncode is not None, "an orphan"


def test_plans_come_out_as_they_went_in_and_steady_ones_are_short() -> None:
    params = SamplingParams(temperature=0.5, logit_bias={3: 1.0}, stop=("x",), max_tokens=3)
    start = RowStart(3, Request(request_id="a", prompt_token_ids=[1, 70_000], params=params), [5])
    plans = [
        StepPlan([1], [start], [(3, 0, [4, 5])], [], [Chunk(3, 0, [1, 70_000], True, [9])]),
        StepPlan([], [], [], list(range(256)), []),
        StepPlan([], [], [(7, 2, [9])], list(range(256)), [], same_rows=True),
        StepPlan([], [], [], [], [], [DraftRun(3, 2, [8, 9])]),
        StepPlan([], [], [], [2], []),
        StepPlan([2], [], [], [2], [], same_rows=True),
    ]
    read = PlanReader().read
    messages = [encode_plan(plan) for plan in plans]
    assert [read(message) for message in messages] == plans
    assert [len(messages[index]) for index in (1, 2, 4, 5)] == [395, 14, 10, 10]


def test_ranks_follow_every_plan_and_end_in_order(tmp_path: Path) -> None:
    with ranked(tmp_path / "device", fake_config(), size=4) as runner:
        _run(runner, PLAN)
        _run(runner, STEADY, STEADY)
        runner.check()
        ranks = runner._ranks
    assert [peer.process.returncode for peer in ranks._peers if peer.process is not None] == [0, 0, 0]


# Steps, and when in the step; blocking: whether ranks wait for each other within `launch`, as over gloo.
POINTS = [*product((1, 4), PHASES, ("", "1"))]


def test_a_rank_that_is_killed_ends_the_model(tmp_path: Path) -> None:
    _at_all_points(tmp_path, signal.SIGKILL, "rank 1 was killed by SIGKILL", silence=10.0)


def test_a_rank_that_is_stopped_ends_the_model(tmp_path: Path) -> None:
    _at_all_points(tmp_path, signal.SIGSTOP, r"rank 1 was stopped \(SIGSTOP\)", silence=SILENCE)


def _at_all_points(tmp_path: Path, number: signal.Signals, sentence: str, silence: float) -> None:
    def run(point: tuple[int, str, str]) -> None:
        step, phase, blocking = point
        config = fake_config(at=step, phase=phase, signal=int(number), rank=1, blocking=blocking)
        _fails_with(tmp_path / f"{point}", config, sentence, step, silence)

    with ThreadPoolExecutor(5) as pool:
        assert len(list(pool.map(run, POINTS))) == 12


def test_a_rank_that_raises_says_so(tmp_path: Path) -> None:
    config = fake_config(at=3, phase="before", signal="raise", rank=1)
    _fails_with(tmp_path / "device", config, "rank 1 failed: ValueError: the fake device broke", 3, 10.0)


def test_a_rank_that_hangs_ends_the_model(tmp_path: Path) -> None:
    config = fake_config(at=2, phase="before", signal="hang", rank=1)
    _fails_with(tmp_path / "device", config, "rank 1 gave no sign of life for 2 s", 2, SILENCE)


def test_a_rank_that_works_in_silence_goes_on(tmp_path: Path) -> None:
    config = fake_config(at=2, phase="before", signal="compute", rank=1)
    with ranked(tmp_path / "device", config, silence=0.5) as runner:
        for _ in range(4):
            _run(runner, PLAN)


def test_a_long_launch_is_no_hang_of_the_step_before(tmp_path: Path) -> None:
    config = fake_config(at=2, phase="before", signal="sleep", rank=0)
    with ranked(tmp_path / "device", config, silence=0.5) as runner:
        _run(runner, PLAN, PLAN)
        runner.check()


def _run(runner: RankedRunner, *plans: StepPlan) -> None:
    """Launch all, then collect all."""
    steps = [Step(plan) for plan in plans]
    for step in steps:
        runner.launch(step)
    for step in steps:
        runner.collect(step)
        assert step.token_ids == [1]


def _fails_with(file: Path, config: EngineConfig, sentence: str, step: int, silence: float) -> None:
    """In this step, or, where the rank fails when the step is done for the others, after it or in one soon behind."""
    with ranked(file, config, silence=silence) as runner, pytest.raises(RankFailed, match=sentence) as failed:
        begin = time.monotonic()
        for _ in range(step + 3):
            begin = time.monotonic()
            _run(runner, PLAN)
        while time.monotonic() < begin + silence + SLACK:  # at rest
            runner.check()
            time.sleep(0.02)
    assert time.monotonic() - begin < silence + SLACK
    number = int(str(failed.value).rpartition(" ")[2])
    assert step <= number <= step + 3


def test_a_rank_that_dies_while_it_builds_is_named(tmp_path: Path) -> None:
    config = fake_config(at=0, phase="build", signal=int(signal.SIGKILL), rank=1)
    ranks = start_ranks(tmp_path / "device", config)
    try:
        with pytest.raises(RankFailed, match=r"rank 1 was killed by SIGKILL.* while the engine started"):
            ranks.meet()
            while True:
                ranks.check()
    finally:
        ranks.close()


def test_a_start_that_waits_for_a_dead_rank_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose kernels wait for their peers while graphs are recorded."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(ranked_module, "_SILENCE_AT_WORK", 0.5)
    ranks = start_ranks(tmp_path / "device", fake_config(at=0, phase="build", signal=int(signal.SIGKILL), rank=1))
    try:
        ranks._watch.start()  # and nothing asks what it has found
        deadline = time.monotonic() + SLACK
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)
        assert codes == [1]
    finally:
        ranks.close()
