"""Ranks without a model or torch. Their device is a file: a step is done when every rank has entered its number there,
as if all had summed something. In `blocking` mode ranks wait for that within `launch`, as gloo does.

What goes wrong is said by the model's name: `at=STEP&phase=…&signal=…&rank=…`, by which that rank signals itself.
Steps count from 1; before the first are the phases of `build_rank`. A plan without rows or chunks is no step.
"""

from __future__ import annotations

import ctypes
import os
import struct
import time
from pathlib import Path
from urllib.parse import parse_qs

from miniserve.config import EngineConfig
from miniserve.core import Step, StepPlan, TokenMasks
from miniserve.parallel.link import PeerLost
from miniserve.runner.ranked import Progress, RankStart

BUILDER = "ranked_fakes:build_rank"
PHASES = ("before", "after", "collect")
TO_LOAD = 1000  # bytes of each rank


class FakeRank:
    def __init__(self, file: Path, rank: int, size: int, options: dict[str, str]) -> None:
        self._file, self._rank, self._size, self._options = os.open(file, os.O_RDWR), rank, size, options
        self._step = 0
        self.plans: list[StepPlan] = []
        os.pwrite(self._file, struct.pack("q", os.getpid()), 8 * (size + rank))
        self.fail("build")

    def launch(self, step: Step) -> None:
        if not step.plan.num_tokens:
            step.on_device = self._step
            self.fail("abort")
            return
        self._step += 1
        step.on_device = self._step
        self.fail("before")
        self.plans.append(step.plan)
        os.pwrite(self._file, struct.pack("q", self._step), 8 * self._rank)
        while self._options.get("blocking") and not self.is_done(step):
            for pid in self._read(self._size):
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    raise PeerLost("connection closed by peer") from None
            time.sleep(0.001)
        self.fail("after")

    def sample(self, step: Step, masks: TokenMasks) -> None:
        self.fail("sample")

    def is_done(self, step: Step) -> bool:
        return min(self._read(0)) >= int(step.on_device)

    def collect(self, step: Step) -> None:
        self.fail("collect", step.on_device)
        step.token_ids = [1]

    def check(self) -> None:
        pass

    def _read(self, start: int) -> tuple[int, ...]:
        return struct.unpack(f"{self._size}q", os.pread(self._file, 8 * self._size, 8 * start))

    def __del__(self) -> None:
        self.fail("end")

    def fail(self, phase: str, step: object = None) -> None:
        """Where this is the point at which it shall."""
        options, point = self._options, (f"{self._rank}", f"{step or self._step}", phase)
        if (options.get("rank"), options.get("at"), options.get("phase")) != point:
            return
        if options["signal"] == "raise":
            raise ValueError("the fake device broke")
        if options["signal"] == "compute":
            sum(range(10**8))  # seconds, in which no other thread of this process gets the interpreter
            return
        if options["signal"] == "sleep":
            time.sleep(1.5)
            return
        if options["signal"] == "hang":
            ctypes.PyDLL(None).sleep(100)  # which keeps the interpreter, too
        os.kill(os.getpid(), int(options["signal"]))


def fake_config(**options: object) -> EngineConfig:
    return EngineConfig(model="&".join(f"{name}={value}" for name, value in options.items()) or "fake=1")


def make_rank(file: Path, rank: int, size: int, config: EngineConfig) -> FakeRank:
    return FakeRank(file, rank, size, {name: values[-1] for name, values in parse_qs(config.model or "").items()})


def build_rank(start: RankStart, report: Progress) -> FakeRank:
    rank = make_rank(Path(start.source_path), start.rank, start.config.tensor_parallel_size or 1, start.config)
    for done in range(0, TO_LOAD + 1, TO_LOAD // 10):
        if done == TO_LOAD // 2:
            rank.fail("load")
        report("weights", done, TO_LOAD)
    report("decode graphs", 0, 1)
    rank.fail("capture")
    return rank
