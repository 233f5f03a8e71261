"""The step's state as models see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from miniserve.attention.backends.base import Backend
from miniserve.attention.layouts import KVCache
from miniserve.attention.spec import AttentionLayer, LatentLayer, QKRope


@dataclass(frozen=True, slots=True)
class PagedStepContext:
    """A `StepContext` over the paged cache: one backend, one cache a layer, the backend's metadata of the step."""

    backend: Backend[Any]
    caches: Sequence[KVCache]
    metadata: object

    def attend(self, layer: AttentionLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.backend.attend(layer, (q, k, v), self.caches[layer.layer_index], self.metadata)

    @property
    def fuses_rope(self) -> bool:
        return self.backend.fuses_rope

    def attend_qkv(self, layer: AttentionLayer, qkv: Tensor, rope: QKRope) -> Tensor:
        return self.backend.attend_qkv(layer, qkv, rope, self.caches[layer.layer_index], self.metadata)

    def attend_latent(self, layer: LatentLayer, q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor) -> Tensor:
        tokens = q_nope, q_pe, kv_c, k_pe
        return self.backend.attend_latent(layer, tokens, self.caches[layer.layer_index], self.metadata)
