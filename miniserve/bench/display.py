"""How results look on a terminal. Tables go to stdout, progress to stderr (and only to a terminal)."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from miniserve.bench import offline, serve
from miniserve.bench.decode_steps import DecodeSteps
from miniserve.bench.stats import Summary
from miniserve.bench.sweep import SweepResult, place
from miniserve.bench.workload import ServeConfig
from miniserve.core import EngineInfo
from miniserve.engine.roofline import share_of_bandwidth

BUSY_CLIENT = 0.8
_WIDEST = 200  # characters of a table's line


def run_with_progress(config: ServeConfig) -> serve.ServeResult:
    """`serve.run` beneath a progress bar."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), refresh_per_second=2) as progress:
        task = progress.add_task("requests", total=config.num_prompts)

        return serve.run(config, lambda _: progress.advance(task))


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)


def _latency_table(title: str, summaries: dict[str, Summary | None], labels: dict[str, str]) -> Table:
    """Seconds in, milliseconds shown; a dash where there were no samples."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("milliseconds")
    columns = ("mean", "median", "p90", "p99")
    for column in columns:
        table.add_column(column, justify="right")
    for key, label in labels.items():
        summary = summaries[key]
        table.add_row(label, *("-" if summary is None else f"{1000 * getattr(summary, c):,.2f}" for c in columns))
    return table


def print_serve(result: serve.ServeResult) -> None:
    console, summary = _console(), result.summary
    console.print(
        f"{result.model} at {result.config.root}: {summary.completed} of {len(result.records)} requests completed "
        f"in {summary.duration:.2f} s\n{_rates(summary.throughput)}"
    )
    labels = {
        "ttft": "TTFT (first token)",
        "tpot": "TPOT (per token after it)",
        "itl": "ITL (between chunks)",
        "e2e": "E2E (whole request)",
    }
    console.print(_latency_table("Latency", summary.latency, labels))
    _print_steps(console, summary.steps, summary.duration)
    for error, count in summary.failures.items():
        console.print(f"{count} failed: {error}", style="red", markup=False)
    if summary.client_cpu > BUSY_CLIENT:
        console.print(
            f"This client used {summary.client_cpu:.0%} of a core, so it may have limited the measurement. "
            "Run several clients, each with a share of the load.",
            style="yellow",
        )


def print_sweep(result: SweepResult) -> None:
    """tokens/s are output tokens, TPOT and TTFT medians; decode, mixed, prefill, waiting: shares of the time;
    bandwidth: the share of the memory's bandwidth that decode reached."""
    console = _console()
    table = Table(title=result.model, title_justify="left", title_style="bold")
    kinds = ("decode", "mixed", "prefill", "waiting")
    measured = ("tokens/s", "TPOT ms", "p99", "TTFT ms", *kinds, "bandwidth")
    for column in ("in/out", "at once", "layout", *measured):
        table.add_column(column, justify="left" if column in ("in/out", "layout") else "right", no_wrap=True)
    order = sorted(result.points, key=lambda p: (p.shape.input_len, p.shape.output_len, p.concurrency))
    for point in order:
        steps, tpot, ttft = point.summary.steps, point.summary.latency["tpot"], point.summary.latency["ttft"]
        share = steps and share_of_bandwidth(steps.totals, steps.bandwidth)
        shares = {} if steps is None else steps.shares(point.summary.duration)
        table.add_row(
            f"{point.shape.input_len:,}/{point.shape.output_len:,}",
            f"{point.concurrency}",
            point.layout,
            f"{point.summary.throughput['output_tokens_per_s']:,.0f}",
            "-" if tpot is None else f"{1000 * tpot.median:,.2f}",
            "-" if tpot is None else f"{1000 * tpot.p99:,.2f}",
            "-" if ttft is None else f"{1000 * ttft.median:,.0f}",
            *(f"{shares[kind]:.0%}" if shares else "-" for kind in kinds),
            "-" if share is None else f"{share:.0%}",
        )
    needed = console.measure(table, options=console.options.update(width=_WIDEST)).maximum
    console.width = max(console.width, needed)  # a narrower terminal wraps the lines; cut figures would be wrong ones
    console.print(table)
    for layout, reason in result.refused.items():
        console.print(f"{layout} was not measured: {reason}", style="yellow", markup=False)
    for where, reason in result.missed.items():
        console.print(f"not measured ({where}): {reason}", style="red", markup=False)
    for point in order:
        for error, count in point.summary.failures.items():
            where = place(point.layout, point.shape, point.concurrency)
            console.print(f"{count} failed ({where}): {error}", style="red", markup=False)


def print_latency(result: offline.LatencyResult, info: EngineInfo) -> None:
    console = _console()
    labels = {"whole": "whole batch", "first": "first tokens (prefill)", "step": "decode step (TPOT)"}
    title = (
        f"{info.model} ({info.dtype}, {info.device}): batch {result.batch_size}, "
        f"{result.input_len} tokens in, {result.output_len} out, {len(result.whole)} times"
    )
    console.print(_latency_table(title, result.summaries(), labels))
    if result.decode_tokens_per_s is not None:
        console.print(f"{result.decode_tokens_per_s:,.1f} decode tokens/s (median)")
    _print_steps(console, result.steps)


def print_throughput(result: offline.ThroughputResult, info: EngineInfo) -> None:
    console, rates = _console(), result.rates()
    console.print(
        f"{info.model} ({info.dtype}, {info.device}): {result.num_prompts} prompts in {result.duration:.2f} s\n"
        f"{_rates(rates)} · {rates['total_tokens_per_s']:,.0f} tokens/s in total"
    )
    _print_steps(console, result.steps, result.duration)


def _rates(throughput: dict[str, float]) -> str:
    return (
        f"{throughput['requests_per_s']:,.2f} requests/s · {throughput['input_tokens_per_s']:,.0f} input tokens/s · "
        f"{throughput['output_tokens_per_s']:,.0f} output tokens/s"
    )


def _print_steps(console: Console, steps: DecodeSteps | None, duration: float | None = None) -> None:
    """duration: in seconds, of which the steps' kinds have their shares."""
    if steps is None:
        return
    if duration is not None:
        shares = " · ".join(f"{name} {share:.0%}" for name, share in steps.shares(duration).items())
        console.print(f"time: {shares}")
    if steps.line is not None:
        console.print(f"decode: {steps.line}")
