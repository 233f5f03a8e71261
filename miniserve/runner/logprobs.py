"""Log-probabilities of tokens and their best alternatives, from raw logits: before bias, penalties and temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from miniserve.core import TokenLogprobs
from miniserve.parallel.group import Group, gather_rows

_BLOCK = 128  # of a vocabulary
LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON does not have

_CHUNK_BYTES = {"cpu": 8 << 20}  # fits in the cache, and in memory that the allocator keeps
_CHUNK_BYTES_ELSEWHERE = 32 << 20  # some dozen rows of a large vocabulary, which fill a GPU


class LogprobTensors(NamedTuple):
    """Natural-log probabilities of `num_rows` tokens, float32, at least LOWEST_LOGPROB; ranks and ids are int64.

    logprobs, ranks: [num_rows]; top_ids, top_logprobs: [num_rows, k], best first, lowest id first among equals, or as
    they were asked for. A token's rank is one more than the number of tokens that are more likely. A chosen token's
    logprob is the same float in top_logprobs.
    """

    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """How many rows of float32 logits to work on at a time."""
    return max(1, _CHUNK_BYTES.get(device.type, _CHUNK_BYTES_ELSEWHERE) // (4 * vocab_size))


def gather_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, asked_ids: torch.Tensor | None = None
) -> LogprobTensors:
    """logits: [num_rows, vocab_size] of any float dtype, not modified; token_ids: int64 [num_rows]; k: alternatives
    per row (0: none; more than the vocabulary: all of it). asked_ids: int64 [num_rows, k], alternatives to list instead
    of the best; -1: the best. Works on chunks of rows: there is never a float32 copy of all logits."""
    num_rows, vocab_size = logits.shape
    step = rows_per_chunk(vocab_size, logits.device)
    k = min(k, vocab_size)
    chunks = [
        _gather_chunk(
            logits[start : start + step],
            token_ids[start : start + step],
            k,
            None if asked_ids is None else asked_ids[start : start + step, :k],
        )
        for start in range(0, max(num_rows, 1), step)
    ]
    return LogprobTensors(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def share_logprobs(
    group: Group, own: LogprobTensors | None, counts: Sequence[int], k: int, device: torch.device
) -> LogprobTensors:
    """All rows', from what each rank has of its own: of `counts` rows (None where that is none), with up to k
    alternatives. Unused ones are zeros."""
    if own is None:
        empty = torch.zeros(0, device=device)
        own = LogprobTensors(empty, empty.long(), empty.long()[:, None], empty[:, None])
    wide = [F.pad(tops, (0, k - tops.shape[1])) for tops in (own.top_ids, own.top_logprobs)]
    return LogprobTensors(*(gather_rows(group, each, counts) for each in (own.logprobs, own.ranks, *wide)))


def _gather_chunk(
    logits: torch.Tensor, token_ids: torch.Tensor, k: int, asked_ids: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    logits = logits.float()
    top_ids = largest(logits, max(k, 1))[1]
    best = logits.gather(1, top_ids[:, :1])
    weights = logits.sub(best).mul_(math.log2(math.e)).exp2_()
    # Sums of blocks: a float32 sum over a large vocabulary, as in log_softmax, is off by 1e-5.
    total = _blocked(weights, 0.0).sum(-1).sum(-1, keepdim=True, dtype=torch.float64)
    normaliser = best + total.log_()

    def logprobs(ids: torch.Tensor) -> torch.Tensor:
        return (logits.gather(1, ids).double() - normaliser).float().clamp_(LOWEST_LOGPROB, 0.0)

    chosen = token_ids[:, None]
    # As floats, in memory that is allocated already, these sum many times faster than as bools.
    better = torch.gt(logits, logits.gather(1, chosen), out=weights)
    ranks = _blocked(better, 0.0).sum(-1).sum(-1, dtype=torch.float64).long().add_(1)
    top_ids = top_ids[:, :k]
    if asked_ids is not None:
        top_ids = torch.where(asked_ids < 0, top_ids, asked_ids)
    return logprobs(chosen).squeeze(1), ranks, top_ids, logprobs(top_ids)


def to_token_logprobs(
    token_ids: Sequence[int], tensors: LogprobTensors, num_logprobs: Sequence[int | None]
) -> list[TokenLogprobs | None]:
    """One entry per token, cut to the number of alternatives that its request asked for; None if it asked for no
    logprobs. num_logprobs aligns with token_ids; the rows of `tensors` (on the host) align with its entries that are
    not None.
    """
    found = zip(*(tensor.tolist() for tensor in tensors), strict=True)
    entries: list[TokenLogprobs | None] = []
    for token_id, count in zip(token_ids, num_logprobs, strict=True):
        if count is None:
            entries.append(None)
        else:
            logprob, rank, top_ids, top_logprobs = next(found)
            entries.append(TokenLogprobs(token_id, logprob, rank, top_ids[:count], top_logprobs[:count]))
    return entries


def _blocked(rows: torch.Tensor, fill: float) -> torch.Tensor:
    """[num_rows, n] as [num_rows, num_blocks, _BLOCK]: a view if _BLOCK divides n, else a copy padded with `fill`."""
    pad = -rows.shape[1] % _BLOCK
    if pad:
        rows = F.pad(rows, (0, pad), value=fill)
    return rows.view(len(rows), rows.shape[1] // _BLOCK, _BLOCK)


def largest(rows: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and int64 indices, both [num_rows, k], of each row's k largest, largest first (equals by index).

    rows: float32 [num_rows, n], 1 <= k <= n. Exact: an entry among the k largest lies in one of the k blocks that are
    first in the same order by (maximum, index), since every block before its own holds an entry before it. (On a CPU
    block maxima run at memory speed, torch's topk over a whole vocabulary is several times slower.)
    """
    n = rows.shape[1]
    if 2 * k * _BLOCK > n:  # the k blocks would be most of the row
        order = _order(rows, torch.arange(n, device=rows.device))
    else:
        blocks = _blocked(rows, float("-inf"))
        maxima = blocks.amax(-1)
        block = _index(_order(maxima, torch.arange(maxima.shape[1], device=rows.device)).topk(k, sorted=False).values)
        entries = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))
        index = block[:, :, None] * _BLOCK + torch.arange(_BLOCK, device=rows.device)
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
