"""Memory for the intermediates of a recorded pass when it is replayed: one arena, whose parts are shared by tensors
that are not needed at the same time, as when Python freed one before it made the next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LINE = 64  # bytes of a cache line, which vectors should not cross


@dataclass(slots=True)
class _Buffer:
    """Memory that the pass allocated, the first and the last call that use it, and its offset in the arena."""

    address: int
    size: int
    first: int
    last: int = -1
    offset: int = 0


def plan_arena(
    pointers: Sequence[tuple[int, int]], allocated: Sequence[torch.Tensor], result: torch.Tensor
) -> tuple[dict[int, int], int]:
    """pointers: (address, number of the call that uses it), of all calls in order. allocated: by the pass, all at
    different addresses. `result`, one of them or a view of one, is used after the calls.

    Returns the arena offset of each pointer that lies in allocated memory, and the arena's bytes.
    """
    never = len(pointers)
    buffers = [_Buffer(t.data_ptr(), t.nbytes, never) for t in sorted(allocated, key=torch.Tensor.data_ptr)]
    starts = [buffer.address for buffer in buffers]
    found: dict[int, _Buffer] = {}
    for address, number in (*pointers, (result.data_ptr(), never)):
        buffer = buffers[bisect_right(starts, address) - 1]
        if buffer.address <= address < buffer.address + buffer.size:
            found[address] = buffer
            buffer.first, buffer.last = min(buffer.first, number), number
    size = _place([buffer for buffer in buffers if buffer.last >= 0])
    return {address: buffer.offset + address - buffer.address for address, buffer in found.items()}, size


def _place(buffers: list[_Buffer]) -> int:
    """Place each at the lowest offset that is free as long as it is needed. Returns the end of the highest."""
    placed: list[_Buffer] = []
    for buffer in sorted(buffers, key=lambda buffer: buffer.first):
        for other in sorted(placed, key=lambda other: other.offset):
            if other.last >= buffer.first and other.offset < buffer.offset + buffer.size:
                buffer.offset = -(-(other.offset + other.size) // _LINE) * _LINE
        placed.append(buffer)
    return max((buffer.offset + buffer.size for buffer in placed), default=0)
