"""RMSNorm, alone and with the residual stream's addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.ops import Ops, PendingSum
from miniserve.parallel.group import Alone, Group


class RMSNorm(Layer):
    weight: Tensor

    def __init__(self, size: int, eps: float, dtype: torch.dtype, ops: Ops, group: Group) -> None:
        super().__init__()
        self.group = group
        self.ops = ops
        self.eps = eps
        self.declare("weight", (size,), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., size] -> the same shape."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor | PendingSum, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (norm(residual + x), residual + x); all [T, size]. Of x this rank has a part, which is summed with
        those of the others on the way."""
        if not isinstance(self.group, Alone):
            return self.ops.reduce_norm(x, residual, self.weight, self.eps, self.group)
        if not isinstance(x, Tensor):
            return x.add_rms_norm(residual, self.weight, self.eps)
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps)

    def dummy(self, piece: Piece, generator: torch.Generator) -> Tensor:
        return torch.ones(piece.shape, device=generator.device)
