"""The house's own rules: imports run downwards, and the rooms that must start fast do not load torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import miniserve

PACKAGE = Path(miniserve.__file__).parent
# From the top down; a room imports from itself and from rooms below it.
ROOMS = (
    "cli",
    "checks",
    "bench",
    "server",
    "llm",
    "engine",
    "runner",
    "scheduler",
    "models",
    "attention",
    "parallel",
    "kernels",
    "config",
    "core",
)
TORCHLESS = (
    "miniserve",
    "miniserve.cli.main",
    "miniserve.server.app",
    "miniserve.engine.template_process",
    "miniserve.scheduler.scheduler",
    "miniserve.config",
)


def imports(path: Path) -> set[str]:
    """The rooms of miniserve that a file imports from, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("miniserve.")}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_imports_only_from_below(name: str) -> None:
    files = [path for path in PACKAGE.rglob("*.py") if room(path) == name]
    assert files
    above = set(ROOMS[: ROOMS.index(name)])
    for path in files:
        assert not (imports(path) & above), path


def test_every_room_has_its_place() -> None:
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == set(ROOMS)


def test_the_picture_of_the_rooms_shows_every_import() -> None:
    """An import is an arrow of docs/ARCHITECTURE.md or follows from several; every arrow points downwards."""
    picture = (PACKAGE.parent / "docs" / "ARCHITECTURE.md").read_text().split("```mermaid")[1].split("```")[0]
    below: dict[str, set[str]] = {name: set() for name in ROOMS}
    for start, ends in re.findall(r"(\w+) --> ([\w &]+)", picture):
        below[start] |= set(ends.split(" & "))
    for name in reversed(ROOMS):
        assert below[name] <= set(ROOMS[ROOMS.index(name) + 1 :])
        below[name] |= {far for near in below[name] for far in below[near]}
    for path in PACKAGE.rglob("*.py"):
        if (name := room(path)) in ROOMS:
            assert imports(path) & set(ROOMS) <= below[name] | {name}, path


@pytest.mark.parametrize("module", TORCHLESS)
def test_torch_is_not_loaded_by(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_config_reads_the_environment() -> None:
    """Settings come in by flags; the child process is handed the environment, nothing is read from it."""
    readers = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(mark in path.read_text() for mark in ("os.getenv", "environ.get", "environ["))
    ]
    assert readers == ["config.py"]
