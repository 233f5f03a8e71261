"""ROCM_AITER_UNIFIED_ATTN: aiter's unified attention for everything, over either layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miniserve.attention.aiter import Aiter
from miniserve.attention.backends.aiter_calls import AiterCalls
from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.rope_write import RopeWriter
from miniserve.attention.backends.rows import QueryRows, chunk_rows, decode_rows
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import StepBatch
from miniserve.attention.routes import fuses_rope
from miniserve.attention.spec import AttentionLayer, QKRope


@dataclass(frozen=True, slots=True)
class UnifiedMetadata:
    """slot_mapping, token_ids int64 [num_tokens]. Decode rows come first, then the chunks."""

    slot_mapping: Tensor
    token_ids: Tensor
    decode: QueryRows | None
    chunks: tuple[QueryRows, ...]


class UnifiedBackend(Backend[UnifiedMetadata]):
    graphs = True

    def __init__(self, layout: KVLayout, aiter: Aiter, writer: RopeWriter, options: BackendOptions) -> None:
        super().__init__(layout)
        self._calls, self._writer = AiterCalls(aiter, layout), writer
        self.fuses_rope = fuses_rope(options.routes)
        self._counting = torch.arange(options.max_rows + 1, dtype=torch.int32, device=options.device)

    def build(self, batch: StepBatch) -> UnifiedMetadata:
        decode = None if batch.decode is None else decode_rows(batch.decode, self._counting)
        chunks = tuple(chunk_rows(group) for group in batch.chunks)
        return UnifiedMetadata(batch.slot_mapping, self._writer.token_ids(batch.slot_mapping), decode, chunks)

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, meta: UnifiedMetadata
    ) -> Tensor:
        self._writer.write_unturned(layer, k, v, cache, meta.slot_mapping)
        return self._over_cache(layer, q, cache, meta)

    def attend_qkv(
        self, layer: AttentionLayer, qkv: Tensor, rope: QKRope, cache: KVCache, meta: UnifiedMetadata
    ) -> Tensor:
        q, _, _ = self._writer.write(layer, qkv, rope, cache, meta.slot_mapping, meta.token_ids, keep_k=False)
        return self._over_cache(layer, q, cache, meta)

    def _over_cache(self, layer: AttentionLayer, q: Tensor, cache: KVCache, meta: UnifiedMetadata) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if meta.decode is not None:
            self.decode(layer, q, cache, meta.decode, out)
        for rows in meta.chunks:
            self._calls.unified(layer, q, cache, rows, out)
        return out.flatten(1)

    def decode(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, out: Tensor) -> None:
        """As `AiterCalls.unified`, of rows of one query token."""
        self._calls.unified(layer, q, cache, rows, out)
