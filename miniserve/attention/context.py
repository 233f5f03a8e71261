"""The step's state as models see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miniserve.attention.backends.base import Backend
from miniserve.attention.layouts import KVCache
from miniserve.attention.spec import AttentionLayer, LatentLayer, LatentRope, QKRope


@dataclass(frozen=True, slots=True)
class StepContext:
    """The step's state, handed to `model.forward` as an argument and by it to every attention layer: one backend, one
    cache a layer, the backend's metadata of the step. What a method is given has its last dimension contiguous; the
    others may be strided."""

    backend: Backend[Any]
    caches: Sequence[KVCache]
    metadata: object

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v of this step's tokens to the cache, then attend causally over all cached tokens of each sequence.

        q: [num_tokens, num_heads, head_dim], k, v: [num_tokens, num_kv_heads, head_dim], after norm and rope. Returns
        [num_tokens, num_heads * head_dim], q's dtype.
        """
        return self.backend.attend(layer, (q, k, v), self.caches[layer.layer_index], self.metadata)

    @property
    def fuses_rope(self) -> bool:
        """Whether `attend_qkv` is there, or `attend_latent` takes a rope: it turns and writes in one launch."""
        return self.backend.fuses_rope

    def attend_qkv(self, layer: AttentionLayer, qkv: Tensor, rope: QKRope) -> Tensor:
        """As `attend`, of qkv [num_tokens, (num_heads + 2 num_kv_heads) * head_dim] before norm and rope."""
        return self.backend.attend_qkv(layer, qkv, rope, self.caches[layer.layer_index], self.metadata)

    def attend_latent(
        self,
        layer: LatentLayer,
        q_nope: Tensor,
        q_pe: Tensor,
        kv_c: Tensor,
        k_pe: Tensor,
        rope: LatentRope | None = None,
    ) -> Tensor:
        """As `attend`, for MLA. q_nope [T, num_heads, nope_dim], q_pe [T, num_heads, rope_dim], kv_c [T, kv_lora_rank],
        k_pe [T, rope_dim], after norms and rope, or where the backend `fuses_rope` before `rope`, and may be
        overwritten. Returns [T, num_heads * v_head_dim], q_nope's dtype."""
        tokens = q_nope, q_pe, kv_c, k_pe
        return self.backend.attend_latent(layer, tokens, self.caches[layer.layer_index], self.metadata, rope)
