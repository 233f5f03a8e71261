"""The measured order of attention paths: a file per GPU, aiter version, kinds of layers and block size."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionSpec
from miniserve.config import cache_dir
from miniserve.core import UserError


def table_path(platform: Platform, specs: Sequence[AttentionSpec], block_size: int) -> Path:
    """Where the measurement of such a model on such a platform is kept."""
    return cache_dir() / "tuning" / f"{platform.arch}-{_digest(platform, specs, block_size)}.json"


def save(
    platform: Platform, specs: Sequence[AttentionSpec], block_size: int, microseconds: Mapping[str, float]
) -> Path:
    """Keep a measurement: of "BACKEND:layout", a decode step's attention over all layers. Returns the file."""
    path = table_path(platform, specs, block_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"measured": _description(platform, specs, block_size), "microseconds": dict(microseconds)}
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def preferred(platform: Platform, specs: Sequence[AttentionSpec], block_size: int) -> tuple[str, ...]:
    """What `select` is to try first, fastest first; empty where nothing was measured. Raises `UserError` for a file
    that is none of `save`'s."""
    path = table_path(platform, specs, block_size)
    if not path.exists():
        return ()
    try:
        times = {str(name): float(time) for name, time in json.loads(path.read_text())["microseconds"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a table that `miniserve tune` wrote; delete it.") from None
    return tuple(sorted(times, key=times.__getitem__))


def _digest(platform: Platform, specs: Sequence[AttentionSpec], block_size: int) -> str:
    text = json.dumps(_description(platform, specs, block_size), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _description(platform: Platform, specs: Sequence[AttentionSpec], block_size: int) -> dict[str, object]:
    return {
        "arch": platform.arch,
        "compute_units": platform.compute_units,
        "aiter": None if platform.aiter_version is None else ".".join(map(str, platform.aiter_version)),
        "block_size": block_size,
        "layers": [{field.name: str(getattr(spec, field.name)) for field in fields(spec)} for spec in specs],
    }
