"""`miniserve doctor`: what this machine can run, what it lacks, and the command that brings it."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from miniserve.config import EngineConfig, cache_dir
from miniserve.core import UserError

_FEW_FILES = 4096  # connections, and some
_LITTLE_DISK = 1 << 30  # bytes
_SHARE = 0.7  # of memory that weights may take beside the KV cache


@dataclass(frozen=True, slots=True)
class Finding:
    """state: `ok`; `note`: it works, but less well; `lack`: it does not. `remedy`: a command, or what to do."""

    state: Literal["ok", "note", "lack"]
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.state:5} {self.text}" + (f"\n      -> {self.remedy}" if self.remedy else "")


def examine() -> Iterator[Finding]:
    """What there is to say, as it is found."""
    yield Finding("ok", f"Python {platform.python_version()}, {platform.system()} on {platform.machine()}")
    if find_spec("torch") is None:
        yield Finding("lack", "PyTorch is not installed", "pip install 'torch>=2.11,<2.14'")
        return
    import torch

    if torch.cuda.is_available():
        yield from _gpus()
    else:
        yield from _no_gpu()
    yield from _cpu()
    yield from _attention()
    yield from _system()


def _gpus() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("ok", f"GPU {index}: {name}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free); {_fits(total)}")
    if find_spec("triton") is None:
        yield Finding("lack", "Triton, which compiles the GPU kernels, is not installed", "pip install triton")
    if torch.version.hip is not None:
        if find_spec("aiter") is None:
            yield Finding("note", "aiter is not installed: AMD's own kernels are not used", "see docs/ROCM.md")
        else:
            yield Finding("ok", "aiter is installed")


def _no_gpu() -> Iterator[Finding]:
    import torch

    if Path("/dev/kfd").exists() and torch.version.hip is None:
        index = "https://download.pytorch.org/whl/rocm7.2"
        yield Finding(
            "lack", "There is an AMD GPU, but PyTorch is built without ROCm", f"pip install torch --index-url {index}"
        )
    elif Path("/dev/nvidiactl").exists() and torch.version.cuda is None:
        yield Finding(
            "lack", "There is an NVIDIA GPU, but PyTorch is built without CUDA", "pip install --force-reinstall torch"
        )
    elif Path("/dev/kfd").exists() or Path("/dev/nvidiactl").exists():
        yield Finding(
            "lack", "There is a GPU, but PyTorch cannot use it", "update its driver, and look at nvidia-smi or rocm-smi"
        )
    else:
        yield Finding("note", "No GPU; models run on the CPU")


def _cpu() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("ok", f"CPU: {os.cpu_count()} cores, {memory / 2**30:.0f} GiB of memory; {_fits(memory)}")
    from miniserve.kernels import native

    if reason := native.unavailable_reason():
        yield Finding(
            "note",
            f"The CPU kernels cannot be compiled, so PyTorch does it all, slower: {reason}",
            "apt-get install g++",
        )
        return
    if native.NativeKernels().has_bf16_dot:
        yield Finding("ok", "The CPU kernels are compiled, with AVX512-BF16")
    else:
        yield Finding("note", "The CPU kernels are compiled; the processor has no AVX512-BF16, which decodes fastest")


def _attention() -> Iterator[Finding]:
    from miniserve.checks.check_paths import AttentionPath, find_machine

    try:
        choice = find_machine(EngineConfig()).choose(AttentionPath("auto", "auto", "auto"))
    except UserError as error:
        yield Finding("lack", f"No attention backend works here: {error}")
    else:
        yield Finding("ok", f"Attention: {choice.backend} over the {choice.layout} layout; `miniserve check` tests it")


def _system() -> Iterator[Finding]:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files != resource.RLIM_INFINITY and files < _FEW_FILES:
        yield Finding("note", f"A process may open {files} files, one for each client", f"ulimit -n {_FEW_FILES}")
    folder = cache_dir()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        yield Finding(
            "note",
            f"{folder} cannot be written, so nothing that is compiled is kept",
            "set XDG_CACHE_HOME to a folder that can",
        )
    elif (free := shutil.disk_usage(folder).free) < _LITTLE_DISK:
        yield Finding(
            "note", f"{folder} has {free / 2**20:.0f} MiB left, too little for most models", "make room there"
        )
    if find_spec("matplotlib") is None:
        remedy = f"{sys.executable} -m pip install matplotlib"
        yield Finding("note", "matplotlib, for plots of `miniserve bench`, is not installed", remedy)


def _fits(memory: int) -> str:
    return f"models of up to about {_SHARE * memory / 2e9:,.0f} billion parameters in 16 bits fit"
