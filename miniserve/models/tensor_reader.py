"""Copy parts of the tensors of safetensors files to a device: through a buffer in host memory, or on a CPU into place
where they are stored as they are wanted.

The files are not mapped: mapped pages count as the process's memory, and of a mapped tensor the system reads far more
than the rows that a rank wants.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from miniserve.core import UserError
from miniserve.models.checkpoint import StoredTensor, readable

# torch's dtypes by safetensors' names: those that weights and their scales may be stored in.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}
BUFFER_BYTES = 16 << 20
# Threads that fill a buffer: one read at a time leaves a disk idle for much of the time.
_READERS = 4
_LEAST_BYTES = 1 << 20  # of one read


class TensorReader:
    """For one device. A GPU gets two pinned buffers by turns: one is filled while the other is copied."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        pinned = device.type == "cuda"
        self._device, self._bytes = device, buffer_bytes
        self._buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(1 + pinned)]
        self._copied: list[torch.cuda.Event] = []  # copies from the buffers, the oldest first
        self._file, self._path = -1, Path()
        self._threads = ThreadPoolExecutor(_READERS)

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[None]:
        """The tensors of this file can be copied."""
        with readable(path), path.open("rb", buffering=0) as file:
            self._file, self._path = file.fileno(), path
            # No read-ahead: what follows a rank's rows is another's. Pages that were read stay in the system's cache
            # for the ranks that read the same tensors, and for the next start.
            if hasattr(os, "posix_fadvise"):  # macOS has none
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)
            yield

    def copy(self, tensor: StoredTensor, source: tuple[slice, ...], target: Tensor) -> None:
        """Copy `source` of a tensor of the opened file to `target`, converting to its dtype. Rows and whole matrices
        are read alone; of columns, whole rows are read. source: slices with both ends, of the first dimensions or all.

        Raises `UserError` where the file ends within that."""
        dtype = DTYPES[tensor.dtype]
        parts = source + tuple(slice(0, count) for count in tensor.shape[len(source) :])
        if not tensor.shape:
            self._copy(dtype, tensor.begin, (1,), (slice(0, 1),), target[None])
        else:
            self._copy(dtype, tensor.begin, tensor.shape, parts, target)

    def _copy(
        self, dtype: torch.dtype, begin: int, shape: tuple[int, ...], source: tuple[slice, ...], target: Tensor
    ) -> None:
        rows, *inner = source
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        whole = all(part == slice(0, count) for part, count in zip(inner, shape[1:], strict=True))
        if row_bytes > self._bytes or (len(inner) > 1 and not whole):
            for row, part in zip(range(rows.start, rows.stop), target, strict=True):
                self._copy(dtype, begin + row * row_bytes, shape[1:], tuple(inner), part)
            return
        if self._device.type == "cpu" and target.dtype == dtype and whole and target.is_contiguous():
            self._fill(target.view(-1).view(torch.uint8), begin + rows.start * row_bytes)
            return
        at_once = self._bytes // max(row_bytes, 1)
        for first in range(rows.start, rows.stop, at_once):
            stop = min(first + at_once, rows.stop)
            found = self._next_buffer()[: (stop - first) * row_bytes]
            self._fill(found, begin + first * row_bytes)
            part = found.view(dtype).view(stop - first, *shape[1:])[(slice(None), *inner)]
            target[first - rows.start : stop - rows.start].copy_(part, non_blocking=True)
            if self._device.type == "cuda":
                self._copied.append(torch.cuda.current_stream(self._device).record_event())

    def _next_buffer(self) -> Tensor:
        """Once it is free."""
        if len(self._copied) == len(self._buffers):
            self._copied.pop(0).synchronize()
        self._buffers.append(self._buffers.pop(0))  # the one that was filled first
        return self._buffers[-1]

    def _fill(self, target: Tensor, begin: int) -> None:
        """Fill target, bytes, with the file's from `begin` on, by several reads at once."""
        each = max(-(-len(target) // _READERS), _LEAST_BYTES)
        list(self._threads.map(self._read, target.split(each), range(begin, begin + max(len(target), 1), each)))

    def _read(self, target: Tensor, begin: int) -> None:
        """One of the reads of `_fill`."""
        view, done = target.numpy().data, 0
        while done < len(view):
            read = os.preadv(self._file, [view[done:]], begin + done)
            if not read:
                raise UserError(f"{self._path} ends at byte {begin + done}, within a tensor; download it again.")
            done += read
