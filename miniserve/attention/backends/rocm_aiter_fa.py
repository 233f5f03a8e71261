"""ROCM_AITER_FA: aiter's flash attention for prefill and extend, its paged attention for decode.

Extend takes the new tokens' causal part first, then their cached context in gathered pieces of bounded size, and merges
the parts by their log-sum-exps. Layers that these kernels cannot take go to aiter's unified attention.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from miniserve.attention.backends.base import QKV, BackendOptions
from miniserve.attention.backends.gathered import GatheredRows, RaggedLens, add_context, context_pieces, windowed_rows
from miniserve.attention.backends.rocm_base import AiterBackend, AiterMetadata, PagedDecode, PagedScratch
from miniserve.attention.layouts import KVCache, KVLayout, decoded
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.routes import has_wrong_length, least_asm_rows, window_pair
from miniserve.attention.spec import AttentionLayer, AttentionSpec
from miniserve.attention.terms import LayerRoute

FLASH = "flash_attn_varlen_func"
CONTEXT_TOKENS = 32768  # of cached context that are gathered at once


@dataclass(frozen=True, slots=True)
class FlashMetadata(AiterMetadata):
    """any_wrong_length: a decode row's length is, or may be, one that the ASM kernel gets wrong. Of the extends'
    context: pieces, for layers without a window; windowed, for each window that layers have, the keys that matter to
    it."""

    any_wrong_length: bool
    pieces: tuple[GatheredRows, ...]
    windowed: dict[int, GatheredRows]


class FlashBackend(AiterBackend[FlashMetadata]):
    reads_new_keys = True
    context_tokens = CONTEXT_TOKENS

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        super().__init__(layout, options)
        self._compute_units = options.platform.compute_units
        self._trust_asm_lengths = options.trust_asm_lengths
        self._paged = PagedDecode(options, layout.block_size)
        flash = [s for s, route in zip(options.specs, options.routes, strict=True) if route.chunks == FLASH]
        self._windows = {spec.sliding_window for spec in flash if spec.sliding_window is not None}
        self._gathers_all = any(spec.sliding_window is None for spec in flash)

    @classmethod
    def scratch_bytes(cls, layout: str, options: BackendOptions) -> int:
        """With a piece of gathered context: keys and values, and of an fp8 cache its codes and what they are in float32
        before they are rounded."""
        tokens = min(CONTEXT_TOKENS, options.max_rows * options.max_seq_len)
        gathered = max(
            spec.num_kv_heads * spec.head_dim * (2 * spec.dtype.itemsize + (6 if spec.fp8_kv else 0))
            for spec in options.specs
        )
        return PagedScratch.sizes(options)[1] + tokens * gathered

    @classmethod
    def extra_block_bytes(cls, layout: KVLayout, spec: AttentionSpec, route: LayerRoute) -> int:
        """`AsmScales`, at most: layers of the same scale share tables."""
        asm = route.decode == "paged_attention_common" and spec.fp8_kv
        return 2 * 4 * layout.block_size * spec.num_kv_heads if asm else 0

    def build(self, batch: StepBatch) -> FlashMetadata:
        decode, extend, block_size = batch.decode, batch.extend, self.layout.block_size
        wrong = decode is not None and not self._trust_asm_lengths and has_wrong_length(decode)
        pieces: tuple[GatheredRows, ...] = ()
        windowed: dict[int, GatheredRows] = {}
        if extend is not None:
            pieces = context_pieces(extend, block_size, self.context_tokens) if self._gathers_all else ()
            windowed = {window: windowed_rows(extend, block_size, window) for window in self._windows}
        return FlashMetadata(batch, self.token_ids(batch), wrong, pieces, windowed)

    def decode(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, meta: FlashMetadata, out: Tensor
    ) -> None:
        kernel = self._routes[layer.layer_index].decode
        if kernel == "unified_attention":
            self.unified(layer, q, cache, rows, out)
        elif kernel == "paged_attention_v1":
            self._paged.v1(layer, q, cache, rows, out)
        elif kernel == "paged_attention_common" and not meta.any_wrong_length and self._takes_asm(layer, rows):
            self._paged.asm(layer, q, cache, rows, out)
        else:
            self._paged.rocm(layer, q, cache, rows, out)

    def _takes_asm(self, layer: AttentionLayer, rows: QueryRows) -> bool:
        """As aiter would, where it gets no length wrong."""
        least = least_asm_rows(layer.spec, self._compute_units)
        return least is not None and rows.end >= least

    def chunk(
        self, layer: AttentionLayer, tokens: QKV, cache: KVCache, rows: QueryRows, meta: FlashMetadata, out: Tensor
    ) -> None:
        q, k, v = (each[rows.start : rows.end] for each in tokens)
        has_context, window = rows is meta.batch.extend, layer.spec.sliding_window

        def attend(gathered: GatheredRows, *, causal: bool = False, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
            """causal: the last of the keys are the query tokens' own."""
            found = self.layout.gather_tokens(cache, gathered.slots)
            keys, values = decoded(found, layer.spec.dtype, layer.k_scale, layer.v_scale)
            queries = tokens[0][gathered.start : gathered.end]
            return self._flash(layer, queries, keys, values, gathered.lens, causal=causal, out=out)

        if self._routes[layer.layer_index].chunks != FLASH:
            self.unified(layer, q, cache, rows, out)
        elif has_context and window is not None:
            attend(meta.windowed[window], causal=True, out=out)
        else:
            lens = RaggedLens(rows.cu_query_lens, rows.cu_query_lens, rows.max_query_len, rows.max_query_len)
            _, lse = self._flash(layer, q, k, v, lens, causal=True, out=out)
            if has_context:
                add_context(out, lse, rows.start, meta.pieces, attend)

    def _flash(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lens: RaggedLens,
        *,
        causal: bool,
        out: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Returns out and lse float32 [num_heads, tokens]."""
        return self._aiter.flash_attn_varlen_func(
            q,
            k,
            v,
            *lens,
            softmax_scale=layer.spec.scale,
            logits_soft_cap=layer.spec.softcap or 0.0,
            causal=causal,
            window_size=window_pair(layer.spec.sliding_window),
            return_lse=True,
            out=out,
        )
