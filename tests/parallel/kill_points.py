"""Real ranks over gloo, one of which is killed or stopped at a point of its life: `python kill_points.py` tries all
points with both signals, some minutes, `python kill_points.py KILL:sums` one. A line each: how long after the signal
rank 0 raised, and what. Exits 1 where it took more than 5 s, or a process is left.

With `KILL_ON=cuda` the ranks share one GPU; then one point at a time, and rank 0 may end itself with the sentence."""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from one_gpu import share_one_gpu

import miniserve
from miniserve.core import Grammar, Request, Runner, SamplingParams
from miniserve.llm import LLM
from miniserve.runner import ranks
from miniserve.runner.ranked import Progress, RankFailed, RankStart

ASSETS = Path(miniserve.__file__).parent / "assets"
LIMIT = 5.0  # seconds
_DEVICE = os.environ.get("KILL_ON", "cpu")
_GROUP, _RUNNER = "miniserve.parallel.distributed:DistributedGroup", "miniserve.runner.runner:ModelRunner"
_SAMPLER = "miniserve.runner.sampler"
# What the rank is about to call, and for which time, counted from the first step on if "steps" is said.
POINTS = {
    "meeting": f"{_GROUP}.__init__ 1",
    "settling": f"{_GROUP}.exchange 3",
    "reading": "miniserve.models.tensor_reader:TensorReader.copy 7",
    "packing": "miniserve.models.layers.linear:Linear.finish 3",
    "checking": "miniserve.runner.build:check_backend 1",
    "first-launch": f"{_RUNNER}.launch 1 steps",
    "prefill": f"{_GROUP}.reduce 1 steps",
    "prefill-sums": f"{_GROUP}.reduce 3 steps",
    "decode-sums": f"{_GROUP}.reduce 40 steps",
    "capture": "miniserve.runner.decode_graph:DecodeGraphs._run 5",
    "launch": f"{_RUNNER}.launch 6 steps",
    "logits": f"{_GROUP}.rows 1 steps",
    "logits-later": f"{_GROUP}.rows 5 steps",
    "tokens": f"{_SAMPLER}:gather_rows 2 steps",
    "greedy": f"{_SAMPLER}:best_of_ranks 2 steps",
    "sampling": f"{_SAMPLER}:Sampler.sample 3 steps",
    "masks": f"{_RUNNER}.sample 2 steps",
    "collect": f"{_RUNNER}.collect 3 steps",
    "abort": f"{_SAMPLER}:Sampler.stop_row 4 steps",
    "waiting": "miniserve.parallel.link:Link.receive 9 steps",
    "end": "",
}
_PROMPTS = ["Once upon a time", "The capital of France is", "def f(x):"]
_PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=12, logprobs=1, ignore_eos=True),
    SamplingParams(temperature=0.8, seed=3, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, max_tokens=12, grammar=Grammar("regex", "[a-z ]{8,30}")),
]
_GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def build_rank(start: RankStart, progress: Progress) -> Runner:
    """Of rank 1, which signals itself at the point in `$KILL_POINT` and says when in `$KILL_FILE`."""
    if _DEVICE == "cuda":
        share_one_gpu()
    name, number = os.environ["KILL_POINT"], int(os.environ["KILL_SIGNAL"])

    def strike() -> None:
        Path(os.environ["KILL_FILE"]).write_text(str(time.monotonic()))
        os.kill(os.getpid(), number)

    if name == "end":
        atexit.register(strike)
    else:
        _call_at(POINTS[name], strike)
    return ranks.build_rank(start, progress)


def _call_at(point: str, strike: Callable[[], None]) -> None:
    where, time_of, *steps = point.split()
    calls = 0
    counting = not steps

    def count(step: bool) -> None:
        nonlocal calls, counting
        counting = counting or step
        calls += counting and step == ("ModelRunner.launch" in where)
        if calls == int(time_of):
            strike()

    if steps:
        _wrap(f"{_RUNNER}.launch", lambda: count(True))
    if "ModelRunner.launch" not in where:
        _wrap(where, lambda: count(False))


def _wrap(where: str, before: Callable[[], None]) -> None:
    module, _, path = where.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    call = getattr(owner, name)

    def wrapped(*args: Any, **named: Any) -> Any:
        before()
        return call(*args, **named)

    setattr(owner, name, wrapped)


def run(point: str, number: signal.Signals) -> tuple[float, str]:
    """Seconds from the signal to the error of a model of two ranks, and what it says; "" where it ended in order."""
    said = ""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "struck"
        os.environ |= {"KILL_POINT": point, "KILL_SIGNAL": str(int(number)), "KILL_FILE": str(file)}
        if _DEVICE == "cuda":
            share_one_gpu()
        ranks._BUILDER = "kill_points:build_rank"
        try:
            _use_model()
            gc.collect()
        except RankFailed as error:
            said = str(error)
        return time.monotonic() - float(file.read_text()), said


def _use_model() -> None:
    settings = {"device": _DEVICE, "dtype": "float32", "max_model_len": 128, "max_num_seqs": 4}
    settings["kv_cache_memory"] = 16 << 20
    llm = LLM(ASSETS / "tiny-qwen3", progress=False, tensor_parallel_size=2, **settings)
    llm.generate(_PROMPTS, _PARAMS, progress=False)
    llm.generate(_PROMPTS, _GREEDY, progress=False)
    loop = llm._loop
    for name in "ab":  # the first is aborted in the midst of its answer
        loop.add(Request(request_id=name, prompt_token_ids=[5, 6, 7], params=_GREEDY))
        loop.step()
        loop.step()
        loop.abort([name])
    while loop.has_work:
        loop.step()


def left_over() -> list[int]:
    """Ranks of this process that still run."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"runner.worker" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):
            continue
    return found


def main(chosen: list[str]) -> int:
    worst, wrong = 0.0, 0
    here = [point for point in POINTS if point != "capture" or _DEVICE == "cuda"]
    for name in chosen or [f"{kind}:{point}" for kind in ("KILL", "STOP") for point in here]:
        kind, _, point = name.partition(":")
        seconds, said = run(point, signal.Signals[f"SIG{kind}"])
        right = seconds <= LIMIT and not left_over() and (("rank 1 was" in said) != (point == "end"))
        worst, wrong = max(worst, seconds), wrong + (not right)
        print(f"{'ok  ' if right else 'BAD '} {name}: {seconds:.2f} s: {said or 'ended in order'}", flush=True)
    print(f"the longest took {worst:.2f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
