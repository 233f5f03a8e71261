"""Largest entries of long rows, by way of the maxima of short blocks.

On a CPU a block maximum runs at memory speed where torch's argmax and topk over a whole vocabulary are several times
slower. Everywhere ties go to the lowest id, so that greedy, top_k = 1 and the first of the top logprobs agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK = 128


def blocked(rows: torch.Tensor, fill: float) -> torch.Tensor:
    """[num_rows, n] as [num_rows, num_blocks, BLOCK]: a view where BLOCK divides n, else a copy padded with `fill`."""
    pad = -rows.shape[1] % BLOCK
    if pad:
        rows = F.pad(rows, (0, pad), value=fill)
    return rows.view(len(rows), rows.shape[1] // BLOCK, BLOCK)


def argmax(rows: torch.Tensor) -> torch.Tensor:
    """int64 [num_rows]: the lowest index of each row's maximum. rows: float32 [num_rows, n]."""
    blocks = blocked(rows, float("-inf"))
    block = blocks.amax(-1).argmax(-1)
    return block * BLOCK + take(blocks, block).argmax(-1)


def take(blocks: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """One block of each row, [num_rows, BLOCK]. blocks: [num_rows, num_blocks, BLOCK]; block: int64 [num_rows]."""
    return blocks.gather(1, block[:, None, None].expand(-1, 1, BLOCK)).squeeze(1)


def largest(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and int64 indices, both [num_rows, k], of each row's k largest, largest first (equals by index).

    rows: float32 [num_rows, n], 1 <= k <= n. Exact: an entry among the k largest lies in one of the k blocks that are
    first in the same order by (maximum, index), since every block before its own holds an entry before it.
    """
    n = rows.shape[1]
    if 2 * k * BLOCK > n:  # the k blocks would be most of the row
        order = _order(rows, torch.arange(n, device=rows.device))
    else:
        blocks = blocked(rows, float("-inf"))
        maxima = blocks.amax(-1)
        block = _index(_order(maxima, torch.arange(maxima.shape[1], device=rows.device)).topk(k, sorted=False).values)
        entries = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))
        index = block[:, :, None] * BLOCK + torch.arange(BLOCK, device=rows.device)
        order = _order(entries, index).flatten(1)
    # The clamp matters only for a row with NaNs in it, which may sort behind the padding.
    index = _index(order.topk(k).values).clamp_(max=n - 1)
    return rows.gather(1, index), index


def _order(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """int64 keys that sort as (value, -index): a float's bits, made monotonic, in the upper half."""
    bits = (values + 0.0).view(torch.int32)  # the sum turns -0.0 into 0.0
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (bits.to(torch.int64) << 32).sub_(index)


def _index(order: torch.Tensor) -> torch.Tensor:
    return order.neg().bitwise_and_(0xFFFFFFFF)
