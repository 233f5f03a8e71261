"""`miniserve tune`: measure the attention paths of this machine, and save which are fastest for a model."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from miniserve.cli.settings import count, with_settings
from miniserve.config import EngineConfig, tuning_dir
from miniserve.core import UserError


@with_settings(only=("model", "revision", "device", "dtype", "kv_cache_dtype", "block_size", "tensor_parallel_size"))
def tune(
    engine: EngineConfig,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows of a decode step; may be repeated.", show_default="1, 8, 64 and 256")
    ] = None,
    context: Annotated[int, typer.Option(help="Cached tokens per row.", parser=count("--context"))] = 1024,
) -> None:
    """Time decode attention for every backend and KV layout at the model's shapes, and prefer the fastest from then on.

    `run` and `explain` say where a measurement decided. Only the model's config.json is read.
    """
    batches = batch or [1, 8, 64, 256]
    if min(*batches, context, 1) < 1:
        raise UserError("--batch and --context must be 1 or more.")
    # Here and not above: torch would slow down `miniserve --help`.
    from miniserve.checks.check_paths import find_machine
    from miniserve.checks.tune import fault, rank, time_path
    from miniserve.runner.tuning import save_table, table_path

    machine = find_machine(engine)
    timings = []
    for path in machine.paths((engine.kv_cache_dtype,)):
        print(f"timing {path}", file=sys.stderr)
        if (reason := fault(machine, path)) is None:
            timings.append(time_path(machine, path, batches, context))
        else:
            print(f"skipped: {reason}", file=sys.stderr)
    if not timings:
        raise UserError("No attention path gives correct results here; `miniserve check MODEL --all` shows why.")
    best = rank(timings)
    for timing in best:
        figures = ", ".join(f"{1e3 * seconds:.3f} ms at batch {size}" for size, seconds in timing.seconds.items())
        print(f"{timing.path.backend} over {timing.path.layout}: {figures}")
    choice = machine.choose(best[0].path)
    table = table_path(tuning_dir(), choice.platform, choice.specs, choice.block_size)
    save_table(
        table,
        [f"{timing.path.backend}:{timing.path.layout}" for timing in best],
        [asdict(timing) for timing in best],
    )
    print(f"saved to {table}")
