"""`miniserve bench`: measure a server from outside, or the engine from inside."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from miniserve.bench.workload import ServeConfig, Shape
from miniserve.cli.settings import parse_count, refuse_given, with_settings
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.server.config import check_api_key

app = typer.Typer(no_args_is_help=True, help="Measure a server from outside, or the engine from inside.")


def _writable(path: Path | None) -> Path | None:
    """Checked before measuring: a file that cannot be written would cost the whole measurement."""
    if path is not None and (
        path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK)
    ):
        raise UserError(f"Cannot write {path}; name another file.")
    return path


JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write settings, machine and all results here.", callback=_writable)
]
PlotPath = Annotated[Path | None, typer.Option("--plot", help="Write a PNG of the figures here.", callback=_writable)]


@app.command()
@with_settings()
def serve(shape: Shape, load: ServeConfig, json: JsonPath = None, plot: PlotPath = None) -> None:
    """Send random prompts to any OpenAI-compatible server; measure TTFT, TPOT, ITL and throughput as its clients do.

    Exits 1 if a request fails.
    """
    from miniserve.bench import display
    from miniserve.bench import plot as plotting
    from miniserve.bench.report import write_json

    if plot is not None:
        plotting.load_figure_class()
    result = display.run_with_progress(replace(load, shape=shape))
    display.print_serve(result)
    if json is not None:
        write_json(json, result.to_json())
    if plot is not None and result.completed:
        plotting.plot_serve(result, plot)
    if result.summary.failures:
        raise typer.Exit(1)


@app.command()
@with_settings(without=("log_level", "log_format"))
def sweep(
    ctx: typer.Context,
    engine: EngineConfig,
    url: Annotated[str | None, typer.Option(help="Measure this running server instead of starting one.")] = None,
    served_model: Annotated[str | None, typer.Option(help="Model name on that server.")] = None,
    api_key: Annotated[str | None, typer.Option(help="API key of that server.", callback=check_api_key)] = None,
    lengths: Annotated[
        str, typer.Option(help="Pairs of prompt and output length in tokens; 1k is 1000, 1K is 1024.")
    ] = "1K/1K,1K/8K,8K/1K",
    concurrency: Annotated[str, typer.Option(help="Requests kept in flight; one measurement each.")] = "8,16,32,64,128",
    rounds: Annotated[
        int, typer.Option(help="Requests that each concurrent client sends, one after another; 4 a point at least.")
    ] = 2,
    timeout: Annotated[float, typer.Option(help="Fail a request after so many seconds without a byte.")] = 600.0,
    json: JsonPath = None,
    plot: PlotPath = None,
) -> None:
    """Measure throughput and TPOT over lengths × concurrency × KV layout; --kv-layout auto measures each layout.

    Starts a server for each layout, unless --url names a running one. Exits 1 if a request fails, or a point.
    """
    from miniserve.bench import display
    from miniserve.bench import plot as plotting
    from miniserve.bench import sweep as sweeping
    from miniserve.bench.report import write_json

    if url is not None:
        names = {each.name for each in fields(EngineConfig)} - {"seed"}
        refuse_given(ctx, names, "--url names a running server, which has its own; leave this out.")
    if plot is not None:
        plotting.load_figure_class()
    config = sweeping.SweepConfig(
        engine=engine,
        url=url,
        model=served_model,
        api_key=api_key,
        shapes=_shapes(lengths),
        concurrencies=[parse_count(part, "--concurrency") for part in concurrency.split(",")],
        rounds=rounds,
        timeout=timeout,
    )

    for result in sweeping.sweep(config, lambda text: typer.echo(text, err=True)):
        if json is not None:  # after every point: a sweep may take hours
            write_json(json, result.to_json())
    display.print_sweep(result)
    if plot is not None:
        plotting.plot_sweep(result, plot)
    if result.failed:
        raise typer.Exit(1)


def _shapes(lengths: str) -> list[Shape]:
    shapes = []
    for pair in lengths.split(","):
        input_len, slash, output_len = pair.partition("/")
        if not slash:
            raise UserError(f"--lengths takes pairs such as 1K/1K,8K/1K, not {pair!r}.")
        shapes.append(
            Shape(input_len=parse_count(input_len, "--lengths"), output_len=parse_count(output_len, "--lengths"))
        )
    return shapes


@app.command()
@with_settings(without=("log_level", "log_format", "range_ratio", "data_parallel_size"))
def latency(
    engine: EngineConfig,
    shape: Shape,
    batch_size: Annotated[int, typer.Option(help="Prompts in a batch.")] = 1,
    warmup: Annotated[int, typer.Option(help="Unmeasured batches to run first.")] = 1,
    repeats: Annotated[int, typer.Option(help="Batches to measure.")] = 5,
    json: JsonPath = None,
) -> None:
    """Time one batch in this process, without HTTP: the whole batch, and one decode step (TPOT)."""
    from miniserve.bench import display, offline
    from miniserve.bench.report import write_json

    llm = offline.open_engine(engine)
    result = offline.measure_latency(
        llm, batch_size=batch_size, shape=shape, warmup=warmup, repeats=repeats, seed=engine.seed
    )
    display.print_latency(result, llm.info)
    if json is not None:
        write_json(json, result.to_json(llm.info))


@app.command()
@with_settings(without=("log_level", "log_format", "data_parallel_size"))
def throughput(
    engine: EngineConfig,
    shape: Shape,
    num_prompts: Annotated[int, typer.Option(help="Prompts, all submitted at once.")] = 200,
    json: JsonPath = None,
) -> None:
    """Measure tokens per second over many prompts in this process, without HTTP."""
    from miniserve.bench import display, offline
    from miniserve.bench.report import write_json

    llm = offline.open_engine(engine)
    result = offline.measure_throughput(llm, num_prompts=num_prompts, shape=shape, seed=engine.seed)
    display.print_throughput(result, llm.info)
    if json is not None:
        write_json(json, result.to_json(llm.info))
