"""Cache writes. For backends over aiter: rope and write in one launch by its own kernel or by the engine's, as the
layer's route says; the write alone by the engine's, as aiter's makes NaN of what an fp8 cache cannot hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from miniserve.attention.aiter import Aiter
from miniserve.attention.backends.aiter_calls import AiterCalls
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.spec import AttentionLayer, QKRope, fp8_scales


def cache_terms(layout: KVLayout, layer: AttentionLayer) -> dict[str, Any]:
    """What every kernel over the layer's cache is told of it."""
    k_scale, v_scale = fp8_scales(layer)
    shuffled = layout.name == "shuffled"
    return {"block_size": layout.block_size, "shuffled": shuffled, "k_scale": k_scale, "v_scale": v_scale}


class CacheWriter:
    """The engine's Triton kernels."""

    def __init__(self, layout: KVLayout) -> None:
        from miniserve.kernels.triton.cache_write import rope_and_write, write_kv

        self._layout = layout
        self._write_kv, self._rope_and_write = write_kv, rope_and_write

    def write(self, layer: AttentionLayer, k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
        """Store keys and values as they are; negative slots are skipped."""
        self._write_kv(k, v, cache.key, cache.value, slot_mapping, **cache_terms(self._layout, layer))

    def rope_and_write(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        rope: QKRope,
        cache: KVCache,
        slot_mapping: Tensor,
        k_out: Tensor | None = None,
        *,
        settled: bool = False,
    ) -> Tensor:
        """qkv as of `StepContext.attend_qkv`; the kernel of this name says the rest. Returns q rotated."""
        spec = layer.spec
        return self._rope_and_write(
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
            settled=settled,
            k_out=k_out,
            **cache_terms(self._layout, layer),
        )


class RopeWriter(CacheWriter):
    """Those and aiter's."""

    def __init__(self, layout: KVLayout, aiter: Aiter, options: BackendOptions) -> None:
        super().__init__(layout)
        self._calls, self._routes = AiterCalls(aiter, layout), options.routes
        self._counting = torch.arange(options.max_rows, dtype=torch.int64, device=options.device)

    def token_ids(self, slot_mapping: Tensor) -> Tensor:
        """int64 0, 1, 2, … for each of the step's tokens; of decode rows alone it is always the same memory."""
        count = slot_mapping.shape[0]
        if count <= self._counting.shape[0]:
            return self._counting[:count]
        return torch.arange(count, dtype=torch.int64, device=slot_mapping.device)

    def rope_and_split(
        self,
        layer: AttentionLayer,
        qkv: Tensor,
        rope: QKRope,
        cache: KVCache,
        slot_mapping: Tensor,
        token_ids: Tensor,
        *,
        keep_k: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `rope_and_write`. Returns q, k, v [num_tokens, heads, head_dim], q normed and rotated; so is k, where it
        is kept, of those tokens that are written to the cache."""
        spec = layer.spec
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q, k, v = qkv.unflatten(1, (-1, spec.head_dim)).split(heads, dim=1)
        if self._routes[layer.layer_index].write == "fused_qk_rope_reshape_and_cache":
            q, k = self._calls.rope_and_write(layer, q, k, v, cache, slot_mapping, token_ids, rope.cos_sin)
            return q, k, v
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if keep_k else None
        q = self.rope_and_write(layer, qkv, rope, cache, slot_mapping, k_out)
        return q, k if k_out is None else k_out, v
