"""The stand-in as the engine finds it; held-out problems for the built-in model, and whether answers are right."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

from aiter_standin import installed
from emulation import emulated_gpu

from miniserve.attention import aiter
from tools.tiny_data import Problem, completion_prompt, problems

STOP = ["\n\n", "Question:"]
MAX_TOKENS = 100


@contextmanager
def stand_in(arch: str, cu_num: int) -> Iterator[ModuleType]:
    """Inside the block the engine's aiter is a fresh stand-in for an `arch` with cu_num compute units, and the CPU is
    that GPU to it."""
    load = aiter.load
    load.cache_clear()
    try:
        with installed(arch=arch, cu_num=cu_num) as module, emulated_gpu():
            yield module
    finally:
        load.cache_clear()


def prompts_of(count: int) -> tuple[list[str], list[Problem]]:
    """Prompts of 20 to 330 tokens: each problem after none to three solved ones."""
    solved = [f"{completion_prompt(problem)} {problem.answer}\n\n" for problem in problems("train", 0, 40)]
    asked = list(problems("test", 0, count))
    shots = ["".join(solved[3 * i % 30 : 3 * i % 30 + i % 4]) for i in range(count)]
    return [shot + completion_prompt(problem) for shot, problem in zip(shots, asked, strict=True)], asked


def score(texts: Sequence[str], asked: Sequence[Problem]) -> float:
    """The fraction whose number after #### is right."""
    found = [re.search(r"#### (-?\d+)", text) for text in texts]
    return sum(m is not None and m[1] == p.final for m, p in zip(found, asked, strict=True)) / len(asked)
