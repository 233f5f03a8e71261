"""Cached context for kernels that take dense keys and values: what to gather, a bounded piece at a time, and how the
parts of a sequence are put together by their log-sum-exps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from miniserve.attention.metadata import Int64, QueryRows


class RaggedLens(NamedTuple):
    """How queries and keys divide into rows, in the order in which flash attention takes it: cu_query_lens and
    cu_key_lens int32 [rows + 1] start at 0; no row has more than max_query_len queries, max_key_len keys."""

    cu_query_lens: Tensor
    cu_key_lens: Tensor
    max_query_len: int
    max_key_len: int


@dataclass(frozen=True, slots=True)
class GatheredRows:
    """Keys to gather for some of the step's query rows, each with at least one.

    start, end: those rows' query tokens in the step; slots int64 [keys], row after row, and how both divide.
    """

    start: int
    end: int
    slots: Tensor
    lens: RaggedLens


def context_pieces(group: QueryRows, block_size: int, max_tokens: int) -> tuple[GatheredRows, ...]:
    """All rows' contexts, one after the other, cut into pieces of at most max_tokens tokens. A piece is of neighbouring
    rows, each with some of its context in it, so that no kernel meets an empty row."""
    context = np.array(group.context_lens, dtype=np.int64)
    ends = context.cumsum()
    pieces = []
    for start in range(0, int(ends[-1]), max_tokens):
        low = np.clip(start - (ends - context), 0, context)
        high = np.clip(start + max_tokens - (ends - context), 0, context)
        touched = np.flatnonzero(high > low)
        rows = slice(int(touched[0]), int(touched[-1]) + 1)
        pieces.append(_gathered(group, rows, low[rows], high[rows], block_size))
    return tuple(pieces)


def windowed_rows(group: QueryRows, block_size: int, window: int) -> GatheredRows:
    """Each row's new tokens and, of its context, what the first of them sees in a window of that many keys."""
    context = np.array(group.context_lens, dtype=np.int64)
    query = np.array(group.query_lens, dtype=np.int64)
    low = np.maximum(context - (window - 1), 0)
    return _gathered(group, slice(0, len(context)), low, context + query, block_size)


def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts' results as those of their union (Flash-Decoding, Dao et al. 2023).

    out [tokens, num_heads, head_dim]; lse float32 [num_heads, tokens], the natural logarithm of the softmax's sum, -inf
    where a part has no keys (what its out holds there does not count). Returns both, in float32.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    total = torch.zeros(out_a.shape, dtype=torch.float32, device=out_a.device)
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part - lse).nan_to_num_(0.0).T[..., None]  # NaN: -inf - -inf
        total += torch.where(weight > 0, out.float() * weight, 0.0)
    return total, lse


def merge_into(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """As `merge_lse`, into out and lse."""
    merged, merged_lse = merge_lse(out, lse, part, part_lse)
    out.copy_(merged)
    lse.copy_(merged_lse)


def add_context(
    out: Tensor,
    lse: Tensor,
    start: int,
    pieces: Sequence[GatheredRows],
    attend: Callable[[GatheredRows], tuple[Tensor, Tensor]],
    merge: Callable[[Tensor, Tensor, Tensor, Tensor], None] = merge_into,
) -> None:
    """Merge all pieces of a context into out and lse (see `merge_lse`), which are of the step's tokens from `start` on
    among themselves. attend: what it gives for a piece; merge: as `merge_into`. Rounds to out's dtype once."""
    merged = out if len(pieces) == 1 else out.float()
    for piece in pieces:
        span = slice(piece.start - start, piece.end - start)
        merge(merged[span], lse[:, span], *attend(piece))
    if merged is not out:
        out.copy_(merged)


def _gathered(group: QueryRows, rows: slice, low: Int64, high: Int64, block_size: int) -> GatheredRows:
    """Of each row, its tokens at positions low … high - 1."""
    device = group.block_tables.device
    counts = high - low
    ends = counts.cumsum()
    owner = np.repeat(np.arange(rows.start, rows.stop), counts)
    position = np.arange(ends[-1]) + np.repeat(low - (ends - counts), counts)
    where, offset = (torch.from_numpy(a).to(device, non_blocking=True) for a in (owner, position))
    slots = group.block_tables[where, offset // block_size].to(torch.int64) * block_size + offset % block_size
    query_ends = np.cumsum((0, *group.query_lens))
    cu_query_lens = query_ends[rows.start : rows.stop + 1] - query_ends[rows.start]
    return GatheredRows(
        start=group.start + int(query_ends[rows.start]),
        end=group.start + int(query_ends[rows.stop]),
        slots=slots,
        lens=RaggedLens(
            _int32(cu_query_lens, device),
            _int32(np.concatenate([[0], ends]), device),
            max(group.query_lens[rows]),
            int(counts.max()),
        ),
    )


def _int32(values: Int64, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int32)).to(device, non_blocking=True)
