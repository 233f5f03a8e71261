"""The step's state as models see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import AttentionMetadata
from miniserve.attention.spec import AttentionLayer


@dataclass(frozen=True, slots=True)
class PagedStepContext:
    """A `StepContext` over the paged cache: one backend, one cache a layer, this step's metadata."""

    backend: Backend
    caches: Sequence[KVCache]
    metadata: AttentionMetadata

    def attend(self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `StepContext.attend`."""
        return self.backend.attend(layer, q, k, v, self.caches[layer.layer_index], self.metadata)
