"""How results look on a terminal. Tables go to stdout, progress to stderr (and only to a terminal)."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from miniserve.bench import offline, serve
from miniserve.bench.client import RequestRecord
from miniserve.bench.decode_steps import DecodeSteps
from miniserve.bench.report import summary_row
from miniserve.bench.stats import Summary
from miniserve.core import EngineInfo

BUSY_CLIENT = 0.8


def run_with_progress(config: serve.ServeConfig) -> serve.ServeResult:
    """`serve.run` beneath a progress bar."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not sys.stderr.isatty(), refresh_per_second=2) as progress:
        task = progress.add_task("requests", total=config.num_prompts)

        def on_done(record: RequestRecord) -> None:
            progress.advance(task)

        return serve.run(config, on_done)


def latency_table(title: str, rows: list[tuple[str, Summary | None]]) -> Table:
    """Seconds in, milliseconds shown."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("milliseconds")
    for column in ("mean", "median", "p90", "p99"):
        table.add_column(column, justify="right")
    for name, summary in rows:
        table.add_row(*summary_row(name, summary, scale=1000))
    return table


def print_serve(result: serve.ServeResult) -> None:
    console = Console(soft_wrap=True)
    completed, throughput = result.completed, result.throughput()
    console.print(
        f"{result.model} at {result.config.root}: {len(completed)} of {len(result.records)} requests completed "
        f"in {result.duration:.2f} s",
        highlight=False,
    )
    console.print(
        f"{throughput['requests_per_s']:,.2f} requests/s · {throughput['input_tokens_per_s']:,.0f} input tokens/s · "
        f"{throughput['output_tokens_per_s']:,.0f} output tokens/s",
        highlight=False,
    )
    latencies = result.latencies()
    names = {
        "ttft": "TTFT (first token)",
        "tpot": "TPOT (per token after it)",
        "itl": "ITL (between chunks)",
        "e2e": "E2E (whole request)",
    }
    console.print(latency_table("Latency", [(label, latencies[key]) for key, label in names.items()]))
    _print_steps(console, result.steps)
    for error, count in result.failures.items():
        console.print(f"{count} failed: {error}", style="red", markup=False, highlight=False)
    if result.client_cpu > BUSY_CLIENT:
        console.print(
            f"This client used {result.client_cpu:.0%} of a core: it may be what was measured. "
            "Run several with a share of the load each.",
            style="yellow",
            highlight=False,
        )


def print_latency(result: offline.LatencyResult, info: EngineInfo) -> None:
    console = Console(soft_wrap=True)
    names = {"whole": "whole batch", "first": "first tokens (prefill)", "step": "decode step (TPOT)"}
    title = (
        f"{info.model} ({info.dtype}, {info.device}): batch {result.batch_size}, "
        f"{result.input_len} tokens in, {result.output_len} out, {len(result.whole)} times"
    )
    summaries = result.summaries()
    console.print(latency_table(title, [(label, summaries[key]) for key, label in names.items()]))
    if result.decode_tokens_per_s is not None:
        console.print(f"{result.decode_tokens_per_s:,.1f} decode tokens/s (median)", highlight=False)
    _print_steps(console, result.steps)


def _print_steps(console: Console, steps: DecodeSteps | None) -> None:
    if steps is not None and steps.line is not None:
        console.print(f"decode: {steps.line}", highlight=False)


def print_throughput(result: offline.ThroughputResult, info: EngineInfo) -> None:
    rates = result.rates()
    console = Console(soft_wrap=True)
    console.print(
        f"{info.model} ({info.dtype}, {info.device}): {result.num_prompts} prompts in {result.duration:.2f} s\n"
        f"{rates['requests_per_s']:,.2f} requests/s · {rates['input_tokens_per_s']:,.0f} input tokens/s · "
        f"{rates['output_tokens_per_s']:,.0f} output tokens/s · {rates['total_tokens_per_s']:,.0f} tokens/s in total",
        highlight=False,
    )
    _print_steps(console, result.steps)
