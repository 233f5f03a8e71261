"""ROCM_AITER_UNIFIED_ATTN: aiter's unified attention for everything, over either layout."""

from __future__ import annotations

from torch import Tensor

from miniserve.attention.backends.base import QKV
from miniserve.attention.backends.rocm_base import AiterBackend, AiterMetadata
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.spec import AttentionLayer


class UnifiedBackend(AiterBackend[AiterMetadata]):
    def build(self, batch: StepBatch) -> AiterMetadata:
        return AiterMetadata(batch, self.token_ids(batch))

    def decode(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, meta: AiterMetadata, out: Tensor
    ) -> None:
        self.unified(layer, q, cache, rows, out)

    def chunk(
        self, layer: AttentionLayer, tokens: QKV, cache: KVCache, rows: QueryRows, meta: AiterMetadata, out: Tensor
    ) -> None:
        self.unified(layer, tokens[0][rows.start : rows.end], cache, rows, out)
