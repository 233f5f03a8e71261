"""How a sweep looks: a table on the terminal, and a picture of throughput and TPOT against concurrency."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from miniserve.bench.plot import load_figure_class, save
from miniserve.bench.sweep import Point, SweepResult
from miniserve.engine.roofline import share_of_bandwidth

_COLORS = ("#4878a8", "#d07030")
_Figure = Callable[[Point], float | None]


def print_sweep(result: SweepResult) -> None:
    """tokens/s are output tokens, TPOT and TTFT medians; bandwidth: the share of the memory's that decode reached."""
    console = Console(soft_wrap=True)
    table = Table(title=result.model, title_justify="left", title_style="bold")
    columns = ("in/out", "at once", "layout", "tokens/s", "TPOT ms", "p99", "TTFT ms", "bandwidth")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in (0, 2) else "right", no_wrap=True)
    order = sorted(result.points, key=lambda p: (p.input_len, p.output_len, p.concurrency))
    for point in order:
        share = None if point.steps is None else share_of_bandwidth(point.steps.totals, point.steps.bandwidth)
        table.add_row(
            f"{point.input_len:,}/{point.output_len:,}",
            f"{point.concurrency}",
            point.layout,
            f"{point.output_tokens_per_s:,.0f}",
            "-" if point.tpot is None else f"{1000 * point.tpot.median:,.2f}",
            "-" if point.tpot is None else f"{1000 * point.tpot.p99:,.2f}",
            "-" if point.ttft is None else f"{1000 * point.ttft.median:,.0f}",
            "-" if share is None else f"{share:.0%}",
        )
    console.print(table)
    for layout, reason in result.refused.items():
        console.print(f"{layout} was not measured: {reason}", style="yellow", markup=False, highlight=False)
    for point in order:
        for error, count in point.failures.items():
            where = f"{point.layout}, {point.input_len}/{point.output_len}, {point.concurrency} at a time"
            console.print(f"{count} failed ({where}): {error}", style="red", markup=False, highlight=False)


def plot_sweep(result: SweepResult, path: Path) -> None:
    """Write a PNG: a column for each pair of lengths, output tokens/s above median TPOT, a line for each layout.

    Raises `UserError` where matplotlib is missing or the file cannot be written.
    """
    shapes = list(dict.fromkeys((point.input_len, point.output_len) for point in result.points))
    layouts = list(dict.fromkeys(point.layout for point in result.points))
    figure = load_figure_class()(figsize=(1 + 4.2 * len(shapes), 7.5), dpi=120, layout="constrained")
    rows: tuple[tuple[str, _Figure], ...] = (
        ("output tokens/s", lambda point: point.output_tokens_per_s),
        ("median TPOT, ms", lambda point: None if point.tpot is None else 1000 * point.tpot.median),
    )
    grid = figure.subplots(len(rows), len(shapes), squeeze=False)
    for (label, figure_of), line_of_axes in zip(rows, grid, strict=True):
        for (input_len, output_len), axes in zip(shapes, line_of_axes, strict=True):
            for layout, color in zip(layouts, _COLORS, strict=False):
                here = [
                    p for p in result.points if (p.layout, p.input_len, p.output_len) == (layout, input_len, output_len)
                ]
                values = [(point.concurrency, figure_of(point)) for point in here]
                shown = [(x, y) for x, y in values if y is not None]
                axes.plot([x for x, _ in shown], [y for _, y in shown], marker="o", color=color, label=layout)
            axes.set_xscale("log", base=2)
            ticks = sorted({point.concurrency for point in result.points})
            axes.set_xticks(ticks, [f"{tick}" for tick in ticks])
            axes.set_ylim(bottom=0)
            axes.set_title(f"{input_len:,} in, {output_len:,} out", fontsize=10)
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        line_of_axes[0].set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("concurrent requests")
    grid[0][0].legend(frameon=False)
    figure.suptitle(result.model, fontsize=11)
    save(figure, path)
