"""ROCM_AITER_UNIFIED_ATTN: aiter's unified attention for everything, over either layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from miniserve.attention.aiter import Aiter
from miniserve.attention.backends.aiter_calls import unified, write_kv
from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.rope_write import RopeWriter
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import ChunkRows, DecodeRows, StepBatch
from miniserve.attention.routes import fuses_rope
from miniserve.attention.spec import AttentionLayer, QKRope


@dataclass(frozen=True, slots=True)
class RowsMetadata:
    """Rows of query tokens, the step's [start, end). cu_query_lens int32 [rows + 1]; seq_lens int32 [rows], counting
    the query's own tokens; block_tables int32 [rows, width]; no row has more than max_query_len, max_seq_len."""

    start: int
    end: int
    cu_query_lens: torch.Tensor
    max_query_len: int
    seq_lens: torch.Tensor
    max_seq_len: int
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class UnifiedMetadata:
    """slot_mapping, token_ids int64 [num_tokens]. Decode rows come first, then the chunks."""

    slot_mapping: torch.Tensor
    token_ids: torch.Tensor
    decode: RowsMetadata | None
    chunks: tuple[RowsMetadata, ...]


class UnifiedBackend(Backend[UnifiedMetadata]):
    graphs = True

    def __init__(self, layout: KVLayout, aiter: Aiter, writer: RopeWriter, options: BackendOptions) -> None:
        super().__init__(layout)
        self._aiter, self._writer = aiter, writer
        self.fuses_rope = fuses_rope(options.routes)
        self._counting = torch.arange(options.max_rows + 1, dtype=torch.int32, device=options.device)

    def build(self, batch: StepBatch) -> UnifiedMetadata:
        decode = None if batch.decode is None else decode_rows(batch.decode, self._counting)
        chunks = tuple(chunk_rows(group) for group in (batch.extend, batch.prefill) if group is not None)
        return UnifiedMetadata(batch.slot_mapping, self._writer.token_ids(batch.slot_mapping), decode, chunks)

    def attend(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        meta: UnifiedMetadata,
    ) -> torch.Tensor:
        write_kv(self._aiter, self.layout, layer, k, v, cache, meta.slot_mapping)
        return self._over_cache(layer, q, cache, meta)

    def attend_qkv(
        self, layer: AttentionLayer, qkv: torch.Tensor, rope: QKRope, cache: KVCache, meta: UnifiedMetadata
    ) -> torch.Tensor:
        q, _, _ = self._writer.write(layer, qkv, rope, cache, meta.slot_mapping, meta.token_ids, keep_k=False)
        return self._over_cache(layer, q, cache, meta)

    def _over_cache(
        self, layer: AttentionLayer, q: torch.Tensor, cache: KVCache, meta: UnifiedMetadata
    ) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if meta.decode is not None:
            self.decode(layer, q, cache, meta.decode, out)
        for rows in meta.chunks:
            attend_rows(self._aiter, self.layout, layer, q, cache, rows, out)
        return out.flatten(1)

    def decode(
        self, layer: AttentionLayer, q: torch.Tensor, cache: KVCache, rows: RowsMetadata, out: torch.Tensor
    ) -> None:
        """As `attend_rows`, of rows of one query token."""
        attend_rows(self._aiter, self.layout, layer, q, cache, rows, out)


def decode_rows(rows: DecodeRows, counting: torch.Tensor) -> RowsMetadata:
    """counting int32: 0, 1, 2, … for as many rows as there ever are."""
    num_rows = rows.seq_lens.shape[0]
    return RowsMetadata(0, num_rows, counting[: num_rows + 1], 1, rows.seq_lens, rows.max_seq_len, rows.block_tables)


def chunk_rows(group: ChunkRows) -> RowsMetadata:
    longest = max(query + context for query, context in zip(group.query_lens, group.context_lens, strict=True))
    end = group.query_start + sum(group.query_lens)
    queries = (group.cu_query_lens, max(group.query_lens))
    return RowsMetadata(group.query_start, end, *queries, group.seq_lens, longest, group.block_tables)


def attend_rows(
    aiter: Aiter,
    layout: KVLayout,
    layer: AttentionLayer,
    q: torch.Tensor,
    cache: KVCache,
    rows: RowsMetadata,
    out: torch.Tensor,
) -> None:
    """q, out [num_tokens, num_heads, head_dim] of the whole step; writes the rows' part of out."""
    unified(
        aiter,
        layer,
        q[rows.start : rows.end],
        cache,
        shuffled=layout.name == "shuffled",
        cu_query_lens=rows.cu_query_lens,
        max_query_len=rows.max_query_len,
        seq_lens=rows.seq_lens,
        max_seq_len=rows.max_seq_len,
        block_tables=rows.block_tables,
        out=out[rows.start : rows.end],
    )
