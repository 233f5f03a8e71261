"""A step as the runner hands it to a backend: what kernels over the paged cache read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Int64 = np.ndarray[tuple[int], np.dtype[np.int64]]


def table_width(longest: int, block_size: int) -> int:
    """Columns of the block tables of rows of up to `longest` tokens: kernels may look up the block of the next one."""
    return longest // block_size + 1


@dataclass(frozen=True, slots=True)
class QueryRows:
    """Sequences whose new tokens are the step's tokens [start, end), row after row. See `decode_rows`, `chunk_rows`.

    cu_query_lens int32 [rows + 1] starts at 0; seq_lens int32 [rows] counts cached and new tokens (0 in a padding row,
    of which there are some behind the others only: a kernel may spoil what follows a row without keys); block_tables
    int32 [rows, width]. No row has more than max_query_len new tokens, max_seq_len in all.

    On the host, of chunks: query_lens, new tokens, and context_lens, cached ones. Of decode rows: host_seq_lens, None
    where the step was captured in a graph and runs with other lengths than these; fresh: as of `paged_decode`.
    """

    start: int
    end: int
    cu_query_lens: Tensor
    max_query_len: int
    seq_lens: Tensor
    max_seq_len: int
    block_tables: Tensor
    query_lens: tuple[int, ...] = ()
    context_lens: tuple[int, ...] = ()
    host_seq_lens: Int64 | None = None
    fresh: int | None = None


def decode_rows(
    block_tables: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    host_seq_lens: Int64 | None = None,
    *,
    fresh: int | None = None,
    cu_query_lens: Tensor | None = None,
) -> QueryRows:
    """The step's first tokens, one a row. cu_query_lens: 0, 1, 2, …, None to have it made."""
    rows = seq_lens.shape[0]
    if cu_query_lens is None:
        cu_query_lens = torch.arange(rows + 1, dtype=torch.int32, device=seq_lens.device)
    return QueryRows(0, rows, cu_query_lens, 1, seq_lens, max_seq_len, block_tables, (), (), host_seq_lens, fresh)


def chunk_rows(
    start: int,
    query_lens: tuple[int, ...],
    context_lens: tuple[int, ...],
    cu_query_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
) -> QueryRows:
    """Chunks of prompts, from the step's token `start` on."""
    longest = max(map(sum, zip(query_lens, context_lens, strict=True)))
    queries = (start, start + sum(query_lens), cu_query_lens, max(query_lens))
    return QueryRows(*queries, seq_lens, longest, block_tables, query_lens, context_lens)


@dataclass(frozen=True, slots=True)
class ReadTokens:
    """The tokens of a step whose hidden states are read: indices int64 [R], each of them a row of `rows`."""

    indices: Tensor
    rows: QueryRows


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Tokens lie in the order decode | extend (with cached context) | prefill (without).

    slot_mapping int64 [num_tokens]: where each token's key and value go; a negative slot is not written.
    read: all that the last layer computes beside keys and values; None for all tokens.
    """

    slot_mapping: Tensor
    decode: QueryRows | None = None
    extend: QueryRows | None = None
    prefill: QueryRows | None = None
    read: ReadTokens | None = None

    @property
    def chunks(self) -> tuple[QueryRows, ...]:
        """Those there are, in order."""
        return tuple(group for group in (self.extend, self.prefill) if group is not None)
