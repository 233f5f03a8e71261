"""What an attention backend does: write the step's keys and values, then decode and extend over the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import AttentionMetadata, DecodeMetadata, ExtendMetadata
from miniserve.attention.spec import AttentionLayer


class Backend(ABC):
    """Shapes as in `StepContext.attend`; a backend holds the layout and whatever scratch it needs, no step state."""

    def __init__(self, layout: KVLayout) -> None:
        self.layout = layout

    @abstractmethod
    def write(self, cache: KVCache, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None: ...

    @abstractmethod
    def decode(self, layer: AttentionLayer, q: torch.Tensor, cache: KVCache, meta: DecodeMetadata) -> torch.Tensor:
        """q [rows, num_heads, head_dim] -> [rows, num_heads * head_dim]."""

    @abstractmethod
    def extend(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        meta: ExtendMetadata,
    ) -> torch.Tensor:
        """One chunk's q, k, v [query_len, heads, head_dim], already written -> [query_len, num_heads * head_dim]."""

    def attend(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: KVCache,
        meta: AttentionMetadata,
    ) -> torch.Tensor:
        """The whole step for one layer: see `StepContext.attend`."""
        self.write(cache, k, v, meta.slot_mapping)
        parts: list[torch.Tensor] = []
        if meta.decode is not None:
            rows = meta.decode.seq_lens.shape[0]
            parts.append(self.decode(layer, q[:rows], cache, meta.decode))
        for chunk in meta.extends:
            span = slice(chunk.query_start, chunk.query_start + chunk.query_len)
            parts.append(self.extend(layer, q[span], k[span], v[span], cache, chunk))
        return parts[0] if len(parts) == 1 else torch.cat(parts)
