"""TRITON_ATTN: the engine's own Triton kernels for everything, on NVIDIA's and AMD's GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.paged_kernels import PagedKernels, SplitPlan
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import ChunkRows, StepBatch
from miniserve.attention.routes import fuses_rope
from miniserve.attention.spec import AttentionLayer, AttentionSpec, QKRope


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """block_tables int32 [rows, width]; seq_lens int32 [rows], counting the query's own token; no row is longer than
    max_seq_len."""

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class ChunkMetadata:
    """Chunks, with or without context, that are the step's tokens [start, end). Tensors as in `ChunkRows`."""

    start: int
    end: int
    max_query_len: int
    cu_query_lens: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor


@dataclass(frozen=True, slots=True)
class PagedMetadata:
    """slot_mapping int64 [num_tokens]. Decode rows come first, then the chunks."""

    slot_mapping: torch.Tensor
    decode: DecodeMetadata | None
    chunks: tuple[ChunkMetadata, ...]


class TritonBackend(Backend[PagedMetadata]):
    graphs = True

    def __init__(self, layout: KVLayout, kernels: PagedKernels, options: BackendOptions) -> None:
        super().__init__(layout)
        self._kernels = kernels
        self.fuses_rope = fuses_rope(options.routes)
        self._shuffled = layout.name == "shuffled"
        platform = options.platform
        sizes = (platform.arch, platform.compute_units, options.max_rows, options.max_seq_len, options.device)
        self._plans = {_shape(spec): SplitPlan(kernels, spec, *sizes) for spec in options.specs}

    def build(self, batch: StepBatch) -> PagedMetadata:
        rows = batch.decode
        decode = None if rows is None else DecodeMetadata(rows.block_tables, rows.seq_lens, rows.max_seq_len)
        chunks = tuple(_chunk(group) for group in (batch.extend, batch.prefill) if group is not None)
        return PagedMetadata(batch.slot_mapping, decode, chunks)

    def attend(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        meta: PagedMetadata,
    ) -> torch.Tensor:
        self.write(layer, k, v, cache, meta.slot_mapping)
        return self._over_cache(layer, q, cache, meta)

    def attend_qkv(
        self, layer: AttentionLayer, qkv: torch.Tensor, rope: QKRope, cache: KVCache, meta: PagedMetadata
    ) -> torch.Tensor:
        q = rope_and_write(self._kernels.rope_and_write, self.layout, layer, qkv, rope, cache, meta.slot_mapping)
        return self._over_cache(layer, q, cache, meta)

    def _over_cache(self, layer: AttentionLayer, q: torch.Tensor, cache: KVCache, meta: PagedMetadata) -> torch.Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if meta.decode is not None:
            rows = meta.decode.seq_lens.shape[0]
            self.decode(layer, q[:rows], cache, meta.decode, out[:rows])
        for chunk in meta.chunks:
            span = slice(chunk.start, chunk.end)
            self.extend(layer, q[span], cache, chunk, out[span])
        return out.flatten(1)

    def write(
        self, layer: AttentionLayer, k: torch.Tensor, v: torch.Tensor, cache: KVCache, slot_mapping: torch.Tensor
    ) -> None:
        k_scale, v_scale = scales(layer)
        self._kernels.write_kv(
            k,
            v,
            cache.key,
            cache.value,
            slot_mapping,
            block_size=self.layout.block_size,
            shuffled=self._shuffled,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    def decode(
        self, layer: AttentionLayer, q: torch.Tensor, cache: KVCache, meta: DecodeMetadata, out: torch.Tensor
    ) -> None:
        """q, out [rows, num_heads, head_dim]."""
        plan = self._plans[_shape(layer.spec)]
        self._kernels.paged_decode(
            q,
            cache.key,
            cache.value,
            meta.block_tables,
            meta.seq_lens,
            num_splits=plan.splits(q.shape[0], meta.max_seq_len),
            scratch=plan.scratch,
            out=out,
            **self._terms(layer),
        )

    def extend(
        self, layer: AttentionLayer, q: torch.Tensor, cache: KVCache, meta: ChunkMetadata, out: torch.Tensor
    ) -> None:
        """q, out [tokens, num_heads, head_dim]."""
        self._kernels.paged_extend(
            q,
            cache.key,
            cache.value,
            meta.block_tables,
            meta.cu_query_lens,
            meta.seq_lens,
            max_query_len=meta.max_query_len,
            out=out,
            **self._terms(layer),
        )

    def _terms(self, layer: AttentionLayer) -> dict[str, object]:
        spec = layer.spec
        k_scale, v_scale = scales(layer)
        return {
            "num_kv_heads": spec.num_kv_heads,
            "block_size": self.layout.block_size,
            "shuffled": self._shuffled,
            "scale": spec.scale,
            "window": spec.sliding_window,
            "softcap": spec.softcap,
            "sinks": layer.sinks,
            "k_scale": k_scale,
            "v_scale": v_scale,
        }


def rope_and_write(
    kernel: Callable[..., torch.Tensor],
    layout: KVLayout,
    layer: AttentionLayer,
    qkv: torch.Tensor,
    rope: QKRope,
    cache: KVCache,
    slot_mapping: torch.Tensor,
    k_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`PagedKernels.rope_and_write`, for a layer; k_out [num_tokens, num_kv_heads, head_dim]: for k rotated too, of the
    tokens that are written. Returns q rotated."""
    spec = layer.spec
    k_scale, v_scale = scales(layer)
    return kernel(
        qkv,
        rope.cos_sin,
        rope.q_weight,
        rope.k_weight,
        rope.eps,
        cache.key,
        cache.value,
        slot_mapping,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        block_size=layout.block_size,
        shuffled=layout.name == "shuffled",
        k_scale=k_scale,
        v_scale=v_scale,
        k_out=k_out,
    )


def scales(layer: AttentionLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The layer's scales where its cache is fp8, which alone has any."""
    return (layer.k_scale, layer.v_scale) if layer.spec.kv_dtype.itemsize == 1 else (None, None)


def _chunk(group: ChunkRows) -> ChunkMetadata:
    end = group.query_start + sum(group.query_lens)
    return ChunkMetadata(
        group.query_start, end, max(group.query_lens), group.cu_query_lens, group.seq_lens, group.block_tables
    )


def _shape(spec: AttentionSpec) -> tuple[int, int, int]:
    return spec.num_heads, spec.num_kv_heads, spec.head_dim
