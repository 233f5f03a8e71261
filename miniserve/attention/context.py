"""The step's state as models see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miniserve.attention.backends.base import Backend
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import StepBatch
from miniserve.attention.spec import AttentionLayer, LatentLayer, LatentRope, QKRope


@dataclass(frozen=True, slots=True)
class StepContext:
    """The step's state, handed to `model.forward` as an argument and by it to every attention layer: one backend, one
    cache a layer, the backend's metadata of the step. What a method is given has its last dimension contiguous; the
    others may be strided.

    read: indices int64 [R] of the tokens whose queries attend, which `metadata` then describes as decode rows; None for
    all. batch: the step, of which `for_last_layer` is made."""

    backend: Backend[Any]
    caches: Sequence[KVCache]
    metadata: object
    read: Tensor | None = None
    batch: StepBatch | None = None

    def for_last_layer(self) -> StepContext:
        """The state for the last layer, which may compute fewer tokens (`StepBatch.read`), once all others were called:
        it replaces theirs."""
        if self.batch is None or self.batch.read is None:
            return self
        metadata = self.backend.build(StepBatch(self.batch.slot_mapping, decode=self.batch.read.rows))
        return StepContext(self.backend, self.caches, metadata, self.batch.read.indices)

    def reading(self, states: Tensor) -> Tensor:
        """Of states [num_tokens, ...] those of the tokens that are read."""
        return states if self.read is None else states[self.read]

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k, v of this step's tokens to the cache, then attend causally over all cached tokens of each sequence.

        q: [num_tokens, num_heads, head_dim], k, v: [num_tokens, num_kv_heads, head_dim], after norm and rope. Returns
        [num_tokens, num_heads * head_dim], q's dtype; here and below of the tokens that are read alone.
        """
        return self.backend.attend(layer, (self.reading(q), k, v), self.caches[layer.layer_index], self.metadata)

    @property
    def fuses_rope(self) -> bool:
        """Whether `attend_qkv` is there, or `attend_latent` takes a rope: it turns and writes in one launch."""
        return self.backend.fuses_rope and self.read is None

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
        tokens = self.reading(q_nope), self.reading(q_pe), kv_c, k_pe
        return self.backend.attend_latent(layer, tokens, self.caches[layer.layer_index], self.metadata, rope)
