"""What the weight loader asks of a layer that holds parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Index = slice | tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """What a layer wants of one tensor of a checkpoint, and where it goes: `source` of it (empty: all) to the part at
    `index` of the layer's parameter called `parameter`. shape: of the whole tensor. A tensor that the model has on
    other ranks alone goes to `NOWHERE`, so that it is known and checked.

    kind: of the tensor: "values", or of a matrix in 8 bits "codes" or "scales". refine: of scales, which are read whole
    and may have one more dimension of 1: what of them goes to the parameter."""

    name: str
    parameter: str
    index: Index
    shape: tuple[int, ...]
    source: tuple[slice, ...] = ()
    kind: str = "values"
    refine: Callable[[Tensor], Tensor] | None = None


NOWHERE = slice(0, 0)
_DUMMY_CODES = 100.0  # standard deviation: few are beyond the largest code, 448


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
        self.replace(name, torch.empty(shape, dtype=dtype, device="meta"))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """What this layer wants of a checkpoint; `prefix` is the layer's own name in the model."""
        for name, parameter in self.named_parameters(recurse=False):
            yield Piece(f"{prefix}.{name}", name, slice(0, parameter.shape[0]), tuple(parameter.shape))

    def allocate(self, device: torch.device) -> None:
        for name, parameter in list(self.named_parameters(recurse=False)):
            # Not `empty_like`, which for a meta tensor imports sympy and more: most of a second.
            self.replace(name, torch.empty(parameter.shape, dtype=parameter.dtype, device=device))

    def target(self, piece: Piece) -> Tensor:
        return self.get_parameter(piece.parameter).data[piece.index]

    def fill_dummy(self, prefix: str, seed: int) -> None:
        """Random weights for `--load-format dummy`. Each tensor of the checkpoint is drawn whole, by a seed of its own
        name: so ranks hold parts of the same model, however many they are."""
        for piece in self.pieces(prefix):
            target = self.target(piece)
            if target.numel():
                own = hashlib.blake2b(f"{seed} {piece.name}".encode(), digest_size=8).digest()
                generator = torch.Generator(device=target.device).manual_seed(int.from_bytes(own, "little") >> 1)
                whole = self.dummy(piece, generator)
                target.copy_(whole[piece.source] if piece.refine is None else piece.refine(whole))

    def dummy(self, piece: Piece, generator: torch.Generator) -> Tensor:
        """The whole tensor, of any dtype: normal with standard deviation 0.02. It may take numbers of the generator,
        and lies on its device."""
        if piece.kind == "values":
            dtype = self.get_parameter(piece.parameter).dtype
            return torch.empty(piece.shape, dtype=dtype, device=generator.device).normal_(
                0.0, 0.02, generator=generator
            )
        drawn = torch.empty(piece.shape, device=generator.device)
        if piece.kind == "codes":
            return drawn.normal_(0.0, _DUMMY_CODES, generator=generator).clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)
        return drawn.uniform_(0.5, 1.5, generator=generator).mul_(0.02 / _DUMMY_CODES)

    def replace(self, name: str, tensor: Tensor) -> None:
        """Another form of a parameter, in its place."""
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def finish(self) -> None:
        """All pieces are there. A layer that keeps its weights in another form converts them here."""
