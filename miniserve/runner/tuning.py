"""Measurements of `miniserve tune`, saved for `select`: the paths of one kind of model on one kind of GPU, best
first."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionSpec

_FORMAT = 1


def table_path(directory: Path, platform: Platform, specs: Sequence[AttentionSpec], block_size: int) -> Path:
    """A table's file in `directory`: its name has the architecture, aiter's version, the heads and a digest of
    everything that the measurement depends on."""
    aiter = ".".join(map(str, platform.aiter_version)) if platform.aiter_version else "none"
    # A scale is computed in more than one place, each with other rounding.
    kinds = sorted(repr(dataclasses.replace(spec, scale=float(f"{spec.scale:.5g}"))) for spec in set(specs))
    digest = hashlib.sha256(json.dumps([_FORMAT, platform.compute_units, block_size, kinds]).encode()).hexdigest()[:12]
    spec = specs[0]
    heads = f"{spec.num_heads}x{spec.num_kv_heads}x{spec.head_dim}"
    return directory / f"{platform.arch}-aiter{aiter}-{heads}-{digest}.json"


def load_preferred(
    directory: Path, platform: Platform, specs: Sequence[AttentionSpec], block_size: int
) -> tuple[str, ...]:
    """What `select` takes as `preferred`: "BACKEND:layout", best first. Empty if nothing was measured."""
    if not specs:
        return ()
    try:
        table = json.loads(table_path(directory, platform, specs, block_size).read_text(encoding="utf-8"))
        return tuple(str(name) for name in table["preferred"])
    except (OSError, ValueError, KeyError, TypeError):  # a table is a cache: an unreadable one is ignored
        return ()


def save_table(path: Path, preferred: Sequence[str], measured: Sequence[object]) -> None:
    """Write a table, atomically. measured: the measurements behind it, for readers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps({"preferred": list(preferred), "measured": list(measured)}, indent=1) + "\n")
    draft.replace(path)
