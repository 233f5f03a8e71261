"""Grammars' masks on the device: tokens that are not allowed get the logit -inf."""

from __future__ import annotations

import numpy as np
import torch

from miniserve.core import TokenMasks
from miniserve.runner.sampling_transfer import to_device


def apply_masks(logits: torch.Tensor, masks: TokenMasks) -> None:
    """In place, on float32 [num_rows, vocab_size]. Nothing waits."""
    if not masks.entries:
        return
    vocab_size, device = logits.shape[1], logits.device
    packed = np.frombuffer(masks.bits, dtype=np.uint8).reshape(len(masks.entries), -1)
    if device.type == "cpu":
        banned = torch.from_numpy(np.unpackbits(packed, axis=1, count=vocab_size, bitorder="little") == 0)
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=device)
        banned = ((to_device(packed, device).unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :vocab_size] == 0
    if len(masks.entries) == len(logits):
        logits.masked_fill_(banned, float("-inf"))
    else:
        entries = to_device(np.array(masks.entries, dtype=np.int64), device)
        logits[entries] = logits[entries].masked_fill_(banned, float("-inf"))
