"""Grammars' masks on the device: tokens that are not allowed get the logit -inf."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from miniserve.core import TokenMasks
from miniserve.runner.device import to_device


def apply_masks(logits: torch.Tensor, masks: TokenMasks) -> None:
    """In place, on [num_rows, vocab_size] of any float dtype. Nothing waits."""
    if not masks.entries:
        return
    vocab_size, device = logits.shape[1], logits.device
    packed = np.frombuffer(masks.bits, dtype=np.uint8).reshape(len(masks.entries), -1)
    if device.type == "cpu":
        bits = torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little"))
    else:
        bits = (to_device(packed, device).unsqueeze(-1) & _bits_of_a_byte(device)).flatten(1)[:, :vocab_size]
    banned = bits == 0
    if len(masks.entries) == len(logits):
        logits.masked_fill_(banned, float("-inf"))
    else:
        entries = to_device(np.array(masks.entries, dtype=np.int64), device)
        logits[entries] = logits[entries].masked_fill_(banned, float("-inf"))


def masks_within(masks: TokenMasks, part: slice) -> TokenMasks:
    """Those of the entries in `part`, counted from its start."""
    each = len(masks.bits) // max(1, len(masks.entries))
    held = [(place, entry) for place, entry in enumerate(masks.entries) if part.start <= entry < part.stop]
    bits = b"".join(masks.bits[place * each : (place + 1) * each] for place, _ in held)
    return TokenMasks([entry - part.start for _, entry in held], bytearray(bits))


@cache
def _bits_of_a_byte(device: torch.device) -> torch.Tensor:
    return torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8, device=device)
