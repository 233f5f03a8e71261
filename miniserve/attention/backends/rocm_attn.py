"""ROCM_ATTN: aiter's HIP paged attention for decode over the shuffled layout; the engine's own Triton kernels for
prefill and extend, and for the decode of layers that the HIP kernel cannot take (a window, sinks, a softcap)."""

from __future__ import annotations

from torch import Tensor

from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.paged import PagedMetadata
from miniserve.attention.backends.rocm_base import PagedDecode, PagedScratch
from miniserve.attention.backends.triton_attn import TritonBackend
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows
from miniserve.attention.spec import AttentionLayer


class RocmBackend(TritonBackend):
    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        super().__init__(layout, options)
        self.chunks_in_graphs = 0  # nobody has seen aiter's decode in one
        self._paged = PagedDecode(options, layout.block_size)

    @classmethod
    def scratch_bytes(cls, layout: str, options: BackendOptions) -> int:
        return PagedScratch.sizes(options)[1]

    def decode(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, meta: PagedMetadata, out: Tensor
    ) -> None:
        if self._routes[layer.layer_index].decode == "paged_attention_rocm":
            self._paged.rocm(layer, q, cache, rows, out)
        else:
            super().decode(layer, q, cache, rows, meta, out)
