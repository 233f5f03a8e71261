"""What every benchmark records beside its figures (command, machine, time), and how it is written."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from miniserve.core import UserError

_PACKAGES = ("miniserve", "torch", "transformers", "httpx")


def header(kind: str) -> dict[str, Any]:
    """The head of a result: `kind` of benchmark, date, command and machine."""
    return {
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([_program(Path(sys.argv[0])), *_without_secrets(sys.argv[1:])]),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """CPU model, cores this process may use, load over the last minute, memory, GPUs, and versions of installed
    packages."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": _gpus(),
        "versions": versions,
    }


def _program(path: Path) -> str:
    return path.parent.name if path.name == "__main__.py" else path.name


def _without_secrets(arguments: list[str]) -> list[str]:
    hidden = []
    for previous, argument in zip(["", *arguments], arguments, strict=False):
        if previous == "--api-key":
            argument = "***"
        elif argument.startswith("--api-key="):
            argument = "--api-key=***"
        hidden.append(argument)
    return hidden


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Names of the GPUs, found without torch, which a benchmark's client does not need."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        return answer.stdout.strip().splitlines() if answer.returncode == 0 else []
    names = []
    for properties in sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        fields = dict(line.split(maxsplit=1) for line in properties.read_text().splitlines() if " " in line)
        version = int(fields.get("gfx_target_version", "0"))
        if version:
            # 90402 reads 9.4.2, whose last two places are written in hexadecimal: gfx942.
            names.append(f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}")
    return names


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Raises `UserError` where the file cannot be written."""
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror}; name another file with --json.") from error
