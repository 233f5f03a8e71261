"""ROCM_AITER_GLUON: as ROCM_AITER_UNIFIED_ATTN, decode by aiter's Gluon kernel over the shuffled layout, which has
windows, sinks, any scale and many query heads per KV head."""

from __future__ import annotations

from torch import Tensor

from miniserve.attention import aiter
from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.rocm_base import AiterMetadata
from miniserve.attention.backends.rocm_unified import UnifiedBackend
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows
from miniserve.attention.spec import AttentionLayer, fp8_scales


class GluonBackend(UnifiedBackend):
    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        super().__init__(layout, options)
        self._gluon = aiter.load_gluon()

    def decode(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, meta: AiterMetadata, out: Tensor
    ) -> None:
        """One program takes all keys of a row and KV head: what splits leave would be summed by one of three kernels,
        of which v0.1.20.post1 finds none where neither its C++ one nor FlyDSL is installed. A window of W keys, the
        query's own among them, is W + 1 to it: it takes the query to stand after the last key."""
        if self._routes[layer.layer_index].decode != "pa_decode_gluon":
            super().decode(layer, q, cache, rows, meta, out)
            return
        spec = layer.spec
        k_scale, v_scale = fp8_scales(layer)
        self._gluon(
            out,
            q,
            cache.key,
            cache.value,
            rows.seq_lens,
            rows.block_tables,
            spec.scale,
            query_length=1,
            max_context_partition_num=1,
            compute_type=spec.dtype,
            key_scale=k_scale,
            value_scale=v_scale,
            sinks=layer.sinks,
            sliding_window=0 if spec.sliding_window is None else spec.sliding_window + 1,
        )
