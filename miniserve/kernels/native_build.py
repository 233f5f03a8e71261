"""Compiles `cpu.cpp`: plain C++ without torch's headers, so that one compiler call of a few seconds builds it, once per
source, compiler and processor; the library is kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from miniserve.config import cache_dir

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"),
    # Lets reductions vectorise; infinities and NaN keep their meaning (so not -ffast-math).
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)


class Unavailable(Exception):
    """The kernels cannot be used on this machine; `str(error)` is the reason."""


def build() -> Path:
    """The library, compiled if necessary. Raises `Unavailable`."""
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if compiler is None:
        raise Unavailable("no C++ compiler (g++ or clang++) was found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = hashlib.sha256("\0".join([*_texts(), *_FLAGS, version, _processor()]).encode()).hexdigest()[:16]
    directory = cache_dir()
    path = directory / f"cpu-{key}.so"
    if not path.exists():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _compile(compiler, path)
        except OSError as error:
            raise Unavailable(f"{directory} cannot be written: {error.strerror}") from None
    return path


def _compile(compiler: str, path: Path) -> None:
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        run = subprocess.run(
            [compiler, *_FLAGS, str(_SOURCE), "-o", temporary], capture_output=True, text=True, check=False
        )
        if run.returncode != 0:
            line = next((line for line in run.stderr.splitlines() if "error" in line), "unknown error")
            raise Unavailable(f"{Path(compiler).name} could not compile the CPU kernels: {line}")
        Path(temporary).replace(path)  # atomic: another process may be building the same file
    finally:
        Path(temporary).unlink(missing_ok=True)


def _texts() -> list[str]:
    return [path.read_text() for path in (_SOURCE, *sorted(_SOURCE.parent.glob("cpu_*.h")))]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
