"""What the weight loader asks of a layer that holds parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a checkpoint and where it goes: the part at `index` of the layer's parameter called `parameter`."""

    name: str
    parameter: str
    index: slice | tuple[int | slice, ...]
    shape: tuple[int, ...]


class Module(nn.Module):
    """An nn.Module that is called like a function: hooks, which nobody here uses, cost a CPU's decode step more than
    they are worth (a microsecond or two a call, sixty calls a step of a small model)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            setattr(cls, "__call__", cls.forward)  # noqa: B010, a type checker refuses the assignment


class Layer(Module):
    """Owns parameters. They are made on the meta device (`declare`) and get memory once, when they are loaded.

    The life of a layer: `allocate` → each of `pieces` copied to its `target` → `finish`.
    """

    def declare(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """What this layer wants of a checkpoint; `prefix` is the layer's own name in the model."""
        for name, parameter in self.named_parameters(recurse=False):
            yield Piece(f"{prefix}.{name}", name, slice(0, parameter.shape[0]), tuple(parameter.shape))

    def allocate(self, device: torch.device) -> None:
        for name, parameter in list(self.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device=device)
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def target(self, piece: Piece) -> Tensor:
        return self.get_parameter(piece.parameter).data[piece.index]

    def fill_dummy(self, generator: torch.Generator) -> None:
        """Random weights for `--load-format dummy`: normal, standard deviation 0.02."""
        for parameter in self.parameters(recurse=False):
            parameter.data.normal_(0.0, 0.02, generator=generator)

    def finish(self) -> None:
        """All pieces are there. A layer that keeps its weights in another form converts them here."""
