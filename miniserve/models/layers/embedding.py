"""Both ends of a model over the vocabulary: token embedding and logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.linear import Linear, LinearMethod
from miniserve.models.layers.ops import Ops
from miniserve.parallel.shard import Part


class Embedding(Layer):
    weight: Tensor

    def __init__(self, vocab_size: int, hidden_size: int, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.declare("weight", (vocab_size, hidden_size), dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: int64 [T] -> [T, hidden_size]."""
        return self.ops.look_up(input_ids, self.weight)


class TiedLMHead(Linear):
    """Hidden states to logits by rows of the embedding's weight, `vocab` of them. It asks nothing of the checkpoint;
    a method that repacks the weight makes a copy, and the embedding keeps the original for its look-ups."""

    def __init__(self, embedding: Embedding, vocab: int | Part, *, dtype: torch.dtype, method: LinearMethod) -> None:
        super().__init__(embedding.weight.shape[1], {"lm_head": vocab}, bias=False, dtype=dtype, method=method)
        self.register_parameter("weight", None)
        self._embedding = (embedding,)  # in a tuple, so that it is not this module's child as well

    def pieces(self, prefix: str) -> Iterator[Piece]:
        return iter(())

    def finish(self) -> None:
        # The embedding has its memory by now: a model's layers are loaded in order.
        self.replace("weight", self._embedding[0].weight.data[self.outputs["lm_head"].held])
        super().finish()
