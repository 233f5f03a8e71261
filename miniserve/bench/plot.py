"""A picture of a serving benchmark: how TTFT, TPOT and ITL are distributed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from miniserve.bench.serve import ServeResult
from miniserve.core import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BAR = "#4878a8"
_MARKS = ((50, "median", "#222222", "-"), (99, "p99", "#c03030", "--"))
_PANELS = (
    ("TTFT", "time to first token"),
    ("TPOT", "time per output token"),
    ("ITL", "inter-token latency"),
)


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
    # A Figure of its own draws without pyplot, whose backends and global state a server has no use for.
    figure = load_figure_class()(figsize=(14, 4.6), dpi=120, layout="constrained")
    completed = result.completed
    samples = (
        [record.ttft for record in completed],
        [record.tpot for record in completed if record.tpot is not None],
        [gap for record in completed for gap in record.itl],
    )
    for axes, (name, meaning), seconds in zip(figure.subplots(1, 3), _PANELS, samples, strict=True):
        _histogram(axes, [1000 * value for value in seconds])
        axes.set_title(f"{name} ({meaning})", fontsize=11)
    figure.axes[0].set_ylabel("requests")
    figure.axes[1].set_ylabel("requests")
    figure.axes[2].set_ylabel("gaps between chunks")
    figure.suptitle(_title(result), fontsize=11)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a PNG. Raises `UserError` where the file cannot be written."""
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; name another file with --plot.") from error


def _title(result: ServeResult) -> str:
    config, throughput = result.config, result.throughput()
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
    # One straggler must not press all others into a single bar: what lies beyond the edge is counted in the last one.
    edge = max(marks[1] * 1.1, marks[0] * 1.5)
    shown = [min(value, edge) for value in values]
    axes.hist(shown, bins=min(60, max(10, len(shown) // 4)), color=_BAR)
    axes.set_xlim(left=0)
    for value, (_, label, color, style) in zip(marks, _MARKS, strict=True):
        axes.axvline(value, color=color, linestyle=style, linewidth=1.2, label=f"{label} {value:,.2f} ms")
    beyond = sum(value > edge for value in values)
    axes.set_xlabel(f"milliseconds ({beyond} beyond, up to {max(values):,.1f})" if beyond else "milliseconds")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
