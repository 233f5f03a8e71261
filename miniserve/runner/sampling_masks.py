"""Grammars' masks for the draw, and those of a part of the rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from miniserve.core import TokenMasks
from miniserve.kernels.sampling import RowMasks
from miniserve.runner.device import to_device

Int32 = npt.NDArray[np.int32]


class MaskRoom:
    """Room for the masks of `num_rows` rows on the device, at addresses that stay the same: `masks`."""

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        width, on_cpu = -(-vocab_size // 32), device.type == "cpu"
        # Places, then bits, so that one copy brings both: read in pinned memory by the draw they take 35 us.
        self._host = torch.empty(num_rows * (1 + width), dtype=torch.int32, pin_memory=not on_cpu).fill_(-1)
        self._there = self._host if on_cpu else self._host.to(device)
        self._stream = None if on_cpu else torch.cuda.Stream(device)
        self.masks = RowMasks(self._there[num_rows:].view(num_rows, width), self._there[:num_rows])
        words = self._host.numpy()
        self._places, self._words = words[:num_rows], words[num_rows:].reshape(num_rows, width)
        self._bytes = memoryview(self._words.data).cast("B")
        self._known: tuple[list[int], int] = ([], 0)

    def take(self, masks: TokenMasks, batch: int) -> None:
        """Copy those of a step of `batch` entries, beside what the device computes; what is enqueued from now on finds
        them. No draw may be left that reads earlier ones."""
        entries, bits = masks.entries, masks.bits
        if self._known != (entries, batch):
            self._known = entries, batch
            self._places[:batch] = _places(entries, batch)
        if len(bits) == len(entries) * self._words.shape[1] * 4:
            self._bytes[: len(bits)] = bits
        else:  # a tokenizer may have more words than the model
            self._words[: len(entries)] = _words(masks)[:, : self._words.shape[1]]
        if self._stream is not None:
            size = len(self._places) + len(entries) * self._words.shape[1]
            with torch.cuda.stream(self._stream):
                self._there[:size].copy_(self._host[:size], non_blocking=True)
            torch.cuda.current_stream(self._there.device).wait_stream(self._stream)


def row_masks(masks: TokenMasks, batch: int, device: torch.device) -> RowMasks | None:
    """Those of the entries 0 … batch - 1, on the device; None where there are none. Nothing waits."""
    if not masks.entries:
        return None
    return RowMasks(to_device(_words(masks), device), to_device(_places(masks.entries, batch), device))


def _words(masks: TokenMasks) -> Int32:
    return np.frombuffer(masks.bits, dtype="<i4").reshape(len(masks.entries), -1)


def _places(entries: list[int], batch: int) -> Int32:
    places = np.full(batch, -1, dtype=np.int32)
    places[entries] = np.arange(len(entries), dtype=np.int32)
    return places


def masks_within(masks: TokenMasks, part: slice) -> TokenMasks:
    """Those of the entries in `part`, counted from its start."""
    each = len(masks.bits) // max(1, len(masks.entries))
    held = [(place, entry) for place, entry in enumerate(masks.entries) if part.start <= entry < part.stop]
    bits = b"".join(masks.bits[place * each : (place + 1) * each] for place, _ in held)
    return TokenMasks([entry - part.start for _, entry in held], bytearray(bits))
