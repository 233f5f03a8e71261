"""What a layer needs of attention, and how a step's attention reaches a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. Heads are those of this device's shard; head_dim in elements; `scale` multiplies q·k.

    sliding_window W: a query at position p sees keys p-W+1 … p. softcap c: scores become c·tanh(score/c).
    sinks: the layer holds one learned logit per head that takes part in the softmax's sum.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class AttentionLayer(Protocol):
    """The part of a model's attention module that a backend reads."""

    layer_index: int
    spec: AttentionSpec
    sinks: torch.Tensor | None  # float32 [num_heads]


class StepContext(Protocol):
    """The step's state, handed to `model.forward` as an argument and by it to every attention layer."""

    def attend(self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Write k, v of this step's tokens to the cache, then attend causally over all cached tokens of each sequence.

        q: [num_tokens, num_heads, head_dim], k, v: [num_tokens, num_kv_heads, head_dim], after norm and rope; the last
        dimension is contiguous, the others may be strided. Returns [num_tokens, num_heads * head_dim], q's dtype.
        """
        ...
