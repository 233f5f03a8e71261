"""RMSNorm, and the residual stream that a decoder's layers read through norms and add to.

The sum and the norm are one kernel, or part of the kernel that follows them. So a layer only says what it computes,
`x + self.mlp(self.norm(x))`, and the sum is taken when something reads the norm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.ops import Ops, PendingSum
from miniserve.parallel.group import Alone, Group

T = TypeVar("T")


class RMSNorm(Layer):
    weight: Tensor

    def __init__(self, size: int, eps: float, dtype: torch.dtype, ops: Ops, group: Group) -> None:
        super().__init__()
        self.group = group
        self.ops = ops
        self.eps = eps
        self.declare("weight", (size,), dtype)

    def forward(self, x: Tensor | Residual) -> Tensor | Normed:
        """x: [..., size] -> the same shape. A residual stream's norm is computed when it is read."""
        return Normed(self, x) if isinstance(x, Residual) else self.ops.rms_norm(x, self.weight, self.eps)

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


class Residual:
    """The residual stream [T, size]: `stream`, and `part`, what is still to be added to it, if anything. With ranks
    `part` is this rank's part of a sum."""

    __slots__ = ("part", "stream")

    def __init__(self, stream: Tensor, part: Tensor | PendingSum | None = None) -> None:
        self.stream, self.part = stream, part

    def __add__(self, part: Tensor | PendingSum) -> Residual:
        """The new stream; a norm of it adds `part` in place, so the old one is not used any more. Raises `RuntimeError`
        where the last part is still to be added."""
        if self.part is not None:
            raise RuntimeError("two parts were added to the residual stream without a norm between them")
        return Residual(self.stream, part)

    def reading(self, indices: Tensor | None) -> Residual:
        """The stream of the tokens `indices`, None for all. Raises `RuntimeError` as `+` does."""
        if indices is None:
            return self
        if self.part is not None:
            raise RuntimeError("tokens were chosen of a residual stream without a norm before that")
        return Residual(self.stream[indices])


class Normed:
    """A norm of the residual stream, not computed before it is read. Reading it also adds the stream's part to it."""

    __slots__ = ("_norm", "_residual", "_value")

    def __init__(self, norm: RMSNorm, residual: Residual) -> None:
        self._norm, self._residual = norm, residual
        self._value: Tensor | None = None

    def read(self) -> Tensor:
        """[T, size], computed once."""
        if self._value is None:
            norm, residual = self._norm, self._residual
            if residual.part is None:
                self._value = norm.ops.rms_norm(residual.stream, norm.weight, norm.eps)
            else:
                self._value, residual.stream = norm.add(residual.part, residual.stream)
                residual.part = None
        return self._value

    def read_with(self, kernel: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, T]]) -> T | None:
        """Let a kernel that goes on from the norm compute it as well: kernel(part, stream, weight, eps) -> (norm, new
        stream, what follows). Returns the last; None, without calling it, where the norm is more than a kernel computes
        on its way: of a sum over ranks or of many parts, or of no sum."""
        norm, residual = self._norm, self._residual
        if self._value is not None or norm.group.size > 1 or not isinstance(residual.part, Tensor):
            return None
        self._value, residual.stream, found = kernel(residual.part, residual.stream, norm.weight, norm.eps)
        residual.part = None
        return found
