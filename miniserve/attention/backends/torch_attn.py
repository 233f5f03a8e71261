"""TORCH_ATTN: every path in PyTorch alone, on any device. The reference, and the fallback where nothing better runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from miniserve.attention.backends.base import QKV, Backend
from miniserve.attention.formula import attention_by_formula, visible_keys
from miniserve.attention.layouts import KVCache, decoded
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.spec import AttentionLayer, AttentionSpec


@dataclass(frozen=True, slots=True)
class TorchMetadata:
    """chunks: of each its tokens in the step, how many of its tokens are cached, and its row's blocks, int64, as many
    as all of them need; None without cached ones."""

    batch: StepBatch
    chunks: tuple[tuple[slice, int, Tensor | None], ...]


class TorchBackend(Backend[TorchMetadata]):
    def build(self, batch: StepBatch) -> TorchMetadata:
        return TorchMetadata(batch, tuple(chunk for rows in batch.chunks for chunk in self._chunks(rows)))

    def _chunks(self, rows: QueryRows) -> Iterator[tuple[slice, int, Tensor | None]]:
        start = rows.start
        for row, (query_len, context_len) in enumerate(zip(rows.query_lens, rows.context_lens, strict=True)):
            blocks = None
            if context_len:
                blocks = rows.block_tables[row, : -(-(context_len + query_len) // self.layout.block_size)].long()
            yield slice(start, start + query_len), context_len, blocks
            start += query_len

    def attend(self, layer: AttentionLayer, tokens: QKV, cache: KVCache, meta: TorchMetadata) -> Tensor:
        q, k, v = tokens
        self.write(layer, cache, k, v, meta.batch.slot_mapping)
        parts: list[Tensor] = []
        if (rows := meta.batch.decode) is not None:
            parts.append(self.decode(layer, q[: rows.end], cache, rows))
        for span, context_len, block_ids in meta.chunks:
            parts.append(self.chunk(layer, q[span], k[span], v[span], cache, context_len, block_ids))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(self, layer: AttentionLayer, cache: KVCache, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        self.layout.write(cache, k, v, slot_mapping, layer.k_scale, layer.v_scale)

    def read(self, layer: AttentionLayer, cache: KVCache, block_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks' keys and values in the dtype the layer computes in."""
        return decoded(self.layout.gather(cache, block_ids), layer.spec.dtype, layer.k_scale, layer.v_scale)

    def decode(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows) -> Tensor:
        """q [rows, num_heads, head_dim] -> [rows, num_heads * head_dim]. All rows at once over their gathered blocks,
        padded to the longest: one copy of the rows' cache, but no Python per row. (A call per row on views costs more
        from a few rows on; CPU_ATTN does neither.)"""
        k, v = self.read(layer, cache, rows.block_tables.long())
        k, v = k.flatten(1, 2), v.flatten(1, 2)  # [rows, width * block_size, KH, D]
        distance = rows.seq_lens[:, None] - 1 - torch.arange(k.shape[1], device=q.device)
        visible = visible_keys(distance, layer.spec.sliding_window)  # [rows, keys]
        for gathered in (k, v):  # what others left may be NaN, which a weight of 0 does not hide
            gathered.masked_fill_(~visible[..., None, None], 0.0)
        return grouped_attention(layer, q[:, None], k, v, visible[:, None]).flatten(1)

    def chunk(
        self,
        layer: AttentionLayer,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        context_len: int,
        block_ids: Tensor | None,
    ) -> Tensor:
        """One chunk's q, k, v [query_len, heads, head_dim], already written -> [query_len, num_heads * head_dim]."""
        num_keys, window = context_len + q.shape[0], layer.spec.sliding_window
        if block_ids is not None:
            k, v = self.read(layer, cache, block_ids)
            k, v = k.flatten(0, 1)[:num_keys], v.flatten(0, 1)[:num_keys]
        visible = None
        if context_len or window is not None or _needs_formula(layer.spec):
            positions = torch.arange(num_keys, device=q.device)
            visible = visible_keys(positions[context_len:, None] - positions, window)[None]
        return grouped_attention(layer, q[None], k[None], v[None], visible)[0].flatten(1)


def _needs_formula(spec: AttentionSpec) -> bool:
    return spec.softcap is not None or spec.sinks


def grouped_attention(layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention of q [B, Lq, H, D] over k, v [B, Lk, KH, D], query head h reading kv head h // (H // KH).

    visible bool [B, Lq, Lk]; None: causal with Lq == Lk, of a layer without softcap and sinks. Softmax in float32.
    Returns [B, Lq, H, D].
    """
    spec = layer.spec
    if visible is not None and _needs_formula(spec):
        out = attention_by_formula(q, k, v, visible, scale=spec.scale, softcap=spec.softcap, sinks=layer.sinks)
        return out.to(q.dtype)
    mask = None if visible is None else visible[:, None]
    batch, q_len, num_heads, head_dim = q.shape
    group = num_heads // spec.num_kv_heads
    # Each kv head's queries become rows of one matrix, so that k and v are read once and never repeated.
    grouped = q.view(batch, q_len, spec.num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    if q_len == 1:
        out = scaled_dot_product_attention(
            grouped.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=spec.scale
        )[:, :, :, None]
    else:
        shape = (batch, spec.num_kv_heads, group, k.shape[1], head_dim)
        keys, values = (t.transpose(1, 2)[:, :, None].expand(shape).flatten(1, 2) for t in (k, v))
        out = scaled_dot_product_attention(
            grouped.flatten(1, 2), keys, values, attn_mask=mask, is_causal=visible is None, scale=spec.scale
        ).view(batch, spec.num_kv_heads, group, q_len, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, q_len, num_heads, head_dim)
