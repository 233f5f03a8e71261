"""A model over its KV cache, which eager steps and graphs share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.context import StepContext
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import StepBatch
from miniserve.models.decoder import CausalLM


@dataclass(frozen=True, slots=True)
class ServedModel:
    """caches: one a layer. zero_blocks: see `block_zeroer`; None where no kernel needs it."""

    model: CausalLM
    backend: Backend[Any]
    caches: Sequence[KVCache]
    zero_blocks: Callable[[torch.Tensor], None] | None = None

    def hidden(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """input_ids, positions: int64 [num_tokens] -> [num_tokens, hidden_size], or of `batch.read` alone."""
        if self.zero_blocks is not None:
            self.zero_blocks(batch.slot_mapping)
        context = StepContext(self.backend, self.caches, self.backend.build(batch), batch=batch)
        hidden: torch.Tensor = self.model(input_ids, positions, context)
        return hidden

    def logits(self, input_ids: torch.Tensor, positions: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        """As `hidden` -> [num_tokens, vocab_size] in the model's dtype."""
        return self.model.compute_logits(self.hidden(input_ids, positions, batch))


def block_zeroer(caches: Sequence[KVCache], block_size: int) -> Callable[[torch.Tensor], None]:
    """A function of a step's slots that zeroes blocks before their first token is written. Whoever writes that is alone
    in the block, and what else is in it was left by its last owner: blocks are shared when they are full."""
    planes = [plane for cache in caches for plane in (cache.key, cache.value) if plane.is_contiguous()]
    if planes[0].device.type == "cuda":
        from miniserve.kernels.triton.zero_blocks import plane_table, zero_blocks

        return partial(zero_blocks, plane_table(planes), block_size=block_size)

    def zero(slots: torch.Tensor) -> None:
        blocks = slots[(slots >= 0) & (slots % block_size == 0)] // block_size
        for plane in planes:
            (plane.view(torch.uint8) if plane.dtype.itemsize == 1 else plane).index_fill_(0, blocks, 0)

    return zero
