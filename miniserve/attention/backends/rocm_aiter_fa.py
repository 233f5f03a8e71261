"""ROCM_AITER_FA: aiter's flash attention for prefill and extend, its paged attention for decode.

Extend takes the new tokens' causal part first, then their cached context in gathered pieces of bounded size, and merges
the parts by their log-sum-exps. Layers that these kernels cannot take go to aiter's unified attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from miniserve.attention import aiter
from miniserve.attention.backends.aiter_calls import AiterCalls, PagedDecode, PagedScratch
from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.gathered import GatheredRows, RaggedLens, context_pieces, windowed_rows
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.rope_write import RopeWriter
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.merge import merge_lse
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.routes import fuses_rope, has_wrong_length, least_asm_rows, window_pair
from miniserve.attention.spec import AttentionLayer, AttentionSpec, QKRope
from miniserve.attention.terms import LayerRoute

FLASH = "flash_attn_varlen_func"
CONTEXT_TOKENS = 32768  # of cached context that are gathered at once


@dataclass(frozen=True, slots=True)
class FlashMetadata:
    """token_ids int64 [num_tokens]: see `AiterCalls.rope_and_write`. any_wrong_length: a decode row's length is, or may
    be, one that the ASM kernel gets wrong. Of the extends' context: pieces, for layers without a window; windowed, for
    each window that layers have, the keys that matter to it."""

    batch: StepBatch
    token_ids: Tensor
    any_wrong_length: bool
    pieces: tuple[GatheredRows, ...]
    windowed: dict[int, GatheredRows]


class FlashBackend(Backend[FlashMetadata]):
    graphs = True
    context_tokens = CONTEXT_TOKENS

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        super().__init__(layout, options)
        self._aiter = aiter.load()
        self._writer = RopeWriter(layout, self._aiter, options)
        self._routes = options.routes
        self.fuses_rope = fuses_rope(options.routes)
        self._compute_units = options.platform.compute_units
        self._trust_asm_lengths = options.trust_asm_lengths
        self._calls, self._paged = AiterCalls(self._aiter, layout), PagedDecode(self._aiter, options, layout.block_size)
        flash = [s for s, route in zip(options.specs, options.routes, strict=True) if route.chunks == FLASH]
        self._windows = {spec.sliding_window for spec in flash if spec.sliding_window is not None}
        self._gathers_all = any(spec.sliding_window is None for spec in flash)

    @classmethod
    def scratch_bytes(cls, layout: str, options: BackendOptions) -> int:
        """With a piece of gathered context: keys and values, and of an fp8 cache its codes and what they are in float32
        before they are rounded."""
        tokens = min(CONTEXT_TOKENS, options.max_rows * options.max_seq_len)
        gathered = max(
            spec.num_kv_heads * spec.head_dim * (2 * spec.dtype.itemsize + (6 if spec.kv_dtype.itemsize == 1 else 0))
            for spec in options.specs
        )
        return PagedScratch.sizes(options)[1] + tokens * gathered

    @classmethod
    def extra_block_bytes(cls, layout: KVLayout, spec: AttentionSpec, route: LayerRoute) -> int:
        """`AsmScales`, at most: layers of the same scale share tables."""
        asm = route.decode == "paged_attention_common" and spec.kv_dtype.itemsize == 1
        return 2 * 4 * layout.block_size * spec.num_kv_heads if asm else 0

    def build(self, batch: StepBatch) -> FlashMetadata:
        decode, extend, block_size = batch.decode, batch.extend, self.layout.block_size
        wrong = decode is not None and not self._trust_asm_lengths and has_wrong_length(decode)
        pieces: tuple[GatheredRows, ...] = ()
        windowed: dict[int, GatheredRows] = {}
        if extend is not None:
            pieces = context_pieces(extend, block_size, self.context_tokens) if self._gathers_all else ()
            windowed = {window: windowed_rows(extend, block_size, window) for window in self._windows}
        return FlashMetadata(batch, self._writer.token_ids(batch.slot_mapping), wrong, pieces, windowed)

    def attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, meta: FlashMetadata
    ) -> Tensor:
        self._writer.write(layer, k, v, cache, meta.batch.slot_mapping)
        return self._attend(layer, q, k, v, cache, meta)

    def attend_qkv(
        self, layer: AttentionLayer, qkv: Tensor, rope: QKRope, cache: KVCache, meta: FlashMetadata
    ) -> Tensor:
        batch = meta.batch
        chunks = batch.extend is not None or batch.prefill is not None
        q, k, v = self._writer.rope_and_split(
            layer, qkv, rope, cache, batch.slot_mapping, meta.token_ids, keep_k=chunks
        )
        return self._attend(layer, q, k, v, cache, meta)

    def _attend(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, cache: KVCache, meta: FlashMetadata
    ) -> Tensor:
        out, batch = torch.empty(q.shape, dtype=q.dtype, device=q.device), meta.batch
        if batch.decode is not None:
            self._decode(layer, q, cache, batch.decode, meta.any_wrong_length, out)
        if batch.extend is not None:
            self._extend(layer, q, k, v, cache, batch.extend, meta, out)
        if (rows := batch.prefill) is not None:
            if self._routes[layer.layer_index].chunks == FLASH:
                self._new_tokens(layer, q, k, v, rows, out)
            else:
                self._calls.unified(layer, q, cache, rows, out)
        return out.flatten(1)

    def _decode(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, any_wrong_length: bool, out: Tensor
    ) -> None:
        kernel = self._routes[layer.layer_index].decode
        if kernel == "unified_attention":
            self._calls.unified(layer, q, cache, rows, out)
            return
        span = slice(rows.start, rows.end)
        given = (layer, q[span], cache, rows, out[span])
        if kernel == "paged_attention_v1":
            self._paged.v1(*given)
        elif kernel == "paged_attention_common" and not any_wrong_length and self._takes_asm(layer, rows):
            self._paged.asm(*given)
        else:
            self._paged.rocm(*given)

    def _takes_asm(self, layer: AttentionLayer, rows: QueryRows) -> bool:
        """As aiter would, where it gets no length wrong."""
        least = least_asm_rows(layer.spec, self._compute_units)
        return least is not None and rows.end >= least

    def _extend(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        rows: QueryRows,
        meta: FlashMetadata,
        out: Tensor,
    ) -> None:
        window = layer.spec.sliding_window
        span = slice(rows.start, rows.end)
        if self._routes[layer.layer_index].chunks != FLASH:
            self._calls.unified(layer, q, cache, rows, out)
        elif window is not None:
            self._cached_tokens(layer, q, cache, meta.windowed[window], out[span], causal=True)
        else:
            lse = self._new_tokens(layer, q, k, v, rows, out)
            merged = out[span].float()
            for piece in meta.pieces:
                part = slice(piece.start - rows.start, piece.end - rows.start)
                found = torch.empty_like(out[piece.start : piece.end])
                found_lse = self._cached_tokens(layer, q, cache, piece, found, causal=False)
                merged[part], lse[:, part] = merge_lse(merged[part], lse[:, part], found, found_lse)
            out[span] = merged

    def _new_tokens(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, out: Tensor
    ) -> Tensor:
        """The rows' tokens among themselves, of the whole step's q, k, v into its out. Returns lse float32 [num_heads,
        the rows' tokens]."""
        span = slice(rows.start, rows.end)
        lens = RaggedLens(rows.cu_query_lens, rows.cu_query_lens, rows.max_query_len, rows.max_query_len)
        return self._flash(layer, q[span], k[span], v[span], lens, out[span], causal=True)

    def _cached_tokens(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: GatheredRows, out: Tensor, *, causal: bool
    ) -> Tensor:
        """The rows' query tokens (of the whole step's q) over gathered keys, into out, which is theirs alone; causal:
        the last of the keys are the query tokens' own. Returns lse as `_new_tokens`."""
        k, v = self.layout.read_tokens(cache, rows.slots, layer.spec.dtype, layer.k_scale, layer.v_scale)
        return self._flash(layer, q[rows.start : rows.end], k, v, rows.lens, out, causal=causal)

    def _flash(
        self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, lens: RaggedLens, out: Tensor, *, causal: bool
    ) -> Tensor:
        _, lse = self._aiter.flash_attn_varlen_func(
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
        return lse
