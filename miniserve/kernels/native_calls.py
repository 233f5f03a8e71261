"""Calls of the C functions of `cpu.cpp`: make them, record them, and replay a recording by one call."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from miniserve.kernels.native_build import build

Call = tuple[str, tuple[int | float | None, ...]]  # a kernel's name and its arguments
_POINTER, _INT, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_NUMBERS = (int, float, type(None))  # a faster check than one for tensors
# Of the kernels, which return nothing.
_SIGNATURES: dict[str, list[type]] = {
    "ms_add_rms_norm": [_INT, *[_POINTER] * 4, _SIZE, _SIZE, _FLOAT, _INT],
    "ms_silu_and_mul": [_INT, _POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "ms_qk_norm_rope": [_INT, *[_POINTER] * 4, *[_SIZE] * 4, _FLOAT, _SIZE, _INT],
    "ms_write_kv": [_INT, _INT, _POINTER, _POINTER, _SIZE, _SIZE, *[_POINTER] * 3, *[_SIZE] * 4],
    "ms_paged_decode": [_INT, _INT, *[_POINTER] * 7, *[_SIZE] * 8, _FLOAT, _FLOAT, _INT],
    "ms_gather_rows": [*[_POINTER] * 3, _SIZE, _SIZE, _INT],
    "ms_advance": [_INT, *[_POINTER] * 9, *[_SIZE] * 3],
    "ms_draw": [_INT, *[_POINTER] * 3, _SIZE, *[_POINTER] * 6, _SIZE, _SIZE, _INT],
    "ms_pack_linear": [_POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "ms_linear": [*[_POINTER] * 4, *[_SIZE] * 4, _INT],
}


@dataclass(frozen=True, slots=True)
class _Recording:
    calls: list[Call]
    executes: bool


# Shared by all callers: a model and its attention need not share an object.
_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels, compiled if necessary. Raises `Unavailable`."""
    found = ctypes.CDLL(str(build()))
    for name, arguments in _SIGNATURES.items():
        if hasattr(found, name):  # some need instructions that this processor lacks
            getattr(found, name).argtypes = arguments
            getattr(found, name).restype = None
    found.ms_replay.argtypes, found.ms_replay.restype = [_POINTER, _SIZE, _INT], None
    found.ms_find_op.argtypes, found.ms_find_op.restype = [ctypes.c_char_p], _SIZE
    return found


def call(name: str, *values: torch.Tensor | int | float | None) -> None:
    """Call a kernel with values, and the addresses of tensors."""
    arguments = tuple([a if isinstance(a, _NUMBERS) else a.data_ptr() for a in values])
    if (recording := _recording.get()) is not None:
        recording.calls.append((name, arguments))
        if not recording.executes:
            return
    getattr(library(), name)(*arguments)


@contextlib.contextmanager
def record(*, execute: bool) -> Iterator[list[Call]]:
    """Within this block this thread's calls are recorded in the list, besides being made or instead."""
    recording = _Recording([], execute)
    token = _recording.set(recording)
    try:
        yield recording.calls
    finally:
        _recording.reset(token)


def encode(calls: Sequence[Call]) -> tuple[list[int], list[tuple[int, int]]]:
    """The 64-bit words that `replay` takes; and for each pointer in them its index there and its call's number."""
    words: list[int] = [len(calls)]
    pointers: list[tuple[int, int]] = []
    for number, (name, arguments) in enumerate(calls):
        words.append(library().ms_find_op(name.encode()))
        for kind, argument in zip(_SIGNATURES[name], arguments, strict=True):
            if kind is _POINTER and argument is not None:
                pointers.append((len(words), number))
            words += struct.unpack("q", struct.pack("d", argument)) if kind is _FLOAT else (argument or 0,)
    return words, pointers


def replay(words: torch.Tensor, num_threads: int) -> None:
    """Make the calls in `words`, int64, one after the other; the threads share each call's work."""
    library().ms_replay(words.data_ptr(), words.shape[0], num_threads)
