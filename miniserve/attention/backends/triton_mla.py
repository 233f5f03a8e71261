"""TRITON_MLA: latent attention with the engine's own Triton kernels for decode and cache writes, on NVIDIA's and AMD's
GPUs; chunks by Hopper's matrix units or else through PyTorch's flash attention, where there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.gathered import RaggedLens
from miniserve.attention.backends.latent_base import whole
from miniserve.attention.backends.torch_mla import TorchLatentBackend
from miniserve.attention.backends.triton_attn import CHUNKS_IN_GRAPHS
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionSpec, LatentLayer, LatentRope
from miniserve.kernels.triton.launch import cdiv, choose_splits, mla_launch, scratch_sizes

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_MAX_DIM = 256  # and a multiple of 8


def _launches(spec: AttentionSpec, options: BackendOptions) -> list[tuple[int, int]]:
    """(rows, splits) of every number of rows that is split."""
    rows = range(1, options.max_rows + 1)
    launches = [(count, _splits(spec, options.platform, count, options.max_seq_len)) for count in rows]
    return [launch for launch in launches if launch[1] > 1]


def _splits(spec: AttentionSpec, platform: Platform, rows: int, max_seq_len: int) -> int:
    launch = mla_launch(platform.vendor, spec.num_heads, spec.kv_dtype.itemsize)
    return choose_splits(rows, cdiv(spec.num_heads, launch.block_m), max_seq_len, launch, platform.compute_units)


class TritonLatentBackend(TorchLatentBackend):
    """Where flash attention cannot serve a chunk (float32, AMD), PyTorch's plain operations do, as in TORCH_MLA."""

    graphs = fuses_rope = True
    contexts_in_graphs = False  # how much there is to gather of them the host must know

    def __init__(self, layout: KVLayout, options: BackendOptions) -> None:
        from miniserve.kernels.triton.cache_write import norm_rope_latent, write_latent
        from miniserve.kernels.triton.elementwise import merge_lse
        from miniserve.kernels.triton.mla_decode import mla_decode
        from miniserve.kernels.triton.runtime import gluon_kernels
        from miniserve.kernels.triton.split_kv import DecodeScratch

        super().__init__(layout, options)
        self._decode_kernel, self._write_kernel, self._merge_kernel = mla_decode, write_latent, merge_lse
        self._rope_kernel = norm_rope_latent
        self._hopper = gluon_kernels("hopper_extend", options.device, "prefill attention runs slower")
        self._hopper_mla = gluon_kernels("hopper_mla", options.device, "latent decode attention runs slower")
        # PyTorch's operations read the chunks' lengths on the host, its flash attention was not seen in a graph.
        if self._hopper is not None and all(map(self._attends_dense, options.specs)):
            self.chunks_in_graphs = CHUNKS_IN_GRAPHS
        self._max_seq_len, self._platform = options.max_seq_len, options.platform
        self._scratch = {
            spec: DecodeScratch.allocate(_launches(spec, options), spec.num_heads, spec.latent_rank, options.device)
            for spec in dict.fromkeys(options.specs)
        }

    def _attends_dense(self, spec: AttentionSpec) -> bool:
        dims = spec.latent
        sizes = dims and (dims.nope_dim, dims.rope_dim, dims.v_head_dim)
        return bool(spec.dtype.itemsize == 2 and self._hopper and sizes == self._hopper.DENSE_DIMS)

    @classmethod
    def scratch_bytes(cls, layout: str, options: BackendOptions) -> int:
        """What the splits of each kind of layer leave for their merge."""
        total = 0
        for spec in dict.fromkeys(options.specs):
            entries, counters = scratch_sizes(_launches(spec, options), spec.num_heads)
            total += 4 * (entries * (spec.latent_rank + 1) + counters)
        return total

    def decode(self, layer: LatentLayer, q: Tensor, q_pe: Tensor, cache: KVCache, meta: QueryRows) -> Tensor:
        spec = layer.spec
        longest = min(self._max_seq_len, meta.block_tables.shape[1] * self.layout.block_size)
        given = q, q_pe, cache.key, meta.block_tables, meta.seq_lens
        terms: dict[str, Any] = {"scale": spec.scale, "fresh": meta.fresh, "scratch": self._scratch[spec]}
        if self._hopper_mla is not None and self._hopper_mla.can_decode(q, q_pe, cache.key):
            # Never more splits than the other kernel's, which the scratch has room for.
            splits = self._hopper_mla.splits_of(q.shape[0], longest, self._platform.compute_units)
            found: Tensor = self._hopper_mla.hopper_mla(*given, **terms, num_splits=splits)
            return found
        splits = _splits(spec, self._platform, q.shape[0], longest)
        return self._decode_kernel(*given, **terms, kv_scale=latent_scale(layer), num_splits=splits)

    def write(self, layer: LatentLayer, cache: KVCache, kv_c: Tensor, k_pe: Tensor, slot_mapping: Tensor) -> None:
        self._write_kernel(kv_c, k_pe, cache.key, slot_mapping, kv_scale=latent_scale(layer))

    def rope_and_write(
        self, layer: LatentLayer, cache: KVCache, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, rope: LatentRope,
        batch: StepBatch,
    ) -> None:  # fmt: skip
        self._rope_kernel(
            q_pe, kv_c, k_pe, rope.weight, rope.eps, rope.cos_sin, interleaved=rope.interleaved, kv_cache=cache.key,
            slot_mapping=batch.slot_mapping, kv_scale=latent_scale(layer),
            settled=batch.decode is not None and batch.decode.fresh is not None,
        )  # fmt: skip

    def merge(self, out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        self._merge_kernel(out, lse, part, part_lse)

    def attend_dense(
        self, layer: LatentLayer, q: Tensor, k: tuple[Tensor, Tensor], v: Tensor, lens: RaggedLens, *, causal: bool
    ) -> tuple[Tensor, Tensor]:
        if self._hopper is not None and self._hopper.can_attend_dense(q, *k, v):
            starts = lens.cu_query_lens, lens.cu_key_lens, lens.max_query_len
            found: tuple[Tensor, Tensor] = self._hopper.hopper_dense(
                q, *k, v, *starts, scale=layer.spec.scale, causal=causal
            )
            return found
        dim = dense_dim(q, v)
        if self._platform.vendor == "hip" or q.dtype not in _FLASH_DTYPES or dim > _FLASH_MAX_DIM:
            return super().attend_dense(layer, q, k, v, lens, causal=causal)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(padded(tensor, dim) for tensor in (q, whole(k), v)), *lens, 0.0, causal, False, scale=layer.spec.scale
        )
        return out[..., : v.shape[-1]], lse


def dense_dim(q: Tensor, v: Tensor) -> int:
    """The one size of queries, keys and values, a multiple of 8, that flash attention is given."""
    return 8 * cdiv(max(q.shape[-1], v.shape[-1]), 8)


def padded(tensor: Tensor, dim: int) -> Tensor:
    """With zeros, which change neither a score nor a sum."""
    return tensor if tensor.shape[-1] == dim else functional.pad(tensor, (0, dim - tensor.shape[-1]))


def latent_scale(layer: LatentLayer) -> Tensor | None:
    """The layer's scale where its cache is fp8, which alone has one."""
    return layer.kv_scale if layer.spec.fp8_kv else None
