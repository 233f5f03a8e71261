"""Pictures of serving benchmarks: how latencies are distributed, and how throughput and TPOT follow concurrency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miniserve.bench.serve import ServeResult
from miniserve.bench.stats import Summary
from miniserve.bench.sweep import SweepResult
from miniserve.core import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = ("#4878a8", "#d07030")
_MARKS = ((50, "median", "#222222", "-"), (99, "p99", "#c03030", "--"))


def load_figure_class() -> Any:
    """matplotlib's Figure. Raises `UserError` where matplotlib is not installed; call it before measuring."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install 'miniserve[bench]'.") from error
    return Figure


def plot_serve(result: ServeResult, path: Path) -> None:
    """Write a PNG of three histograms side by side, in milliseconds, with median and p99 marked.

    Raises `UserError` where matplotlib is missing or the file cannot be written.
    """
    # A Figure draws without pyplot, whose backends and global state are not needed here.
    figure = load_figure_class()(figsize=(14, 4.6), dpi=120, layout="constrained")
    completed = result.completed
    panels = (
        ("TTFT (time to first token)", "requests", [record.ttft for record in completed]),
        ("TPOT (time per output token)", "requests", [record.tpot for record in completed if record.tpot is not None]),
        ("ITL (inter-token latency)", "gaps between chunks", [gap for record in completed for gap in record.itl]),
    )
    for axes, (title, counted, seconds) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        _histogram(axes, [1000 * value for value in seconds])
        axes.set_title(title, fontsize=11)
        axes.set_ylabel(counted)
    figure.suptitle(_title(result), fontsize=11)
    _save(figure, path)


def plot_sweep(result: SweepResult, path: Path) -> None:
    """Write a PNG: a column for each pair of lengths, output tokens/s above median TPOT, a line for each layout.

    Raises `UserError` where matplotlib is missing or the file cannot be written.
    """
    shapes = list(dict.fromkeys(point.shape for point in result.points))
    layouts = list(dict.fromkeys(point.layout for point in result.points))
    figure = load_figure_class()(figsize=(1 + 4.2 * len(shapes), 7.5), dpi=120, layout="constrained")
    rows: tuple[tuple[str, list[float | None]], ...] = (
        ("output tokens/s", [point.summary.throughput["output_tokens_per_s"] for point in result.points]),
        ("median TPOT, ms", [_milliseconds(point.summary.latency["tpot"]) for point in result.points]),
    )
    grid = figure.subplots(len(rows), len(shapes), squeeze=False)
    for (label, values), line_of_axes in zip(rows, grid, strict=True):
        for shape, axes in zip(shapes, line_of_axes, strict=True):
            for layout, color in zip(layouts, _COLORS, strict=False):
                line = [
                    (point.concurrency, value)
                    for point, value in zip(result.points, values, strict=True)
                    if (point.layout, point.shape) == (layout, shape) and value is not None
                ]
                axes.plot([x for x, _ in line], [y for _, y in line], marker="o", color=color, label=layout)
            axes.set_xscale("log", base=2)
            ticks = sorted({point.concurrency for point in result.points})
            axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
            axes.set_ylim(bottom=0)
            axes.set_title(f"{shape.input_len:,} in, {shape.output_len:,} out", fontsize=10)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line_of_axes[0].set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("concurrent requests")
    grid[0][0].legend(frameon=False)
    figure.suptitle(result.model, fontsize=11)
    _save(figure, path)


def _milliseconds(summary: Summary | None) -> float | None:
    return None if summary is None else 1000 * summary.median


def _save(figure: Any, path: Path) -> None:
    """Write a PNG. Raises `UserError` where the file cannot be written."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; name another file with --plot.") from error


def _title(result: ServeResult) -> str:
    config, throughput = result.config, result.summary.throughput
    load = f"{config.request_rate:g} requests/s" if config.request_rate else f"{config.concurrency} at a time"
    return (
        f"{result.model} · {len(result.completed)} requests, {load} · "
        f"{config.shape.input_len} tokens in, {config.shape.output_len} out · "
        f"{throughput['output_tokens_per_s']:,.0f} output tokens/s"
    )


def _histogram(axes: Axes, values: Sequence[float]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if not values:
        axes.text(0.5, 0.5, "no samples", ha="center", va="center", transform=axes.transAxes)
        return
    marks = np.percentile(values, [q for q, *_ in _MARKS]).tolist()
    # An outlier must not squeeze all other samples into one bar: the last bar counts what lies beyond the edge.
    edge = max(marks[1] * 1.1, marks[0] * 1.5)
    shown = [min(value, edge) for value in values]
    axes.hist(shown, bins=min(60, max(10, len(shown) // 4)), color=_COLORS[0])
    axes.set_xlim(left=0)
    for value, (_, label, color, style) in zip(marks, _MARKS, strict=True):
        axes.axvline(value, color=color, linestyle=style, linewidth=1.2, label=f"{label} {value:,.2f} ms")
    beyond = sum(value > edge for value in values)
    axes.set_xlabel(f"milliseconds ({beyond} beyond, up to {max(values):,.1f})" if beyond else "milliseconds")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
