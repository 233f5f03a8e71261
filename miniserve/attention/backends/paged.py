"""What backends over keys and values of KV heads share: cache writes by the engine's kernels, alone or with the rope
before them in one launch, and the order of a step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from miniserve.attention.backends.base import QKV, Backend, BackendOptions
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.routes import fuses_rope
from miniserve.attention.spec import AttentionLayer, QKRope, fp8_scales


@dataclass(frozen=True, slots=True)
class PagedMetadata:
    batch: StepBatch


Metadata = TypeVar("Metadata", bound=PagedMetadata)


def cache_terms(layout: KVLayout, layer: AttentionLayer) -> dict[str, Any]:
    """What every kernel over the layer's cache is told of it."""
    k_scale, v_scale = fp8_scales(layer)
    shuffled = layout.name == "shuffled"
    return {"block_size": layout.block_size, "shuffled": shuffled, "k_scale": k_scale, "v_scale": v_scale}


class PagedBackend(Backend[Metadata]):
    """`decode` and `chunk` write to out [tokens, num_heads, head_dim], the rows' part of it."""

    graphs = True
    reads_new_keys = False  # False: `chunk` may get anything for k and v, which it reads from the cache

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        from miniserve.kernels.triton.cache_write import rope_and_write, write_kv

        super().__init__(layout, options)
        self._write_kv, self._rope_and_write = write_kv, rope_and_write
        self._routes = options.routes
        self.fuses_rope = fuses_rope(options.routes)

    @abstractmethod
    def decode(
        self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, meta: Metadata, out: Tensor
    ) -> None:
        """Rows of one query token; q [rows, num_heads, head_dim]."""

    @abstractmethod
    def chunk(
        self, layer: AttentionLayer, tokens: QKV, cache: KVCache, rows: QueryRows, meta: Metadata, out: Tensor
    ) -> None:
        """`StepBatch.extend` or `StepBatch.prefill`; tokens: the whole step's."""

    def attend(self, layer: AttentionLayer, tokens: QKV, cache: KVCache, meta: Metadata) -> Tensor:
        _, k, v = tokens
        self._write_kv(k, v, cache.key, cache.value, meta.batch.slot_mapping, **cache_terms(self.layout, layer))
        return self._over_cache(layer, tokens, cache, meta)

    def attend_qkv(self, layer: AttentionLayer, qkv: Tensor, rope: QKRope, cache: KVCache, meta: Metadata) -> Tensor:
        return self._over_cache(layer, self.rope_and_write(layer, qkv, rope, cache, meta), cache, meta)

    def rope_and_write(self, layer: AttentionLayer, qkv: Tensor, rope: QKRope, cache: KVCache, meta: Metadata) -> QKV:
        """qkv as of `StepContext.attend_qkv`. Returns q normed and rotated; and where they are read k, likewise, of the
        tokens that are written to the cache, and v."""
        spec, batch = layer.spec, meta.batch
        k = v = qkv
        k_out = None
        if self.reads_new_keys and batch.chunks:
            _, k, v = split_heads(layer, qkv)
            k = k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
        q = self._rope_and_write(
            qkv,
            rope.cos_sin,
            rope.q_weight,
            rope.k_weight,
            rope.eps,
            cache.key,
            cache.value,
            batch.slot_mapping,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            settled=batch.decode is not None and batch.decode.fresh is not None,
            k_out=k_out,
            **cache_terms(self.layout, layer),
        )
        return q, k, v

    def _over_cache(self, layer: AttentionLayer, tokens: QKV, cache: KVCache, meta: Metadata) -> Tensor:
        q, batch = tokens[0], meta.batch
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if (rows := batch.decode) is not None:
            self.decode(layer, q[: rows.end], cache, rows, meta, out[: rows.end])
        for rows in batch.chunks:
            self.chunk(layer, tokens, cache, rows, meta, out[rows.start : rows.end])
        return out.flatten(1)


def split_heads(layer: AttentionLayer, qkv: Tensor) -> QKV:
    """Views of a fused product's outputs."""
    spec = layer.spec
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    q, k, v = qkv.unflatten(1, (-1, spec.head_dim)).split(heads, dim=1)
    return q, k, v
