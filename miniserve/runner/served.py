"""A model over its KV cache, which eager steps and graphs share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.context import PagedStepContext
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import StepBatch
from miniserve.models.decoder import CausalLM


@dataclass(frozen=True, slots=True)
class ServedModel:
    """caches: one a layer."""

    model: CausalLM
    backend: Backend[Any]
    caches: Sequence[KVCache]

    def tuning(self) -> AbstractContextManager[None]:
        """Within it linear layers of new sizes are timed; see `LibraryLinear.tuning`."""
        kernels = self.model.options.triton
        return nullcontext() if kernels is None else kernels.library_linear.tuning()

    def hidden(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """input_ids, positions: int64 [num_tokens] -> [num_tokens, hidden_size]."""
        context = PagedStepContext(self.backend, self.caches, self.backend.build(batch))
        hidden: torch.Tensor = self.model(input_ids, positions, context)
        return hidden

    def logits(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """As `hidden` -> [num_tokens, vocab_size] in the model's dtype."""
        return self.model.compute_logits(self.hidden(input_ids, positions, batch))
