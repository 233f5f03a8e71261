"""Draw docs/decode.svg, the README's figure, from the table of decode steps in docs/BENCHMARKS.md: `python -m
tools.plot_decode`."""

from __future__ import annotations

import re
from pathlib import Path

from miniserve.bench.plot import load_figure_class

DOCS = Path(__file__).parent.parent / "docs"
_ROW = re.compile(r"\| (?P<model>\S+) \| (?P<batch>\d+) × 1024 \| [\d.]+ \| [\d.]+[^|]*\| (?P<ratio>[\d.]+) \|")


def read_ratios(text: str) -> dict[str, dict[int, float]]:
    """By model and batch, how many times as fast as the peer a decode step was."""
    ratios: dict[str, dict[int, float]] = {}
    for row in _ROW.finditer(text):
        ratios.setdefault(row["model"], {})[int(row["batch"])] = float(row["ratio"])
    return ratios


def main() -> None:
    ratios = read_ratios((DOCS / "BENCHMARKS.md").read_text(encoding="utf-8"))
    figure = load_figure_class()(figsize=(8.0, 3.2), layout="constrained")
    axes = figure.subplots()
    batches = sorted({batch for found in ratios.values() for batch in found})
    width = 0.8 / len(ratios)
    for number, (model, found) in enumerate(ratios.items()):
        places = [batches.index(batch) + (number - (len(ratios) - 1) / 2) * width for batch in found]
        axes.bar(places, list(found.values()), width, label=model)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("requests decoded at once, 1,024 tokens of context each")
    axes.set_ylabel("times vLLM's speed")
    axes.set_title("Decode step beside vLLM 0.26.0, one H100, bfloat16", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(DOCS / "decode.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
