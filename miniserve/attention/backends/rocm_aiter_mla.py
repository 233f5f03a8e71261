"""ROCM_AITER_MLA: aiter's hand-written MLA decode in its persistent form and its flash attention for chunks, on AMD's
Instinct GPUs; the engine's own cache writer, as aiter's makes NaN of what an fp8 cache cannot hold.

Persistent: as many workgroups as the GPU has compute units, whose work a planning kernel lays down at the start of a
step, in six buffers that never move; so a captured step plans itself anew at every replay. The kernels take 16, 32, …,
128 heads and pages of one token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.attention import aiter
from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.gathered import RaggedLens
from miniserve.attention.backends.latent_base import LatentBackend, whole
from miniserve.attention.backends.triton_mla import dense_dim, latent_scale, padded
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows
from miniserve.attention.routes import padded_heads
from miniserve.attention.spec import AttentionSpec, LatentLayer

# In the order that aiter tells their sizes in. Its functions take them in other orders: always by name.
_BUFFERS = (
    "work_metadata_ptrs",
    "work_indptr",
    "work_info_set",
    "reduce_indptr",
    "reduce_final_map",
    "reduce_partial_map",
)
_RANK = 512
_MOST_COMPUTE_UNITS = 304
_ASM_DENSE_DIMS = (192, 128)  # of key and value; other pairs are padded to equals


class AiterLatentBackend(LatentBackend[tuple[Tensor, ...]]):
    graphs = True

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        from miniserve.kernels.triton.cache_write import write_latent
        from miniserve.kernels.triton.token_indices import token_indices

        super().__init__(layout, options)
        self._aiter = aiter.load_latent()
        self._token_indices, self._write_kernel = token_indices, write_latent
        # Its assembly hung all MI325X of a host in long prefills, until a cold reboot (aiter #3139, open).
        self._asm_dense_dims = None if options.platform.is_mi325x else _ASM_DENSE_DIMS
        rows, device = options.max_rows, options.device
        self._kv_indptr = torch.zeros(rows + 1, dtype=torch.int32, device=device)
        self._kv_indices = torch.zeros(rows * options.max_seq_len, dtype=torch.int32, device=device)
        self._ones = torch.ones(rows, dtype=torch.int32, device=device)
        self._plans = {spec: self._allocate(spec, rows, device) for spec in dict.fromkeys(options.specs)}

    @classmethod
    def scratch_bytes(cls, layout: str, options: BackendOptions) -> int:
        """Token indices, and the parts of split rows in float32, which aiter allocates in every call: by the tiles of
        16 heads that its plan has room for, of up to 48 heads on gfx950 all of them in each tile."""
        heads = max(padded_heads(spec.num_heads) for spec in options.specs)
        tiles = heads // 16 if heads < 64 else 1
        parts = min(options.max_rows + _MOST_COMPUTE_UNITS - 1, 2 * (_MOST_COMPUTE_UNITS - 1))
        return 4 * options.max_rows * options.max_seq_len + 4 * parts * tiles * heads * (_RANK + 1)

    def _allocate(self, spec: AttentionSpec, rows: int, device: torch.device) -> dict[str, Tensor]:
        sizes = self._aiter.get_mla_metadata_info_v1(
            rows, 1, padded_heads(spec.num_heads), spec.dtype, spec.kv_dtype, is_sparse=False, fast_mode=True
        )
        return {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, (shape, dtype) in zip(_BUFFERS, sizes, strict=True)
        }

    def build_decode(self, rows: QueryRows) -> tuple[Tensor, ...]:
        """Pages of one token, as the kernel takes them: qo_indptr, kv_indptr int32 [rows + 1]; kv_indices int32, where
        the rows' tokens lie, row after row; kv_last_page_lens int32 [rows], ones."""
        kv_indptr, last_page_lens = self._kv_indptr[: rows.end + 1], self._ones[: rows.end]
        # A row without keys, padding, would spoil what its workgroup computes after it: it attends to one.
        lens = rows.seq_lens.clamp(min=1)
        torch.cumsum(lens, 0, dtype=torch.int32, out=kv_indptr[1:])
        self._token_indices(
            rows.block_tables,
            lens,
            kv_indptr,
            self._kv_indices,
            block_size=self.layout.block_size,
            max_seq_len=rows.max_seq_len,
        )
        for spec, plan in self._plans.items():
            self._aiter.get_mla_metadata_v1(
                seqlens_qo_indptr=rows.cu_query_lens,
                seqlens_kv_indptr=kv_indptr,
                kv_last_page_lens=last_page_lens,
                num_heads_per_head_k=padded_heads(spec.num_heads),
                num_heads_k=1,
                is_causal=True,
                page_size=1,
                kv_granularity=16,
                max_seqlen_qo=1,
                uni_seqlen_qo=1,
                fast_mode=True,
                dtype_q=spec.dtype,
                dtype_kv=spec.kv_dtype,
                **plan,
            )
        return rows.cu_query_lens, kv_indptr, self._kv_indices, last_page_lens

    def decode(self, layer: LatentLayer, q: Tensor, q_pe: Tensor, cache: KVCache, meta: tuple[Tensor, ...]) -> Tensor:
        """Queries stay in bfloat16 over an fp8 cache too: nothing is lost to a second rounding, and the fp8 kernels for
        32 and 64 heads, of which some fault and some were wrong, are never met."""
        spec, heads = layer.spec, q.shape[1]
        q = torch.cat([q, q_pe], dim=-1)
        if (missing := padded_heads(heads) - heads) > 0:
            q = functional.pad(q, (0, 0, 0, missing))
        out = torch.empty((*q.shape[:2], _RANK), dtype=q.dtype, device=q.device)
        plan = dict(self._plans[spec])
        self._aiter.mla_decode_fwd(
            q,
            cache.key.view(-1, 1, 1, spec.head_dim),
            out,
            *meta,
            1,
            page_size=1,
            sm_scale=spec.scale,
            # Told, aiter keeps to the plan; otherwise it may drop it from 32 rows on for kernels whose own splits lie
            # in a cache of tensors, from which one that a graph reads may be evicted.
            num_kv_splits=self._aiter.compute_units,
            work_meta_data=plan.pop("work_metadata_ptrs"),
            **plan,
            kv_scale=latent_scale(layer),
        )
        return out[:, :heads]

    def write(self, layer: LatentLayer, cache: KVCache, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
        self._write_kernel(kv_c, k_pe, cache.key, slot_mapping, kv_scale=latent_scale(layer))

    def attend_dense(
        self, layer: LatentLayer, q: Tensor, k: tuple[Tensor, Tensor], v: Tensor, lens: RaggedLens, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        width, keys = v.shape[-1], whole(k)
        if (q.shape[-1], width) != self._asm_dense_dims:
            q, keys, v = (padded(tensor, dense_dim(q, v)) for tensor in (q, keys, v))
        out, lse = self._aiter.flash_attn_varlen_func(
            q,
            keys,
            v,
            *lens,
            softmax_scale=layer.spec.scale,
            causal=causal,
            return_lse=True,
        )
        return out[..., :width], lse
