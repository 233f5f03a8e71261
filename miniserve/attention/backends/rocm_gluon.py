"""ROCM_AITER_GLUON: as ROCM_AITER_UNIFIED_ATTN, decode by aiter's Gluon kernel over the shuffled layout, which has
windows, sinks, any scale and many query heads per KV head."""

from __future__ import annotations

from torch import Tensor

from miniserve.attention import aiter
from miniserve.attention.backends.aiter_calls import paged_gluon
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.rocm_unified import UnifiedBackend
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows
from miniserve.attention.spec import AttentionLayer


class GluonBackend(UnifiedBackend):
    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        super().__init__(layout, options)
        self._gluon, self._routes = aiter.load_gluon(), options.routes

    def decode(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, out: Tensor) -> None:
        if self._routes[layer.layer_index].decode == "pa_decode_gluon":
            span = slice(rows.start, rows.end)
            paged_gluon(self._gluon, layer, q[span], cache, rows, out[span])
        else:
            super().decode(layer, q, cache, rows, out)
