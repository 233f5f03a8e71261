"""`miniserve check`: try the attention paths of this machine, and the engine beside transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from miniserve.config import EngineConfig

_ENGINE = EngineConfig()
_MAX_TOKENS = 32  # generated for each prompt
_MAX_NUM_SEQS = 8


def check(
    model: Annotated[
        str | None, typer.Argument(help="Hugging Face id or local directory.", show_default="the built-in model")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every backend, KV layout and KV dtype that there can be here.")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write all results here: JSON, or Markdown where it ends in .md.")
    ] = None,
    tokens: Annotated[
        bool, typer.Option("--tokens/--no-tokens", help="Compare the engine's tokens with those of transformers.")
    ] = True,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = _ENGINE.device,
    dtype: Annotated[str, typer.Option("--dtype", help="auto, bfloat16, float16 or float32.")] = _ENGINE.dtype,
    kv_layout: Annotated[
        str, typer.Option("--kv-layout", help="linear, shuffled, latent or auto.")
    ] = _ENGINE.kv_layout,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", help="auto (the model's), bfloat16, float16, float32 or fp8.")
    ] = _ENGINE.kv_cache_dtype,
    attention_backend: Annotated[
        str, typer.Option("--attention-backend", help="auto, or the name of one.")
    ] = _ENGINE.attention_backend,
    block_size: Annotated[int, typer.Option("--block-size", help="Tokens in one KV block.")] = _ENGINE.block_size,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Try attention on problems with known answers, at the model's shapes, and the engine's tokens beside transformers.

    Exits 1 where something is wrong.
    """
    config = EngineConfig(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        kv_layout=kv_layout,
        kv_cache_dtype=kv_cache_dtype,
        attention_backend=attention_backend,
        block_size=block_size,
        max_num_seqs=_MAX_NUM_SEQS,
    )
    # Here and not above: torch would slow down `miniserve --help`.
    from miniserve.bench.check_paths import AttentionPath, find_machine
    from miniserve.bench.check_report import CheckReport
    from miniserve.bench.check_tokens import compare_paths

    machine = find_machine(config)
    if every:
        paths = list(machine.paths())
    else:
        choice = machine.choose(attention_backend, kv_layout, kv_cache_dtype)
        paths = [AttentionPath(choice.backend, choice.layout, kv_cache_dtype)]
    attention = {}
    for path in paths:
        print(f"checking {path}", file=sys.stderr)
        attention[path] = machine.check(path)
    right = [path for path, results in attention.items() if results.ok]
    found = CheckReport(
        model=model or "the built-in model",
        machine=machine,
        attention=attention,
        tokens=compare_paths(config, right, machine.device, _MAX_TOKENS) if tokens and right else None,
    )
    print("\n".join(found.lines()))
    if report is not None:
        found.write(report)
    raise typer.Exit(0 if found.ok else 1)
