"""Rows of query tokens that are in the cache already, as kernels over the paged cache take them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from miniserve.attention.metadata import ChunkRows, DecodeRows


@dataclass(frozen=True, slots=True)
class QueryRows:
    """The step's tokens [start, end). cu_query_lens int32 [rows + 1]; seq_lens int32 [rows], counting the query's own
    tokens; block_tables int32 [rows, width]; no row has more than max_query_len, max_seq_len."""

    start: int
    end: int
    cu_query_lens: Tensor
    max_query_len: int
    seq_lens: Tensor
    max_seq_len: int
    block_tables: Tensor


def decode_rows(rows: DecodeRows, counting: Tensor) -> QueryRows:
    """counting int32: 0, 1, 2, … for as many rows as there ever are."""
    num_rows = rows.seq_lens.shape[0]
    return QueryRows(0, num_rows, counting[: num_rows + 1], 1, rows.seq_lens, rows.max_seq_len, rows.block_tables)


def chunk_rows(group: ChunkRows) -> QueryRows:
    longest = max(map(sum, zip(group.query_lens, group.context_lens, strict=True)))
    end = group.query_start + sum(group.query_lens)
    queries = (group.cu_query_lens, max(group.query_lens))
    return QueryRows(group.query_start, end, *queries, group.seq_lens, longest, group.block_tables)
