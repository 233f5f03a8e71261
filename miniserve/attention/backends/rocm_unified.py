"""ROCM_AITER_UNIFIED_ATTN: aiter's unified attention for everything, over either layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miniserve.attention import aiter
from miniserve.attention.backends.aiter_calls import AiterCalls
from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.rope_write import RopeWriter
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.routes import fuses_rope
from miniserve.attention.spec import AttentionLayer, QKRope


@dataclass(frozen=True, slots=True)
class UnifiedMetadata:
    """token_ids int64 [num_tokens]: see `AiterCalls.rope_and_write`."""

    batch: StepBatch
    token_ids: Tensor


class UnifiedBackend(Backend[UnifiedMetadata]):
    graphs = True

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        super().__init__(layout, options)
        known = aiter.load()
        self._calls, self._writer = AiterCalls(known, layout), RopeWriter(layout, known, options)
        self.fuses_rope = fuses_rope(options.routes)

    def build(self, batch: StepBatch) -> UnifiedMetadata:
        return UnifiedMetadata(batch, self._writer.token_ids(batch.slot_mapping))

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, meta: UnifiedMetadata
    ) -> Tensor:
        self._writer.write(layer, k, v, cache, meta.batch.slot_mapping)
        return self._over_cache(layer, q, cache, meta.batch)

    def attend_qkv(
        self, layer: AttentionLayer, qkv: Tensor, rope: QKRope, cache: KVCache, meta: UnifiedMetadata
    ) -> Tensor:
        q, _, _ = self._writer.rope_and_split(
            layer, qkv, rope, cache, meta.batch.slot_mapping, meta.token_ids, keep_k=False
        )
        return self._over_cache(layer, q, cache, meta.batch)

    def _over_cache(self, layer: AttentionLayer, q: Tensor, cache: KVCache, batch: StepBatch) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if batch.decode is not None:
            self.decode(layer, q, cache, batch.decode, out)
        for rows in (batch.extend, batch.prefill):
            if rows is not None:
                self._calls.unified(layer, q, cache, rows, out)
        return out.flatten(1)

    def decode(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, out: Tensor) -> None:
        """As `AiterCalls.unified`, of rows of one query token."""
        self._calls.unified(layer, q, cache, rows, out)
