"""Device memory that the ranks of one host share: each writes to all of it, by CUDA IPC, on AMD by HIP's."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from miniserve.parallel.settle import all_values, together

if TYPE_CHECKING:
    from miniserve.kernels.triton.reduce_norm import Inboxes
    from miniserve.parallel.group import Group

_LAZY_PEER_ACCESS, _UNCACHED = 1, 3
# Of the trial, about half a minute: ranks compile its kernel at the same time, not equally fast.
_TRIAL_LIMIT, _TRIALS = 30_000_000, 7


class _Handle(ctypes.Structure):  # cudaIpcMemHandle_t, passed by value
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class _Runtime:
    """The functions of the vendor's runtime that are needed. Raises OSError where this PyTorch does not include it."""

    def __init__(self) -> None:
        self._prefix = "hip" if torch.version.hip else "cuda"
        version = (torch.version.cuda or "none").split(".")[0]
        self._library = ctypes.CDLL("libamdhip64.so" if torch.version.hip else f"libcudart.so.{version}")

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, self._prefix + name)(*arguments):
            raise RuntimeError(f"{self._prefix}{name} failed with status {status}")

    def allocate(self, num_bytes: int) -> int:
        address, size = ctypes.c_void_p(), ctypes.c_size_t(num_bytes)
        if self._prefix == "hip":  # what peers write is seen only past the caches
            self._call("ExtMallocWithFlags", ctypes.byref(address), size, _UNCACHED)
        else:
            self._call("Malloc", ctypes.byref(address), size)
        return address.value or 0

    def handle(self, address: int) -> bytes:
        handle = _Handle()
        self._call("IpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        self._call("IpcOpenMemHandle", ctypes.byref(address), _Handle.from_buffer_copy(handle), _LAZY_PEER_ACCESS)
        return address.value or 0


class _Block:
    """Memory as an array that PyTorch takes over: https://numba.pydata.org/numba-doc/latest/cuda/cuda_array_interface"""

    def __init__(self, address: int, words: int) -> None:
        self.__cuda_array_interface__ = {"shape": (words,), "typestr": "<i4", "data": (address, False), "version": 3}


def open_inboxes(group: Group, rank: int, device: torch.device) -> Inboxes:
    """Those of all ranks, tried out; `device` is PyTorch's current one. They are there for as long as the process: a
    peer may still write to them. Raises RuntimeError, on all ranks, where they do not work between any two."""
    with together(group):
        from miniserve.kernels.triton.reduce_norm import EMPTY, INBOX_BYTES, TURNS, Inboxes

        runtime = _Runtime()
        own = runtime.allocate(TURNS * INBOX_BYTES)
        torch.as_tensor(_Block(own, TURNS * INBOX_BYTES // 4), device=device).fill_(EMPTY)
        torch.cuda.synchronize(device)
        found = Path("/proc/sys/kernel/random/boot_id").read_text(), runtime.handle(own)
    offered = all_values(group, found, tuple[str, bytes])
    with together(group):
        if len({host for host, _ in offered}) > 1:
            raise RuntimeError("the ranks are on several hosts")
        addresses = [own if peer == rank else runtime.open(handle) for peer, (_, handle) in enumerate(offered)]
        state = torch.zeros(4, dtype=torch.int32, device=device)
        inboxes = Inboxes(torch.tensor(addresses, device=device), state, rank)
    with together(group):
        _try_out(inboxes, device)
    return inboxes


def _try_out(inboxes: Inboxes, device: torch.device) -> None:
    """Raises RuntimeError where another thing arrives than was sent."""
    trial = replace(inboxes, limit=_TRIAL_LIMIT)
    for turn in range(_TRIALS):
        sent = torch.arange(5000 - 100 * turn, device=device).to(torch.int32) + turn
        ranks = torch.arange(inboxes.size, dtype=torch.int32, device=device)[:, None]
        if not torch.equal(trial.gather(sent * (inboxes.rank + 1)), sent * (ranks + 1)):
            raise RuntimeError("what a rank sends does not arrive at its peers")
