"""How a test gets the stand-in `aiter`: in this process (`installed`), or in a child's (`environment`)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

STANDIN = Path(__file__).parent / "standin"


@contextmanager
def installed(metadata: Path | None = None, **device: str | int | bool) -> Iterator[ModuleType]:
    """`import aiter` finds the stand-in inside the block and nothing after it. device: arch, cu_num, version, tile_bug
    (see `aiter._standin.Device`); metadata: a directory of `write_metadata`, for another distribution version."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "aiter"}
    paths = [str(path) for path in (metadata, STANDIN) if path is not None]
    sys.path[:0] = paths
    importlib.invalidate_caches()
    try:
        module = importlib.import_module("aiter")
        for name in ("aiter.fused_moe", "aiter.ops.shuffle", "aiter.ops.triton.attention.unified_attention"):
            importlib.import_module(name)
        importlib.import_module("aiter.ops.triton.fusions.fused_kv_cache")
        with module._standin.emulate(**device):
            yield module
    finally:
        for path in paths:
            sys.path.remove(path)
        for name in [name for name in sys.modules if name.split(".")[0] == "aiter"]:
            del sys.modules[name]
        sys.modules.update(before)


def environment(
    arch: str = "gfx942",
    cu_num: int = 0,
    version: str | None = None,
    tile_bug: bool = True,
    log: Path | None = None,
    metadata: Path | None = None,
) -> dict[str, str]:
    """The environment of a child process whose `import aiter` is the stand-in on that device. Calls are appended to
    `log`, one line each: the function and its route."""
    paths = [str(path) for path in (metadata, STANDIN, STANDIN.parent) if path is not None]
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    settings = {
        "PYTHONPATH": os.pathsep.join(paths + inherited),
        "AITER_STANDIN_ARCH": arch,
        "AITER_STANDIN_CU": str(cu_num),
        "AITER_STANDIN_TILE_BUG": str(int(tile_bug)),
    }
    settings |= {"AITER_STANDIN_VERSION": version} if version else {}
    return os.environ | settings | ({"AITER_STANDIN_LOG": str(log)} if log else {})


def write_metadata(directory: Path, version: str) -> Path:
    """Distribution metadata that says `amd-aiter` is of that version, in `directory`, which is returned."""
    info = directory / f"amd_aiter-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: amd-aiter\nVersion: {version}\n")
    return directory


def read_calls(log: Path) -> list[tuple[str, str]]:
    """The calls a child process wrote: (function, route)."""
    pairs = [line.partition(" ") for line in log.read_text().splitlines()]
    return [(function, route) for function, _, route in pairs]
