"""What the ROCm backends share: aiter's kernels as they call them, with the scratch memory that these write to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from miniserve.attention import aiter
from miniserve.attention.backends.base import QKV, BackendOptions
from miniserve.attention.backends.paged import PagedBackend, PagedMetadata, split_heads
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.routes import kv_cache_dtype, window_pair
from miniserve.attention.spec import AttentionLayer, QKRope, fp8_scales

_PARTITION = 256  # keys that one program of the HIP kernels takes


class PagedScratch:
    """What the HIP kernels' partitions leave for their reduction, allocated once at its largest: per row, head and
    partition the values, the largest logit and the sum of exponentials."""

    def __init__(self, options: BackendOptions) -> None:
        self._entries, size = self.sizes(options)
        # paged_attention_v1 lays the three parts out in it by itself, the other kernels are given each.
        self.workspace = torch.empty(size, dtype=torch.uint8, device=options.device)

    @staticmethod
    def sizes(options: BackendOptions) -> tuple[int, int]:
        """The most (row, head, partition) entries of any layer, and the bytes of them with the most bytes of values."""
        rows = options.max_rows * -(-options.max_seq_len // _PARTITION)
        entries = max(rows * spec.num_heads for spec in options.specs)
        values = max(rows * spec.num_heads * spec.head_dim * spec.dtype.itemsize for spec in options.specs)
        return entries, 2 * 4 * entries + values

    def parts(self, q: Tensor, max_seq_len: int) -> tuple[Tensor, Tensor, Tensor]:
        """exp_sums, max_logits float32 [rows, H, partitions]; tmp_out [rows, H, partitions, D] of q's dtype."""
        rows, heads, head_dim = q.shape
        partitions = -(-max_seq_len // _PARTITION)
        shape, size, stride = (rows, heads, partitions), rows * heads * partitions, 4 * self._entries
        sums, logits = (self.workspace[at : at + 4 * size].view(torch.float32).view(shape) for at in (0, stride))
        values = self.workspace[2 * stride :].view(q.dtype)[: size * head_dim].view(*shape, head_dim)
        return sums, logits, values


class AsmScales:
    """The scales of an fp8 cache as the ASM kernel reads them: float32 [num_blocks, num_kv_heads, block_size] for keys
    and for values, each full of the layer's one scale. Layers of the same scale share a table."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._tables: dict[tuple[int, int, float], Tensor] = {}

    def of(self, layer: AttentionLayer, cache: KVCache) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """The layer's tables, made when it is first asked for them, which reads its scales on the host; None where its
        cache is not fp8."""
        if not layer.spec.fp8_kv:
            return None, None
        if layer.layer_index not in self._layers:
            k, v = (self._table(float(scale), cache.key) for scale in (layer.k_scale, layer.v_scale))
            self._layers[layer.layer_index] = k, v
        return self._layers[layer.layer_index]

    def _table(self, scale: float, plane: Tensor) -> Tensor:
        num_blocks, num_kv_heads = plane.shape[:2]
        shape = (num_blocks, num_kv_heads, self._block_size)
        known = (num_blocks, num_kv_heads, scale)
        if known not in self._tables:
            self._tables[known] = torch.full(shape, scale, dtype=torch.float32, device=plane.device)
        return self._tables[known]


@dataclass(frozen=True, slots=True)
class AiterMetadata(PagedMetadata):
    """token_ids int64 [num_tokens] 0, 1, 2, …: what aiter's writer takes for positions in the step's own angles."""

    token_ids: Tensor


Metadata = TypeVar("Metadata", bound=AiterMetadata)


class AiterBackend(PagedBackend[Metadata]):
    """Rope and write by aiter where the layer's route says so (the write alone never: aiter's makes NaN of what an fp8
    cache cannot hold), and its unified attention."""

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        super().__init__(layout, options)
        self._aiter = aiter.load()
        self._linear = layout.name == "linear"
        self._counting = torch.arange(options.max_rows, dtype=torch.int64, device=options.device)

    def token_ids(self, batch: StepBatch) -> Tensor:
        """As of `AiterMetadata`; of decode rows alone it is always the same memory."""
        slots = batch.slot_mapping
        if len(slots) <= len(self._counting):
            return self._counting[: len(slots)]
        return torch.arange(len(slots), dtype=torch.int64, device=slots.device)

    def rope_and_write(self, layer: AttentionLayer, qkv: Tensor, rope: QKRope, cache: KVCache, meta: Metadata) -> QKV:
        if self._routes[layer.layer_index].write != "fused_qk_rope_reshape_and_cache":
            return super().rope_and_write(layer, qkv, rope, cache, meta)
        q, k, v = split_heads(layer, qkv)
        q, k, *_ = self._aiter.fused_qk_rope_reshape_and_cache(
            q,
            k,
            v,
            cache.key,
            cache.value,
            meta.batch.slot_mapping,
            meta.token_ids,
            *rope.cos_sin.chunk(2, dim=-1),
            *fp8_scales(layer),
            is_neox=True,
            flash_layout=self._linear,
            output_zeros=False,
        )
        return q, k, v

    def unified(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, out: Tensor) -> None:
        """Rows of any number of query tokens, which are in the cache already, over either layout. q, out [the rows'
        tokens, num_heads, head_dim]."""
        spec = layer.spec
        k_scale, v_scale = fp8_scales(layer)
        self._aiter.unified_attention(
            q=q,
            k=cache.key,
            v=cache.value,
            out=out,
            cu_seqlens_q=rows.cu_query_lens,
            max_seqlen_q=rows.max_query_len,
            seqused_k=rows.seq_lens,
            max_seqlen_k=rows.max_seq_len,
            softmax_scale=spec.scale,
            causal=True,
            window_size=window_pair(spec.sliding_window),
            block_table=rows.block_tables,
            softcap=spec.softcap or 0.0,
            q_descale=None,
            k_descale=k_scale,
            v_descale=v_scale,
            sinks=layer.sinks,
            shuffled_kv_cache=not self._linear,
        )


class PagedDecode:
    """Its paged attention: decode rows of one query token, q, out [rows, num_heads, head_dim]."""

    def __init__(self, options: BackendOptions, block_size: int) -> None:
        self._aiter = aiter.load()
        self._scratch = PagedScratch(options)
        self.asm_scales = AsmScales(block_size)

    def v1(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, out: Tensor) -> None:
        """Decode over the linear layout."""
        spec = layer.spec
        self._aiter.paged_attention_v1(
            out,
            self._scratch.workspace,
            q,
            cache.key,
            cache.value,
            spec.scale,
            rows.block_tables,
            None,
            rows.seq_lens,
            rows.max_seq_len,
            None,
            kv_cache_dtype(spec.kv_dtype),
            "NHD",
            spec.softcap or 0.0,
            layer.k_scale,
            layer.v_scale,
            sliding_window=spec.sliding_window or 0,
        )

    def rocm(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, out: Tensor) -> None:
        """Decode over the shuffled layout by the HIP kernel."""
        spec = layer.spec
        self._aiter.paged_attention_rocm(
            out,
            *self._scratch.parts(q, rows.max_seq_len),
            q,
            cache.key,
            cache.value,
            spec.num_kv_heads,
            spec.scale,
            rows.block_tables,
            rows.seq_lens,
            cache.key.shape[3],
            rows.max_seq_len,
            None,
            kv_cache_dtype(spec.kv_dtype),
            layer.k_scale,
            layer.v_scale,
        )

    def asm(self, layer: AttentionLayer, q: Tensor, cache: KVCache, rows: QueryRows, out: Tensor) -> None:
        """Decode over the shuffled layout where aiter's own rule takes the ASM kernel (see `routes`)."""
        spec = layer.spec
        exp_sums, max_logits, tmp_out = self._scratch.parts(q, rows.max_seq_len)
        k_table, v_table = self.asm_scales.of(layer, cache)
        self._aiter.paged_attention_common(
            Q=q,
            K=cache.key,
            V=cache.value,
            exp_sums=exp_sums,
            max_logits=max_logits,
            tmp_out=tmp_out,
            block_tables=rows.block_tables,
            context_lens=rows.seq_lens,
            block_tables_stride0=rows.block_tables.stride(0),
            scale=spec.scale,
            max_seq_len=rows.max_seq_len,
            K_QScale_hip=layer.k_scale,
            V_QScale_hip=layer.v_scale,
            K_QScale_asm=k_table,
            V_QScale_asm=v_table,
            out_=out,
            # 2 names the one kernel that is right over an fp8 cache, and forces it; 1 leaves the route to aiter's rule.
            high_precision=2 if spec.fp8_kv else 1,
            kv_cache_dtype=kv_cache_dtype(spec.kv_dtype),
            kv_cache_tensor_dtype=spec.kv_dtype,
        )
