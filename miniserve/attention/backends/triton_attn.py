"""TRITON_ATTN: the engine's own Triton kernels for everything, on NVIDIA's and AMD's GPUs.

On NVIDIA's, chunks of a shuffled cache read a copy of their blocks in the linear layout. No chunk reads its own keys
and values dense, as they were before an fp8 cache rounded them: what a query sees must not depend on how its prompt was
cut.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from miniserve.attention.backends.base import CHUNKS_IN_GRAPH, Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.paged_kernels import PagedKernels, SplitPlan
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import ChunkRows, StepBatch
from miniserve.attention.routes import fuses_rope
from miniserve.attention.spec import AttentionLayer, AttentionSpec, QKRope
from miniserve.kernels.triton.launch import cdiv, extend_launch, extend_splits

LINEARIZE_FROM = 16  # query tokens of a chunk; shorter ones are read in place about as fast (measured on an H100)
LINEARIZED_TOKENS = 32768  # cached tokens that are copied at most, for all of a step's chunks; more are read in place


def linearized_bytes(specs: Sequence[AttentionSpec], most_tokens: int) -> int:
    """What the copy for a layer takes at most."""
    token = max(2 * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.itemsize for spec in specs)
    return min(LINEARIZED_TOKENS, most_tokens) * token


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """block_tables int32 [rows, width]; seq_lens int32 [rows], counting the query's own token; no row is longer than
    max_seq_len."""

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int


@dataclass(frozen=True, slots=True)
class ChunkMetadata:
    """Chunks, with or without context, that are the step's tokens [start, end). Tensors as in `ChunkRows`. chunks: how
    many there are (those without a token not counted); no sequence is longer than max_seq_len.
    linear_tables: as block_tables, of the blocks' copies in the linear layout; None: the cache is read itself."""

    start: int
    end: int
    chunks: int
    max_query_len: int
    max_seq_len: int
    cu_query_lens: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    linear_tables: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class PagedMetadata:
    """slot_mapping int64 [num_tokens]. Decode rows come first, then the chunks."""

    slot_mapping: torch.Tensor
    decode: DecodeMetadata | None
    chunks: tuple[ChunkMetadata, ...]


class TritonBackend(Backend[PagedMetadata]):
    """linearize_from: query tokens of a chunk from which the blocks it sees are copied into the linear layout."""

    graphs = True

    def __init__(
        self,
        layout: KVLayout,
        kernels: PagedKernels,
        options: BackendOptions,
        *,
        linearize_from: int = LINEARIZE_FROM,
    ) -> None:
        super().__init__(layout)
        self._kernels = kernels
        self.fuses_rope = fuses_rope(options.routes)
        self._shuffled = layout.name == "shuffled"
        platform = options.platform
        # Copies and splits of chunks were measured on NVIDIA's GPUs alone.
        on_nvidia = platform.arch.startswith("sm_")
        self._split_over = platform.compute_units if on_nvidia else 1
        copies = self._shuffled and on_nvidia
        self._linearize_from = linearize_from if copies else sys.maxsize
        # A graph copies block tables of any length, so it must have room for the longest.
        self.chunk_graphs = not copies or CHUNKS_IN_GRAPH * options.max_seq_len <= LINEARIZED_TOKENS
        sizes = (platform.arch, platform.compute_units, options.max_rows, options.max_seq_len, options.device)
        self._plans = {_shape(spec): SplitPlan(kernels, spec, *sizes) for spec in options.specs}

    def build(self, batch: StepBatch) -> PagedMetadata:
        rows = batch.decode
        decode = None if rows is None else DecodeMetadata(rows.block_tables, rows.seq_lens, rows.max_seq_len)
        chunks = tuple(self._chunk(group) for group in (batch.extend, batch.prefill) if group is not None)
        return PagedMetadata(batch.slot_mapping, decode, chunks)

    def _chunk(self, group: ChunkRows) -> ChunkMetadata:
        longest, end = max(group.query_lens), group.query_start + sum(group.query_lens)
        chunks = sum(length > 0 for length in group.query_lens)
        max_seq_len = max(map(sum, zip(group.query_lens, group.context_lens, strict=True)))
        tables, linear_tables = group.block_tables, None
        if longest >= self._linearize_from and tables.numel() * self.layout.block_size <= LINEARIZED_TOKENS:
            linear_tables = torch.arange(tables.numel(), dtype=torch.int32, device=tables.device).view(tables.shape)
        return ChunkMetadata(
            group.query_start,
            end,
            chunks,
            longest,
            max_seq_len,
            group.cu_query_lens,
            group.seq_lens,
            tables,
            linear_tables,
        )

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
        planes, tables, terms = (cache.key, cache.value), meta.block_tables, self._terms(layer)
        lens = (meta.cu_query_lens, meta.seq_lens)
        if meta.linear_tables is not None:
            planes = self._kernels.linearize(*planes, tables, *lens, window=layer.spec.sliding_window)
            tables, terms["shuffled"] = meta.linear_tables, False
        self._kernels.paged_extend(
            q,
            *planes,
            tables,
            *lens,
            max_query_len=meta.max_query_len,
            num_splits=self._extend_splits(layer.spec, meta),
            out=out,
            **terms,
        )

    def _extend_splits(self, spec: AttentionSpec, meta: ChunkMetadata) -> int:
        rows = meta.max_query_len * spec.num_heads // spec.num_kv_heads
        launch = extend_launch("cuda", spec.head_dim, spec.kv_dtype.itemsize, rows)
        programs = spec.num_kv_heads * cdiv(rows, launch.block_m) * meta.chunks
        return extend_splits(programs, meta.max_seq_len, self._split_over)

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


def _shape(spec: AttentionSpec) -> tuple[int, int, int]:
    return spec.num_heads, spec.num_kv_heads, spec.head_dim
