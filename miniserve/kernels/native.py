"""Compiles and binds `cpu.cpp`: the CPU decode path's kernels as methods over torch tensors.

The source is plain C++ without torch's headers, so that one compiler call of a few seconds builds it, once per source,
compiler and processor; the library is kept in the user's cache directory. Where no compiler is found everything runs on
PyTorch alone, slower; `load()` says why.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch

from miniserve.config import cache_dir

_SOURCE = Path(__file__).with_name("cpu.cpp")
_FLAGS = (
    *("-O3", "-march=native", "-fopenmp", "-std=c++17", "-shared", "-fPIC"),
    # Lets reductions vectorise; infinities and NaN keep their meaning (so not -ffast-math).
    *("-fno-math-errno", "-fno-trapping-math", "-fassociative-math", "-fno-signed-zeros"),
    *(("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()),
)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PANEL = 16  # output rows of a packed panel, as in cpu.cpp
Call = tuple[str, tuple[int | float | None, ...]]  # a C function's name and its arguments
_POINTER, _INT, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
# Of the kernels, which return nothing.
_SIGNATURES: dict[str, list[type]] = {
    "ms_add_rms_norm": [_INT, *[_POINTER] * 4, _SIZE, _SIZE, _FLOAT, _INT],
    "ms_silu_and_mul": [_INT, _POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "ms_qk_norm_rope": [_INT, *[_POINTER] * 4, *[_SIZE] * 4, _FLOAT, _SIZE, _INT],
    "ms_write_kv": [_INT, _INT, _POINTER, _POINTER, _SIZE, _SIZE, *[_POINTER] * 3, *[_SIZE] * 4],
    "ms_paged_decode": [_INT, _INT, *[_POINTER] * 7, *[_SIZE] * 8, _FLOAT, _FLOAT, _INT],
    "ms_gather_rows": [*[_POINTER] * 3, _SIZE, _SIZE, _INT],
    "ms_advance": [_INT, *[_POINTER] * 9, *[_SIZE] * 3],
    "ms_greedy": [_INT, *[_POINTER] * 5, _SIZE, _SIZE],
    "ms_pack_linear": [_POINTER, _POINTER, _SIZE, _SIZE, _INT],
    "ms_linear": [*[_POINTER] * 4, *[_SIZE] * 4, _INT],
}


# Whoever makes the calls: a model and its attention need not share an object.
_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@dataclass(frozen=True, slots=True)
class _Recording:
    calls: list[Call]
    executes: bool


class Unavailable(Exception):
    """The kernels cannot be used on this machine; `str(error)` is the reason."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One step's, contiguous. input_ids, positions, slots int64 [batch]; seq_lens int32 [batch]; block_tables int32
    [batch, width]."""

    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor


class NativeKernels:
    """The kernels of `cpu.cpp`. Tensors are CPU tensors of float32, bfloat16 or float16, rows contiguous in their last
    dimension; nothing is checked here beyond what callers fix at construction time. `has_bf16_dot`: the processor
    multiplies pairs of bfloat16 (AVX512-BF16), which `linear` needs and decode over the shuffled layout uses."""

    def __init__(self, library: ctypes.CDLL, num_threads: int) -> None:
        self._lib = library
        self._threads = num_threads
        self.has_bf16_dot = bool(library.ms_has_bf16_dot())

    def encode(self, calls: Sequence[Call]) -> tuple[list[int], list[tuple[int, int]]]:
        """The 64-bit words that `replay` takes; and of each pointer in them its place there and its call's number."""
        words: list[int] = [len(calls)]
        pointers: list[tuple[int, int]] = []
        for number, (name, arguments) in enumerate(calls):
            words.append(self._lib.ms_find_op(name.encode()))
            for kind, argument in zip(_SIGNATURES[name], arguments, strict=True):
                if kind is _POINTER and argument is not None:
                    pointers.append((len(words), number))
                words += struct.unpack("q", struct.pack("d", argument)) if kind is _FLOAT else (argument or 0,)
        return words, pointers

    def replay(self, words: torch.Tensor) -> None:
        """Make the calls in `words`, int64, one after the other."""
        self._lib.ms_replay(words.data_ptr(), words.shape[0], self._threads)

    def _call(self, name: str, *arguments: int | float | None) -> None:
        if (recording := _recording.get()) is not None:
            recording.calls.append((name, arguments))
            if not recording.executes:
                return
        getattr(self._lib, name)(*arguments)

    def can_pack(self, dtype: torch.dtype, in_features: int, out_features: int) -> bool:
        """Whether `linear` takes a weight [out_features, in_features] of this dtype on this processor."""
        return self.has_bf16_dot and dtype == torch.bfloat16 and out_features % _PANEL == 0 and in_features % 2 == 0

    def pack_linear(self, weight: torch.Tensor) -> torch.Tensor:
        """A contiguous weight [n, k] -> the same bytes as panels of 16 rows, which `linear` reads."""
        packed = torch.empty_like(weight)
        self._call("ms_pack_linear", weight.data_ptr(), packed.data_ptr(), *weight.shape, self._threads)
        return packed

    def linear(self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [m, k] bfloat16 times the packed weight's transpose, plus bias [n] -> [m, n] bfloat16."""
        m, (n, k) = x.shape[0], packed.shape
        out = x.new_empty((m, n))
        pointers = (packed.data_ptr(), x.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
        self._call("ms_linear", *pointers, m, n, k, x.stride(0), self._threads)
        return out

    def gather_rows(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rows of a contiguous table [n, dim] of any dtype, at ids int64 [rows] -> [rows, dim]."""
        out = table.new_empty((ids.shape[0], table.shape[1]))
        row_bytes = table.shape[1] * table.itemsize
        self._call("ms_gather_rows", _p(table), _p(ids), _p(out), ids.shape[0], row_bytes, self._threads)
        return out

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm of the rows of a contiguous x [rows, dim]."""
        out = torch.empty_like(x)
        rows, dim = x.shape
        dtype = _DTYPES[x.dtype]
        self._call("ms_add_rms_norm", dtype, _p(x), None, _p(weight), _p(out), rows, dim, eps, self._threads)
        return out

    def add_rms_norm(self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """residual += x, in place; returns the norm of the sum. x, residual [rows, dim], contiguous."""
        out = torch.empty_like(x)
        rows, dim = x.shape
        pointers = (_p(x), _p(residual), _p(weight), _p(out))
        self._call("ms_add_rms_norm", _DTYPES[x.dtype], *pointers, rows, dim, eps, self._threads)
        return out

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up of a contiguous [rows, 2 * dim] -> [rows, dim]."""
        rows, dim = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, dim))
        self._call("ms_silu_and_mul", _DTYPES[gate_up.dtype], _p(gate_up), _p(out), rows, dim, self._threads)
        return out

    def qk_norm_rope(
        self,
        qkv: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        cos_sin: torch.Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        eps: float,
    ) -> None:
        """Norm (where weights are given) and rotate q and k, in place.

        qkv [tokens, (num_heads + 2 * num_kv_heads) * head_dim]; cos_sin float32 [tokens, head_dim], contiguous: the
        cosines of half a head, then its sines.
        """
        self._call(
            "ms_qk_norm_rope",
            *(_DTYPES[qkv.dtype], _p(qkv), _p(q_weight), _p(k_weight), _p(cos_sin), qkv.shape[0]),
            *(num_heads, num_kv_heads, head_dim, eps, qkv.stride(0), self._threads),
        )

    def write_kv(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        block_size: int,
        shuffled: bool,
    ) -> None:
        """Store k, v [tokens, num_kv_heads, head_dim] (token stride free) at slot_mapping int64 [tokens], of which
        negative ones are left out."""
        tokens, num_kv_heads, head_dim = k.shape
        self._call(
            "ms_write_kv",
            *(_DTYPES[k.dtype], int(shuffled), _p(k), _p(v), k.stride(0), v.stride(0), _p(key), _p(value)),
            *(_p(slot_mapping), tokens, num_kv_heads, head_dim, block_size),
        )

    def paged_decode(
        self,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        block_tables: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        num_kv_heads: int,
        block_size: int,
        shuffled: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """One query token a row: q [rows, num_heads, head_dim] (token stride free), block_tables int32 [rows, width],
        seq_lens int32 [rows] counting the query's own token -> [rows, num_heads * head_dim]."""
        rows, num_heads, head_dim = q.shape
        out = q.new_empty((rows, num_heads * head_dim))
        self._call(
            "ms_paged_decode",
            *(_DTYPES[q.dtype], int(shuffled), _p(q), _p(key), _p(value), _p(block_tables), _p(seq_lens), _p(sinks)),
            *(_p(out), rows, num_heads, num_kv_heads, head_dim, block_size, q.stride(0), block_tables.stride(0)),
            *(window or 0, scale, softcap or 0.0, self._threads),
        )
        return out

    def advance(
        self,
        rows: torch.Tensor,
        tables: torch.Tensor,
        lens: torch.Tensor,
        last_tokens: torch.Tensor,
        step: DecodeStep,
        block_size: int,
        *,
        given: bool,
    ) -> None:
        """Lay out a step of rows int64 [batch] in `step`. Of all rows are tables int32 [max_num_seqs, width], lens and
        last_tokens int64 [max_num_seqs]. Each row gets longer by its last token; where they are `given`, positions and
        input_ids stay as they are, and so do lens."""
        places = (step.input_ids, step.positions, step.slots, step.seq_lens, step.block_tables)
        self._call(
            "ms_advance",
            *(int(given), _p(rows), _p(tables), _p(lens), _p(last_tokens), *map(_p, places)),
            *(rows.shape[0], tables.shape[1], block_size),
        )

    def greedy(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        last_tokens: torch.Tensor,
        num_outputs: torch.Tensor,
    ) -> None:
        """The most likely token, of equals the lowest, of each of logits [batch, vocab_size], to tokens int64 [batch]
        and to last_tokens int64 [max_num_seqs] of rows int64 [batch], which in num_outputs int64 have one more."""
        pointers = (_p(logits), _p(rows), _p(tokens), _p(last_tokens), _p(num_outputs))
        self._call("ms_greedy", _DTYPES[logits.dtype], *pointers, *logits.shape)


@contextlib.contextmanager
def record(*, execute: bool) -> Iterator[list[Call]]:
    """Within, this thread's calls are noted in the list, beside being made or instead."""
    recording = _Recording([], execute)
    token = _recording.set(recording)
    try:
        yield recording.calls
    finally:
        _recording.reset(token)


def load(num_threads: int | None = None) -> NativeKernels:
    """The kernels, compiled if need be, to run on `num_threads` (default: as many as PyTorch). Raises `Unavailable`
    with the reason."""
    return NativeKernels(_library(), num_threads or torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build()))
    for name, arguments in _SIGNATURES.items():
        if hasattr(library, name):  # some need what this processor lacks
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = None
    library.ms_replay.argtypes, library.ms_replay.restype = [_POINTER, _SIZE, _INT], None
    library.ms_find_op.argtypes, library.ms_find_op.restype = [ctypes.c_char_p], _SIZE
    return library


def unavailable_reason() -> str | None:
    """Why the kernels cannot be used here, as a sentence; None when they can."""
    try:
        _library()
    except Unavailable as error:
        return str(error)
    return None


def _build() -> Path:
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


def _p(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
