"""Decode steps over numbers of ranks, as one table: `python -m benchmarks.scaling --models DIR DIR --sizes 2,4,8`.

Runs `benchmarks.decode` for each model, number of ranks and, with experts, way to share them out, one after the other,
and prints the table after each. A run that fails leaves a gap and its last line. The floor is of what one rank reads,
without sums: (weights + KV) / bandwidth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miniserve.bench.report import write_json


@dataclass(slots=True)
class Case:
    """One run of `benchmarks.decode`: its figures, or why there are none."""

    model: Path
    size: int
    by_expert: bool
    found: dict[str, Any] = field(default_factory=dict)
    failure: str = ""

    def run(self, options: list[str]) -> None:
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "found.json"
            command = [sys.executable, "-m", "benchmarks.decode", "--model", str(self.model), "--json", str(file)]
            command += ["--tensor-parallel-size", str(self.size), "--uniform-routing", *options]
            command += ["--enable-expert-parallel"] if self.by_expert else []
            ended = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if ended.returncode == 0:
                self.found = json.loads(file.read_text())
            else:
                self.failure = ended.stdout.strip().rpartition("\n")[2] or f"exit code {ended.returncode}"

    def row(self, batches: list[int]) -> str:
        cells = [self.model.name, f"{self.size}{' by expert' if self.by_expert else ''}"]
        if self.failure:
            return f"| {' | '.join(cells)} | {self.failure} |{' |' * len(batches)}"
        steps = {each["batch"]: each for each in self.found["results"]}
        cells.append(f"{self.found['start_s']:.1f}")
        for batch in batches:
            step, floor = steps[batch]["step_s"], steps[batch]["floor_s"]
            cells.append(f"{1e3 * step:.2f}" + (f" ({100 * floor / step:.0f} %)" if floor else ""))
        return f"| {' | '.join(cells)} |"


def has_experts(model: Path) -> bool:
    """By its config.json."""
    config = json.loads((model / "config.json").read_text())
    return any(name in config for name in ("num_experts", "n_routed_experts", "num_local_experts"))


def table(cases: list[Case], batches: list[int]) -> str:
    """In Markdown: ms a step, and in brackets the floor's share of it."""
    head = ["model", "ranks", "start, s", *(f"{batch} rows" for batch in batches)]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(case.row(batches) for case in cases)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, nargs="+", type=Path, help="directories with a config.json")
    parser.add_argument("--sizes", default="1,2,4,8", help="numbers of ranks, comma-separated")
    parser.add_argument("--batch", default="1,8,32,64,128", help="rows, comma-separated")
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=65)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args()
    batches = [int(each) for each in args.batch.split(",")]
    options = ["--batch", args.batch, "--device", args.device]
    options += ["--input-len", str(args.input_len), "--output-len", str(args.output_len)]
    cases: list[Case] = []
    for model in args.models:
        for size in map(int, args.sizes.split(",")):
            for by_expert in (False, True) if size > 1 and has_experts(model) else (False,):
                cases.append(Case(model, size, by_expert))
                cases[-1].run(options)
                print(table(cases, batches), end="\n\n", flush=True)
    if args.json:
        write_json(
            args.json, {"benchmark": "scaling", "runs": [case.found or {"failed": case.failure} for case in cases]}
        )


if __name__ == "__main__":
    main()
