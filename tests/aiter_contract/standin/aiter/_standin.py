"""The emulated device, the record of calls, and how a call is refused. Nothing here exists in the real library.

What the stand-in demands and reproduces was read from aiter v0.1.20.post1, its kernels' tables and its issue tracker.

How the stand-in answers a misuse:
- where the real library raises, it raises the same class with (nearly) the same words: `check` for AITER_CHECK;
- where the real kernel would silently read or write the wrong memory because of a static property of the call (a
  layout, a dtype, a stride, a head count), it raises `ContractViolation`;
- where the real kernel computes something else than asked from well-formed input (a scale it ignores, a tile counted
  twice, sinks it drops), it computes that something else, so that the wrong numbers show downstream;
- what the real kernel leaves unwritten is filled with NaN.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

CU_COUNTS = {"gfx942": 304, "gfx950": 256}
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


class ContractViolation(AssertionError):
    """The real kernel would have given garbage or faulted without a word."""


class Call(NamedTuple):
    function: str
    route: str  # the kernel reached: "hip", "asm", "fmha_v3", "persistent", …; "" where there is only one


@dataclass(frozen=True)
class Device:
    """arch gfx942 (MI300X) or gfx950 (MI355X); cu_num: compute units, which move the HIP/ASM switch (0: the arch's);
    version: of aiter; tile_bug: whether `pa_fwd_asm` miscounts context lengths 241…255."""

    arch: str = "gfx942"
    cu_num: int = 0
    version: str = "0.1.20.post1"
    tile_bug: bool = True

    @property
    def cus(self) -> int:
        return self.cu_num or CU_COUNTS[self.arch]

    @property
    def fp8(self) -> torch.dtype:
        return FP8[self.arch]

    def at_least(self, version: str) -> bool:
        return _ordered(self.version) >= _ordered(version)


def _ordered(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version))


def _from_environment() -> Device:
    read = os.environ.get
    return Device(
        read("AITER_STANDIN_ARCH", "gfx942"),
        int(read("AITER_STANDIN_CU", "0")),
        read("AITER_STANDIN_VERSION", "0.1.20.post1"),
        read("AITER_STANDIN_TILE_BUG", "1") == "1",
    )


device = _from_environment()
calls: list[Call] = []
log_path = os.environ.get("AITER_STANDIN_LOG")


def configure(**changes: str | int | bool) -> None:
    """Change the emulated device of this process, and `aiter.dtypes.fp8` with it."""
    global device  # noqa: PLW0603
    device = replace(device, **changes)
    from aiter.utility import dtypes

    dtypes.fp8 = device.fp8


@contextmanager
def emulate(**changes: str | int | bool) -> Iterator[list[Call]]:
    """The device changed, and the calls recorded afresh, for the length of a block."""
    before, recorded = device, calls[:]
    calls.clear()
    configure(**changes)
    try:
        yield calls
    finally:
        calls[:] = recorded
        configure(**vars(before))


def record(function: str, route: str = "") -> None:
    calls.append(Call(function, route))
    if log_path:
        with open(log_path, "a") as log:
            log.write(f"{function} {route}\n")


def require(ok: object, message: str) -> None:
    """What the caller owes and the real library does not check."""
    if not ok:
        raise ContractViolation(message)


def check(ok: object, message: str) -> None:
    """AITER_CHECK and TORCH_CHECK: a RuntimeError."""
    if not ok:
        raise RuntimeError(message)
