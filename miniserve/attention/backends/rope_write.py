"""Cache writes for backends over aiter: rope and write in one launch by its own kernel or by the engine's, as the
layer's route says; the write alone by the engine's, as aiter's makes NaN of what an fp8 cache cannot hold."""

from __future__ import annotations

import torch
from torch import Tensor

from miniserve.attention.aiter import Aiter
from miniserve.attention.backends.aiter_calls import AiterCalls
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.paged_kernels import PagedKernels
from miniserve.attention.backends.triton_attn import cache_terms, rope_and_write
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.spec import AttentionLayer, QKRope


class RopeWriter:
    def __init__(self, layout: KVLayout, aiter: Aiter, kernels: PagedKernels, options: BackendOptions) -> None:
        self._layout, self._calls, self._kernels = layout, AiterCalls(aiter, layout), kernels
        self._routes = options.routes
        self._counting = torch.arange(options.max_rows, dtype=torch.int64, device=options.device)

    def token_ids(self, slot_mapping: Tensor) -> Tensor:
        """int64 0, 1, 2, … for each of the step's tokens; of decode rows alone it is always the same memory."""
        count = slot_mapping.shape[0]
        if count <= self._counting.shape[0]:
            return self._counting[:count]
        return torch.arange(count, dtype=torch.int64, device=slot_mapping.device)

    def write_unturned(self, layer: AttentionLayer, k: Tensor, v: Tensor, cache: KVCache, slot_mapping: Tensor) -> None:
        """Store keys and values as they are; negative slots are skipped."""
        terms = cache_terms(self._layout, layer)
        self._kernels.write_kv(k, v, cache.key, cache.value, slot_mapping, **terms)

    def write(
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
        """qkv as of `StepContext.attend_qkv` -> q, k, v [num_tokens, heads, head_dim], q normed and rotated; so is k,
        where it is kept, of those tokens that are written to the cache."""
        spec = layer.spec
        heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
        q, k, v = qkv.unflatten(1, (-1, spec.head_dim)).split(heads, dim=1)
        if self._routes[layer.layer_index].write == "fused_qk_rope_reshape_and_cache":
            q, k = self._calls.rope_and_write(layer, q, k, v, cache, slot_mapping, token_ids, rope.cos_sin)
            return q, k, v
        k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device) if keep_k else None
        kernel = self._kernels.rope_and_write
        q = rope_and_write(kernel, self._layout, layer, qkv, rope, cache, slot_mapping, k_out)
        return q, k if k_out is None else k_out, v
