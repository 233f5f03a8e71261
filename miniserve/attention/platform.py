"""Where attention will run: found on this machine, or named, so that `explain` can answer for other hardware."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
from dataclasses import dataclass, replace
from typing import Literal

import torch

from miniserve.attention.aiter import Unavailable as AiterUnavailable
from miniserve.attention.aiter import load as load_aiter
from miniserve.kernels import native

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Platform:
    """arch: "cpu", "sm_90" (an NVIDIA GPU of compute capability 9.0) or "gfx942" (an AMD GPU by its LLVM target).

    compute_units: AMD's compute units, NVIDIA's multiprocessors. aiter_version: None where aiter cannot be used, and
    `aiter_unavailable` says why; likewise `triton_unavailable`, and `native_unavailable` of the CPU's C++ kernels.
    triton_version: as its package states it, "" where that is not known.
    fastest_layout: the KV layout that its kernels were measured to read fastest, None where the contracts' own order
    holds. memory: in bytes, as the driver states it; 0 where that is not known, or is a CPU's.
    """

    arch: str
    compute_units: int = 0
    aiter_version: Version | None = None
    aiter_unavailable: str | None = None
    triton_unavailable: str | None = None
    triton_version: str = ""
    native_unavailable: str | None = None
    fastest_layout: str | None = None
    memory: int = 0

    @property
    def vendor(self) -> Literal["cuda", "hip"]:
        """Whose GPU it is, as launches of Triton kernels ask."""
        return "hip" if self.arch.startswith("gfx") else "cuda"

    @property
    def holder(self) -> str:
        """What holds a part of a shared model, for people: ranks of a CPU share it."""
        return "rank" if self.arch == "cpu" else "GPU"

    @property
    def fp8_dtype(self) -> torch.dtype:
        """What the hardware calls fp8 e4m3: gfx942 (and its siblings 940, 941) have a format of their own, whose codes
        mean half of what the common format's mean."""
        return torch.float8_e4m3fnuz if self.arch.startswith("gfx94") else torch.float8_e4m3fn

    @property
    def is_mi325x(self) -> bool:
        """Told by its memory: no other gfx942 has as much, and what a driver calls a GPU differs."""
        return self.arch == "gfx942" and self.memory > 200 * 2**30

    def without_aiter(self) -> Platform:
        """The same, for who does not want aiter where it is."""
        if self.aiter_version is None:
            return self
        return replace(self, aiter_version=None, aiter_unavailable="aiter is turned off (--no-aiter)")

    def order(self, layouts: tuple[str, ...]) -> tuple[str, ...]:
        """A contract's layouts in the order to try them here."""
        return tuple(sorted(layouts, key=lambda layout: layout != self.fastest_layout))


# The version whose signatures `aiter.py` was written to; what `explain` assumes of hardware that is not here.
ASSUMED_AITER: Version = (0, 1, 20)


_NO_AITER = "aiter runs on AMD GPUs only"
# Architecture, compute units, memory in GiB as the driver states it, and its bandwidth in TB/s as the vendor does.
_GPUS = {
    "mi300x": ("gfx942", 304, 192.0, 5.3),
    "mi300a": ("gfx942", 228, 128.0, 5.3),
    "mi308x": ("gfx942", 80, 192.0, 5.3),
    "mi325x": ("gfx942", 304, 256.0, 6.0),
    "mi350x": ("gfx950", 256, 288.0, 8.0),
    "mi355x": ("gfx950", 256, 288.0, 8.0),
    "a100": ("sm_80", 108, 80.0, 2.04),
    "h100": ("sm_90", 132, 79.6, 3.35),
    "h200": ("sm_90", 132, 140.4, 4.8),
}
DEVICE_BANDWIDTH = {name: rate * 1e12 for name, (*_, rate) in _GPUS.items()}  # bytes a second


def _named(arch: str, compute_units: int, gib: float, _: float) -> Platform:
    memory = int(gib * 2**30)
    if arch.startswith("gfx"):
        return Platform(arch, compute_units, ASSUMED_AITER, memory=memory)
    return Platform(arch, compute_units, aiter_unavailable=_NO_AITER, memory=memory)


NAMED_PLATFORMS = {name: _named(*terms) for name, terms in _GPUS.items()} | {
    "cpu": Platform("cpu", aiter_unavailable=_NO_AITER, triton_unavailable="Triton compiles for GPUs only")
}


def detect_platform(device: torch.device, dtype: torch.dtype) -> Platform:
    """What `device` of this machine is and what can be used on it. dtype: that of the model's weights."""
    if device.type == "cpu":
        return _detect_cpu(dtype)
    properties = torch.cuda.get_device_properties(device)
    units, memory, no_triton = properties.multi_processor_count, properties.total_memory, _triton_unavailable()
    if torch.version.hip is None:
        arch = f"sm_{properties.major}{properties.minor}"
        return Platform(arch, units, aiter_unavailable=_NO_AITER, triton_unavailable=no_triton, memory=memory)
    arch = properties.gcnArchName.partition(":")[0]  # gfx942:sramecc+:xnack-
    platform = Platform(arch, units, triton_unavailable=no_triton, triton_version=_triton_version(), memory=memory)
    try:
        return replace(platform, aiter_version=load_aiter().version)
    except AiterUnavailable as error:
        return replace(platform, aiter_unavailable=str(error))


def _detect_cpu(dtype: torch.dtype) -> Platform:
    reason = native.unavailable_reason()
    # Measured at 16 rows of 192 and 1024 tokens: 1.8 times as fast as linear (docs/BENCHMARKS.md).
    bf16_dot = reason is None and dtype == torch.bfloat16 and native.NativeKernels().has_bf16_dot
    fastest = "shuffled" if bf16_dot else None
    return replace(NAMED_PLATFORMS["cpu"], native_unavailable=reason, fastest_layout=fastest)


def _triton_version() -> str:
    for package in ("triton", "pytorch-triton-rocm", "triton-rocm"):  # AMD's and PyTorch's builds go by these names
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(package)
    return ""


def _triton_unavailable() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"
