"""TORCH_ATTN: every path in PyTorch alone, on any device. The reference, and the fallback where nothing better runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from miniserve.attention.backends.base import Backend
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import ChunkRows, StepBatch
from miniserve.attention.spec import AttentionLayer, AttentionSpec


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """block_tables int32 [rows, width]; seq_lens int32 [rows], counting the query's own token."""

    block_tables: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class ChunkMetadata:
    """One prefill (context_len 0) or extend chunk: query tokens [query_start, query_start + query_len) of the step.

    block_ids int64 [blocks]: the row's blocks, as many as cover context_len + query_len tokens; None without context.
    """

    query_start: int
    query_len: int
    context_len: int
    block_ids: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class TorchMetadata:
    """slot_mapping int64 [num_tokens]. Decode rows come first, then the chunks."""

    slot_mapping: torch.Tensor
    decode: DecodeMetadata | None
    chunks: tuple[ChunkMetadata, ...]


class TorchBackend(Backend[TorchMetadata]):
    def build(self, batch: StepBatch) -> TorchMetadata:
        rows = batch.decode
        decode = None if rows is None else DecodeMetadata(rows.block_tables, rows.seq_lens)
        chunks = [chunk for group in (batch.extend, batch.prefill) if group for chunk in self._chunks(group)]
        return TorchMetadata(batch.slot_mapping, decode, tuple(chunks))

    def _chunks(self, group: ChunkRows) -> Iterator[ChunkMetadata]:
        start = group.query_start
        for row, (query_len, context_len) in enumerate(zip(group.query_lens, group.context_lens, strict=True)):
            blocks = None
            if context_len:
                blocks = group.block_tables[row, : -(-(context_len + query_len) // self.layout.block_size)].long()
            yield ChunkMetadata(start, query_len, context_len, blocks)
            start += query_len

    def attend(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        meta: TorchMetadata,
    ) -> torch.Tensor:
        self.write(layer, cache, k, v, meta.slot_mapping)
        parts: list[torch.Tensor] = []
        if meta.decode is not None:
            rows = meta.decode.seq_lens.shape[0]
            parts.append(self.decode(layer, q[:rows], cache, meta.decode))
        for chunk in meta.chunks:
            span = slice(chunk.query_start, chunk.query_start + chunk.query_len)
            parts.append(self.chunk(layer, q[span], k[span], v[span], cache, chunk))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write(
        self, layer: AttentionLayer, cache: KVCache, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        self.layout.write(cache, k, v, slot_mapping, layer.k_scale, layer.v_scale)

    def read(self, layer: AttentionLayer, cache: KVCache, block_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The blocks' keys and values in the dtype the layer computes in."""
        return self.layout.read(cache, block_ids, layer.spec.dtype, layer.k_scale, layer.v_scale)

    def decode(self, layer: AttentionLayer, q: torch.Tensor, cache: KVCache, meta: DecodeMetadata) -> torch.Tensor:
        """q [rows, num_heads, head_dim] -> [rows, num_heads * head_dim]. All rows at once over their gathered blocks,
        padded to the longest: one copy of the rows' cache, but no Python per row. (A call per row on views costs more
        from a few rows on; CPU_ATTN does neither.)"""
        k, v = self.read(layer, cache, meta.block_tables.long())
        k, v = k.flatten(1, 2), v.flatten(1, 2)  # [rows, width * block_size, KH, D]
        distance = meta.seq_lens[:, None] - 1 - torch.arange(k.shape[1], device=q.device)
        visible = _visible(distance, layer.spec.sliding_window)[:, None]  # [rows, 1, keys]
        return grouped_attention(layer, q[:, None], k, v, visible).flatten(1)

    def chunk(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        meta: ChunkMetadata,
    ) -> torch.Tensor:
        """One chunk's q, k, v [query_len, heads, head_dim], already written -> [query_len, num_heads * head_dim]."""
        num_keys = meta.context_len + meta.query_len
        if meta.block_ids is not None:
            k, v = self.read(layer, cache, meta.block_ids)
            k, v = k.flatten(0, 1)[:num_keys], v.flatten(0, 1)[:num_keys]
        positions = torch.arange(num_keys, device=q.device)
        distance = positions[meta.context_len :, None] - positions
        causal = meta.context_len == 0 and layer.spec.sliding_window is None
        visible = None if causal else _visible(distance, layer.spec.sliding_window)
        return grouped_attention(
            layer, q[None], k[None], v[None], None if visible is None else visible[None], distance=distance
        )[0].flatten(1)


def _visible(distance: torch.Tensor, window: int | None) -> torch.Tensor:
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def grouped_attention(
    layer: AttentionLayer,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    distance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of q [B, Lq, H, D] over k, v [B, Lk, KH, D], query head h reading kv head h // (H // KH).

    visible bool [B, Lq, Lk]; None means causal with Lq == Lk. Softmax in float32. Returns [B, Lq, H, D].
    """
    spec = layer.spec
    if spec.softcap is not None or spec.sinks:
        return _explicit_attention(spec, layer.sinks, q, k, v, _mask(visible, distance))
    batch, q_len, num_heads, head_dim = q.shape
    group = num_heads // spec.num_kv_heads
    # Each kv head's queries become rows of one matrix, so that k and v are read once and never repeated.
    grouped = q.view(batch, q_len, spec.num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    if q_len == 1:
        out = scaled_dot_product_attention(
            grouped.flatten(2, 3),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=None if visible is None else visible[:, None],
            scale=spec.scale,
        )[:, :, :, None]
    else:
        shape = (batch, spec.num_kv_heads, group, k.shape[1], head_dim)
        keys, values = (t.transpose(1, 2)[:, :, None].expand(shape).flatten(1, 2) for t in (k, v))
        out = scaled_dot_product_attention(
            grouped.flatten(1, 2),
            keys,
            values,
            attn_mask=None if visible is None else visible[:, None],
            is_causal=visible is None,
            scale=spec.scale,
        ).view(batch, spec.num_kv_heads, group, q_len, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(batch, q_len, num_heads, head_dim)


def _mask(visible: torch.Tensor | None, distance: torch.Tensor | None) -> torch.Tensor:
    if visible is not None:
        return visible
    if distance is None:
        raise ValueError("either visible or distance must be given")
    return (distance >= 0)[None]


def _explicit_attention(
    spec: AttentionSpec,
    sinks: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
) -> torch.Tensor:
    """The formula written out in float32, for what PyTorch's fused attention lacks: softcap and sinks."""
    group = spec.num_heads // spec.num_kv_heads
    queries = q.float().unflatten(2, (spec.num_kv_heads, group))
    scores = torch.einsum("bqhgd,bkhd->bhgqk", queries, k.float()) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, spec.num_kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return torch.einsum("bhgqk,bkhd->bqhgd", weights, v.float()).flatten(2, 3).to(q.dtype)
