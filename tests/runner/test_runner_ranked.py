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
from urllib.parse import parse_qs

import msgspec
import pytest
from ranked_fakes import BUILDER, PHASES, TO_LOAD, fake_config, make_rank

from miniserve.config import EngineConfig
from miniserve.core import Chunk, DraftRun, Request, RowStart, SamplingParams, Step, StepPlan, TokenMasks
from miniserve.runner import ranked as ranked_module
from miniserve.runner.ranked import Loading, PlanReader, RankedRunner, RankFailed, Ranks, RankStart, encode_plan

PLAN = StepPlan([], [], [], [0, 1], [])
MASKED = StepPlan([], [], [], [0, 1], [], masked=[0])
STOPS = StepPlan([0], [], [], [], [])
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
        _all_ended(ranks)


def _all_ended(ranks: Ranks) -> None:
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


# Step and when in it, 0: while it starts; and whether ranks wait for each other within `launch`, as over gloo. "rest":
# between two steps, "end": when it has been told to end.
POINTS = [
    *product((0,), ("build", "load", "capture"), ("",)),
    *product((1, 4), PHASES, ("", "1")),
    *product((2,), ("sample",), ("", "1")),
    *product((2,), ("abort", "rest", "end"), ("",)),
]


def test_a_rank_that_is_killed_ends_the_model(tmp_path: Path) -> None:
    _at_all_points(tmp_path, signal.SIGKILL, "rank 1 was killed by SIGKILL", silence=10.0)


def test_a_rank_that_is_stopped_ends_the_model(tmp_path: Path) -> None:
    _at_all_points(tmp_path, signal.SIGSTOP, r"rank 1 was stopped \(SIGSTOP\)", silence=SILENCE)


def _at_all_points(tmp_path: Path, number: signal.Signals, sentence: str, silence: float) -> None:
    def run(point: tuple[int, str, str]) -> None:
        step, phase, blocking = point
        config = fake_config(at=step, phase=phase, signal=int(number), rank=1, blocking=blocking)
        file = tmp_path / f"{point}"
        if step == 0:
            _fails_to_start(file, config, sentence, silence)
        elif phase == "end":
            _ends(file, config, step, silence)
        else:
            _fails_with(file, config, sentence, step, silence, MASKED if phase == "sample" else PLAN, phase)

    with ThreadPoolExecutor(5) as pool:
        assert len(list(pool.map(run, POINTS))) == 20


def _fails_to_start(file: Path, config: EngineConfig, sentence: str, silence: float) -> None:
    ranks = start_ranks(file, config, silence=silence)
    begin = time.monotonic()
    try:
        with pytest.raises(RankFailed, match=f"{sentence}.* while the engine started"):
            ranks.meet()
            while time.monotonic() < begin + silence + SLACK:
                ranks.check()
                time.sleep(0.02)
    finally:
        ranks.close()
    _all_ended(ranks)


def _ends(file: Path, config: EngineConfig, steps: int, silence: float) -> None:
    """A rank that fails when it is told to end fails nobody, and is not left."""
    with ranked(file, config, silence=silence) as runner:
        _run(runner, *[PLAN] * steps)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5.0 + SLACK


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
        if step.plan.masked:
            runner.sample(step, TokenMasks([0], bytearray(4)))
    for step in steps:
        runner.collect(step)
        assert step.token_ids == [1]


def _fails_with(
    file: Path,
    config: EngineConfig,
    sentence: str,
    step: int,
    silence: float,
    plan: StepPlan = PLAN,
    phase: str = "",
) -> None:
    """In this step, or, where the rank fails when the step is done for the others, after it or in one soon behind."""
    with ranked(file, config, silence=silence) as runner, pytest.raises(RankFailed, match=sentence) as failed:
        begin = time.monotonic()
        for number in range(1, step + 4):
            begin = time.monotonic()
            _run(runner, plan)
            if number == step and phase == "abort":
                _run(runner, STOPS)
            elif number == step and phase == "rest":
                (first, *_) = runner._ranks._peers
                assert first.process is not None
                first.process.send_signal(int(parse_qs(config.model or "")["signal"][0]))
                break
        while time.monotonic() < begin + silence + SLACK:  # at rest
            runner.check()
            time.sleep(0.02)
    assert time.monotonic() - begin < silence + SLACK
    number = int(str(failed.value).rpartition(" ")[2])
    assert step <= number <= step + 4


def test_progress_is_that_of_all_ranks_also_while_rank_0_waits(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    ranks = start_ranks(tmp_path / "device", fake_config())
    try:
        report = Loading(ranks, lambda *each: seen.append(each))
        ranks.meet()
        report("weights", 100, 900)
        report("weights", 900, 900)
        deadline = time.monotonic() + SLACK
        whole = 900 + 2 * TO_LOAD
        while seen[-1] != ("weights", whole, whole) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert seen[-1] == ("weights", whole, whole)
        report("decode graphs", 0, 7)
        report.end()
    finally:
        ranks.close()
    assert seen[-2:] == [("weights", whole, whole), ("decode graphs", 0, 7)]
    assert [done for what, done, _ in seen if what == "weights"] == sorted(
        done for what, done, _ in seen if what == "weights"
    )


@pytest.mark.parametrize("hangs", [True, False])
def test_a_start_that_waits_for_a_dead_rank_is_ended(
    hangs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one call, as on a GPU, whose kernels wait for their peers while graphs are recorded; or working on for long,
    without a look at the other ranks."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(ranked_module, "_GRACE" if hangs else "_GRACE_AT_START", 0.5)
    monkeypatch.setattr(ranked_module, "_GRACE_AT_START" if hangs else "_GRACE", 2 * SLACK)
    ranks = start_ranks(tmp_path / "device", fake_config(at=0, phase="build", signal=int(signal.SIGKILL), rank=1))
    try:
        ranks._watch.start()  # and nothing asks what it has found
        deadline = time.monotonic() + SLACK
        while not codes and time.monotonic() < deadline:
            time.sleep(3.0 if hangs else 0.0)
        assert codes == [1]
    finally:
        ranks.close()
