"""`miniserve check`: test this machine's attention paths, and compare the engine's tokens with transformers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from miniserve.cli.settings import refuse_given, with_settings
from miniserve.config import EngineConfig

_MAX_TOKENS = 32  # generated for each prompt
_MAX_NUM_SEQS = 8


@with_settings(
    only=(
        "model", "revision", "device", "dtype", "kv_layout", "kv_cache_dtype", "attention_backend", "block_size",
        "tensor_parallel_size", "enable_expert_parallel",
    ),
)  # fmt: skip
def check(
    ctx: typer.Context,
    engine: EngineConfig,
    every: Annotated[
        bool, typer.Option("--all", help="Check every backend, KV layout and KV dtype that works here.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="Write all results here: Markdown if the name ends in .md, else JSON.")
    ] = None,
    tokens: Annotated[bool, typer.Option(help="Compare the engine's tokens with those of transformers.")] = True,
) -> None:
    """Check attention at the model's shapes against known answers, and the engine's tokens against transformers.

    Exits 1 if anything is wrong.
    """
    if every:
        one = ("attention_backend", "kv_layout", "kv_cache_dtype")
        refuse_given(ctx, one, "--all checks every one that works here; leave this out, or --all.")
    # Here and not above: torch would slow down `miniserve --help`.
    from miniserve.checks.check_paths import AttentionPath, find_machine
    from miniserve.checks.check_report import CheckReport
    from miniserve.checks.check_tokens import compare_paths

    machine = find_machine(engine)
    if every:
        paths = list(machine.paths())
    else:
        choice = machine.choose(AttentionPath(engine.attention_backend, engine.kv_layout, engine.kv_cache_dtype))
        paths = [AttentionPath(choice.backend, choice.layout, engine.kv_cache_dtype)]
    attention = {}
    for path in paths:
        print(f"checking {path}", file=sys.stderr)
        attention[path] = machine.check(path)
    right = [path for path, results in attention.items() if results.ok]
    few = dataclasses.replace(engine, max_num_seqs=_MAX_NUM_SEQS)
    found = CheckReport(
        model=engine.model or "the built-in model",
        machine=machine,
        attention=attention,
        tokens=compare_paths(few, right, machine.device, _MAX_TOKENS) if tokens and right else None,
    )
    print("\n".join(found.lines()))
    if report is not None:
        found.write(report)
    raise typer.Exit(0 if found.ok else 1)
