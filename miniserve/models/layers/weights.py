"""How the weights of linear layers and experts are stored: plain, or in 8 bits, float8_e4m3fn codes and the float32
scales that multiply them, a row's or a block's.

A parameter may be made of parts of several matrices, and a part may begin inside a block. Then its scales lie on a
finer grid: each number is repeated for all steps of its block, the step being a divisor of the block and every begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from miniserve.models.layers.base import NOWHERE, Index, Layer, Piece
from miniserve.models.quantization import WeightFormat
from miniserve.parallel.shard import Part, whole

CODES = torch.float8_e4m3fn
LEAST_STEP = 32  # kernels take no finer scales
_NAN_ELSEWHERE = 0x80  # minus zero, which float8_e4m3fnuz reads as NaN
_ROWS_AT_ONCE = 1024

# Rows and columns that share a number; None: scales of rows.
Step = tuple[int, int] | None
Lead = tuple[int | slice, ...]


class Placed(NamedTuple):
    """A part of a matrix in a parameter: the rows and columns of it that are held, and where its rows begin there."""

    rows: Part
    columns: Part
    begin: int

    @property
    def place(self) -> slice:
        """Its rows in the parameter."""
        return slice(self.begin, self.begin + self.rows.size)


def placed(columns: int | Part, outputs: Mapping[str, int | Part]) -> dict[str, Placed]:
    """Where a parameter has the parts of its matrices, by the names of these: one below the other."""
    found: dict[str, Placed] = {}
    begin = 0
    for name, rows in outputs.items():
        found[name] = Placed(whole(rows), whole(columns), begin)
        begin = found[name].place.stop
    return found


class Weights:
    """Of one layer: its parameters [*lead, rows, columns], and the tensors of a checkpoint that fill them. Here: plain,
    in the layer's dtype.

    form: None for plain ones; steps: of each parameter's scales; widened: they are put into the layer's dtype once they
    are loaded."""

    form: WeightFormat | None = None
    steps: Mapping[str, Step] = MappingProxyType({})
    widened: bool = False

    def declare(
        self, layer: Layer, matrices: Mapping[str, Mapping[str, Placed]], dtype: torch.dtype, lead: tuple[int, ...] = ()
    ) -> None:
        """matrices: the layer's, by the parameter they are in, then by name. dtype: the layer's."""
        for parameter, parts in matrices.items():
            layer.declare(parameter, (*lead, *_shape(parts)), dtype)

    def pieces(
        self, tensor: str, parameter: str, part: Placed, lead: Lead | None = (), stack: Part | None = None
    ) -> Iterator[Piece]:
        """What fills one part. tensor: the matrix's name in the checkpoint. lead: what comes before the rows in the
        parameter's index, None for a part that other ranks alone hold. stack: the tensor holds a matrix for each of
        these."""
        yield self._values(tensor, parameter, part, lead, stack, "values")

    def finish(self, layer: Layer, parameters: Iterable[str]) -> None:
        """All pieces are there."""

    def _values(
        self, tensor: str, parameter: str, part: Placed, lead: Lead | None, stack: Part | None, kind: str
    ) -> Piece:
        index: Index = NOWHERE if lead is None else (*lead, part.place)
        sides = (part.rows, part.columns) if stack is None else (stack, part.rows, part.columns)
        shape, source = tuple(side.count for side in sides), tuple(side.held for side in sides)
        return Piece(tensor, parameter, index, shape, source, kind)


class ScaledWeights(Weights):
    """Each parameter has its scales in another, <parameter>_scale, beside it. dtype: the hardware's 8 bits, as which
    codes are kept."""

    def __init__(self, form: WeightFormat, dtype: torch.dtype = CODES, *, widened: bool = False) -> None:
        self.form: WeightFormat = form
        self.widened, self._dtype = widened, dtype

    def declare(
        self, layer: Layer, matrices: Mapping[str, Mapping[str, Placed]], dtype: torch.dtype, lead: tuple[int, ...] = ()
    ) -> None:
        super().declare(layer, matrices, dtype if self.widened else CODES, lead)
        self.steps = {parameter: step_of(self.form, parts.values()) for parameter, parts in matrices.items()}
        for parameter, parts in matrices.items():
            (rows, columns), step = _shape(parts), self.steps[parameter]
            grid = (rows,) if step is None else (-(-rows // step[0]), -(-columns // step[1]))
            layer.declare(f"{parameter}_scale", (*lead, *grid), torch.float32)

    def pieces(
        self, tensor: str, parameter: str, part: Placed, lead: Lead | None = (), stack: Part | None = None
    ) -> Iterator[Piece]:
        yield self._values(tensor, parameter, part, lead, stack, "codes")
        rows, columns, begin = part
        refine: Callable[[Tensor], Tensor]
        step = self.steps[parameter]
        if step is None:
            shape: tuple[int, ...] = () if self.form.grain == "tensor" else (rows.count,)
            place, refine = part.place, partial(_of_rows, rows=rows)
        else:
            block = self.form.block
            shape = (-(-rows.count // block[0]), -(-columns.count // block[1]))
            place = slice(begin // step[0], -(-part.place.stop // step[0]))
            refine = partial(_of_blocks, block=block, step=step, parts=(rows, columns))
        if stack is not None:
            shape, refine = (stack.count, *shape), partial(_of_stack, held=stack.held, refine=refine)
        index: Index = NOWHERE if lead is None else (*lead, place)
        scale = tensor + self.form.scale.removeprefix("weight")
        yield Piece(scale, f"{parameter}_scale", index, shape, kind="scales", refine=refine)

    def finish(self, layer: Layer, parameters: Iterable[str]) -> None:
        for parameter in parameters:
            weight, scale = layer.get_parameter(parameter).data, layer.get_parameter(f"{parameter}_scale").data
            if self.widened:
                for one, its_scale in [(weight, scale)] if weight.dim() == 2 else zip(weight, scale, strict=True):
                    widen_(one, its_scale, self.steps[parameter])
                layer.register_parameter(f"{parameter}_scale", None)
            elif self._dtype != CODES:
                layer.replace(parameter, as_fnuz(weight, scale))


def _shape(parts: Mapping[str, Placed]) -> tuple[int, int]:
    """Of a parameter that is made of these."""
    *_, last = parts.values()
    return last.place.stop, last.columns.size


def step_of(form: WeightFormat, *parameters: Iterable[Placed]) -> Step:
    """The step of the scales of parameters that are made of these parts: the same on all ranks, which so take the same
    kernels."""
    if form.grain != "blocks":
        return None
    rows, columns = form.block
    for parts in map(list, parameters):
        for part in parts:
            rows = math.gcd(rows, part.rows.held.start, part.rows.begins, part.begin)
            columns = math.gcd(columns, part.columns.held.start, part.columns.begins)
        rows = math.gcd(rows, *(part.rows.sizes for part in parts[:-1]))  # of which the begins after them are sums
    return rows, columns


def _of_rows(stored: Tensor, rows: Part) -> Tensor:
    """stored: of each of the matrix's rows, or one for all -> of the rows that are held, [size] or []."""
    return stored if not stored.dim() else stored[rows.held]


def _of_blocks(stored: Tensor, block: tuple[int, int], step: tuple[int, int], parts: Sequence[Part]) -> Tensor:
    """stored: of each of the matrix's blocks -> of each step of what is held."""
    for dim, size, each, part in zip((-2, -1), block, step, parts, strict=True):
        begins = torch.arange(part.held.start, part.held.stop, each, device=stored.device)
        stored = stored.index_select(dim, begins // size)
    return stored


def _of_stack(stored: Tensor, held: slice, refine: Callable[[Tensor], Tensor]) -> Tensor:
    """stored: of all matrices of a stack -> of those that are held. Of blocks alone."""
    return refine(stored[held])


def spread(scale: Tensor, step: Step, rows: int, columns: int) -> Tensor:
    """A parameter's scales -> the number of each of its elements, [rows, columns] or to be broadcast to that."""
    if step is None:
        return scale[:, None]
    return scale.repeat_interleave(step[0], 0)[:rows].repeat_interleave(step[1], 1)[:, :columns]


def widen_(weight: Tensor, scale: Tensor, step: Step) -> None:
    """Multiply codes [rows, columns], in a wide dtype, by their scales, in place, rounding once."""
    at_once = _ROWS_AT_ONCE if step is None else step[0] * -(-_ROWS_AT_ONCE // step[0])
    for start in range(0, weight.shape[0], at_once):
        part = weight[start : start + at_once]
        own = scale[start : start + at_once] if step is None else scale[start // step[0] :]
        part.copy_(part.float() * spread(own[: len(part)], step, *part.shape))


def as_fnuz(codes: Tensor, scale: Tensor) -> Tensor:
    """float8_e4m3fn codes as float8_e4m3fnuz, the format of gfx942, which takes the same bits for half as much: `scale`
    is doubled in place. Returns a view of the same memory."""
    bits = codes.view(torch.uint8)
    bits.masked_fill_(bits == _NAN_ELSEWHERE, 0)
    scale.mul_(2.0)
    return bits.view(torch.float8_e4m3fnuz)
