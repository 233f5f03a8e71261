"""The table of decode steps over numbers of ranks."""

from __future__ import annotations

from pathlib import Path

import miniserve
from benchmarks.scaling import Case, has_experts, table

ASSETS = Path(miniserve.__file__).parent / "assets"


def test_a_run_gives_figures_and_a_failed_one_its_last_line() -> None:
    found = {"start_s": 7.25, "results": [{"batch": 8, "step_s": 0.002, "floor_s": 0.001}]}
    found["results"] += [{"batch": 1, "step_s": 0.0005, "floor_s": None}]
    cases = [Case(ASSETS / "tiny-qwen3", 2, True, found), Case(Path("elsewhere"), 4, False)]
    cases[1].run(["--batch", "1"])
    assert "elsewhere" in cases[1].failure
    lines = table(cases, [1, 8]).splitlines()
    assert lines[0] == "| model | ranks | start, s | 1 rows | 8 rows |"
    assert lines[2] == "| tiny-qwen3 | 2 by expert | 7.2 | 0.50 | 2.00 (50 %) |"
    assert lines[3].startswith("| elsewhere | 4 | ")
    assert {line.count("|") for line in lines} == {6}


def test_models_with_experts_are_known_by_their_config() -> None:
    assert has_experts(ASSETS / "tiny-deepseek") and not has_experts(ASSETS / "tiny-qwen3")
