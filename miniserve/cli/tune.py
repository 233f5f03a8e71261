"""`miniserve tune`: measure the attention paths of this machine, and keep which are fastest for a model."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from miniserve.cli.options import parse_count
from miniserve.config import EngineConfig, tuning_dir
from miniserve.core import UserError

_ENGINE = EngineConfig()


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Hugging Face id or local directory; only its config.json is read.", show_default="the built-in model"
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Rows of a decode step.", show_default="1, 8, 64 and 256")
    ] = None,
    context: Annotated[
        int,
        typer.Option(
            "--context", help="Tokens of each row.", parser=lambda value: parse_count(str(value), "--context")
        ),
    ] = 1024,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = _ENGINE.device,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")] = _ENGINE.dtype,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="auto (the model's), bfloat16, float16, float32 or fp8.")
    ] = _ENGINE.kv_cache_dtype,
    block_size: Annotated[int, typer.Option("--block-size", help="Tokens in one KV block.")] = _ENGINE.block_size,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Time the decode attention of every backend and KV layout at the model's shapes, and prefer the fastest from then
    on: `run` and `explain` say where a measurement decided."""
    batches = batch or [1, 8, 64, 256]
    if min(*batches, context, 1) < 1:
        raise UserError("--batch and --context must be 1 or more.")
    config = EngineConfig(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
    )
    # Here and not above: torch would slow down `miniserve --help`.
    from miniserve.bench.check_paths import find_machine
    from miniserve.bench.tune import fault, rank, time_path
    from miniserve.runner.tuning import save_table, table_path

    machine = find_machine(config)
    if machine.platform.emulated:
        raise UserError(f"--device {device} is emulated on a CPU: its times would say nothing of a GPU.")
    timings = []
    for path in machine.paths((kv_cache_dtype,)):
        print(f"timing {path}", file=sys.stderr)
        if (reason := fault(machine, path)) is None:
            timings.append(time_path(machine, path, batches, context))
        else:
            print(f"left out: {reason}", file=sys.stderr)
    if not timings:
        raise UserError("No attention path gives right answers here; `miniserve check MODEL --all` says more.")
    best = rank(timings)
    for timing in best:
        figures = ", ".join(f"{1e3 * seconds:.3f} ms at batch {size}" for size, seconds in timing.seconds.items())
        print(f"{timing.path.backend} over {timing.path.layout}: {figures}")
    table = table_path(tuning_dir(), machine.platform, machine.with_kv(kv_cache_dtype), block_size)
    save_table(
        table,
        [f"{timing.path.backend}:{timing.path.layout}" for timing in best],
        [timing.to_json() for timing in best],
    )
    print(f"kept in {table}")
