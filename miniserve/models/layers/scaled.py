"""Weights in 8 bits: float8_e4m3fn codes, and the float32 scales that multiply them, a row's or a block's.

A parameter may be made of parts of several matrices, and a part may begin inside a block. Then its scales lie on a
finer grid: each number is repeated for all steps of its block, the step being a divisor of the block and every begin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.models.layers.base import NOWHERE, Piece
from miniserve.models.layers.experts import Experts, MoEMethod
from miniserve.models.layers.linear import Linear, LinearMethod, Placed, placed
from miniserve.models.layers.ops import PendingSum
from miniserve.models.quantization import WeightFormat
from miniserve.parallel.shard import Part, whole

CODES = torch.float8_e4m3fn
LEAST_STEP = 32  # kernels take no finer scales
_NAN_ELSEWHERE = 0x80  # minus zero, which float8_e4m3fnuz reads as NaN
_ROWS_AT_ONCE = 1024

# Rows and columns that share a number; None: scales of rows.
Step = tuple[int, int] | None


def step_of(form: WeightFormat, parts: Iterable[Placed]) -> Step:
    """The step of the scales of a parameter that is made of `parts`: the same on all ranks, which so take the same
    kernels."""
    if form.grain != "blocks":
        return None
    rows, columns = form.block
    for part, across, begin in parts:
        rows = math.gcd(rows, part.held.start, part.begins, begin)
        columns = math.gcd(columns, across.held.start, across.begins)
    return rows, columns


def scale_shape(rows: int, columns: int, step: Step) -> tuple[int, ...]:
    """Of the scales of a parameter [rows, columns]."""
    return (rows,) if step is None else (-(-rows // step[0]), -(-columns // step[1]))


def scale_piece(
    name: str, parameter: str, form: WeightFormat, step: Step, part: Placed, lead: tuple[int, ...] | None = ()
) -> Piece:
    """What fills the scales of one part. lead: what comes before the rows in the parameter's index, None for a part
    that other ranks alone hold."""
    rows, columns, begin = part
    refine: Callable[[Tensor], Tensor]
    if step is None:
        shape: tuple[int, ...] = () if form.grain == "tensor" else (rows.count,)
        place, refine = slice(begin, begin + rows.size), partial(_of_rows, rows=rows)
    else:
        shape = tuple(-(-each.count // size) for each, size in zip((rows, columns), form.block, strict=True))
        place = slice(begin // step[0], -(-(begin + rows.size) // step[0]))
        refine = partial(_of_blocks, block=form.block, step=step, parts=(rows, columns))
    index: slice | tuple[int | slice, ...] = NOWHERE if lead is None else (*lead, place)
    return Piece(name, parameter, index, shape, kind="scales", refine=refine)


def _of_rows(stored: Tensor, rows: Part) -> Tensor:
    """stored: of each of the matrix's rows, or one for all -> of the rows that are held, [size] or []."""
    return stored if not stored.dim() else stored[rows.held]


def _of_blocks(stored: Tensor, block: tuple[int, int], step: tuple[int, int], parts: Sequence[Part]) -> Tensor:
    """stored: of each of the matrix's blocks -> of each step of what is held."""
    for dim, (size, each, part) in enumerate(zip(block, step, parts, strict=True)):
        begins = torch.arange(part.held.start, part.held.stop, each, device=stored.device)
        stored = stored.index_select(dim, begins // size)
    return stored


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


# --- linear layers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ScaledProduct:
    """What multiplies steps of `first_row` rows or more: `multiply(x, weight, scale, step, bias)`. gates: with
    `gated=True` it gives silu(gates) * ups of that."""

    multiply: Callable[..., Tensor]
    first_row: int = 1
    gates: bool = False


def widened_product(x: Tensor, weight: Tensor, scale: Tensor, step: Step, bias: Tensor | None) -> Tensor:
    """For any device, and slow."""
    wide = weight.float() * spread(scale, step, *weight.shape)
    return functional.linear(x, wide.to(x.dtype), bias)


class ScaledMethod(LinearMethod):
    """Parameters `weight`, codes [out_features, in_features], and `scale`. products: the first whose rows a step has
    multiplies it. dtype: the hardware's 8 bits, as which codes are kept."""

    def __init__(self, form: WeightFormat, products: Sequence[ScaledProduct], dtype: torch.dtype = CODES) -> None:
        self.form, self._products, self._dtype = form, products, dtype
        self.step: Step = None

    def declare(self, layer: Linear) -> None:
        self.step = step_of(self.form, placed(layer.columns, layer.outputs))
        layer.declare("weight", (layer.out_features, layer.in_features), self._stored(layer))
        layer.declare("scale", scale_shape(layer.out_features, layer.in_features, self.step), torch.float32)
        self.declare_bias(layer)

    def _stored(self, layer: Linear) -> torch.dtype:
        """What codes are loaded as."""
        return CODES

    def pieces(self, layer: Linear, prefix: str) -> Iterator[Piece]:
        for name, rows, place in layer.stored_modules(prefix):
            shape, source = (rows.count, layer.columns.count), (rows.held, layer.columns.held)
            yield Piece(f"{name}.weight", "weight", place, shape, source, kind="codes")
            part = (rows, layer.columns, place.start)
            yield scale_piece(f"{name}.{self.form.scale}", "scale", self.form, self.step, part)
            yield from self.bias_pieces(layer, name, rows, place)

    def finish(self, layer: Linear) -> None:
        if self._dtype != CODES:
            layer.replace("weight", as_fnuz(layer.weight.data, layer.scale.data))

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return self._product(x).multiply(x, layer.weight, layer.scale, self.step, layer.bias)

    def gated(self, layer: Linear, x: Tensor) -> Tensor | None:
        product = self._product(x)
        if not product.gates:
            return None
        return product.multiply(x, layer.weight, layer.scale, self.step, layer.bias, gated=True)

    def _product(self, x: Tensor) -> ScaledProduct:
        return next(product for product in self._products if product.first_row <= x.shape[0])


class WidenedMethod(ScaledMethod):
    """The weight in the layer's dtype, which `then` multiplies: where no kernel reads the codes. name: of what that
    multiplies with."""

    def __init__(self, form: WeightFormat, then: LinearMethod, name: str = "") -> None:
        super().__init__(form, ())
        self._then = then
        self.name = f"{name}, widened from 8 bits"

    def _stored(self, layer: Linear) -> torch.dtype:
        return layer.dtype

    def finish(self, layer: Linear) -> None:
        widen_(layer.weight.data, layer.scale.data, self.step)
        layer.register_parameter("scale", None)
        self._then.finish(layer)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return self._then.apply(layer, x)

    def gated(self, layer: Linear, x: Tensor) -> Tensor | None:
        return self._then.gated(layer, x)


# --- experts ---------------------------------------------------------------------------------------------------------


class ScaledMoE(MoEMethod):
    """Parameters w1 and w2 of codes, and their scales w1_scale and w2_scale, each [num_experts, …]; both on the same
    grid. How they are multiplied is left to others."""

    def __init__(self, form: WeightFormat, dtype: torch.dtype = CODES) -> None:
        self.form, self._dtype = form, dtype
        self.step: Step = None

    def declare(self, layer: Experts) -> None:
        self.step = experts_step(self.form, layer.hidden_size, layer.width)
        count, hidden, middle = layer.num_experts, layer.hidden_size, layer.intermediate_size
        for name, shape in (("w1", (2 * middle, hidden)), ("w2", (hidden, middle))):
            layer.declare(name, (count, *shape), self._stored(layer))
            layer.declare(f"{name}_scale", (count, *scale_shape(*shape, self.step)), torch.float32)

    def _stored(self, layer: Experts) -> torch.dtype:
        return CODES

    def pieces(self, layer: Experts, prefix: str) -> Iterator[Piece]:
        hidden, width, middle = whole(layer.hidden_size), layer.width, layer.intermediate_size
        placed = {
            "gate_proj": ("w1", (width, hidden, 0)),
            "up_proj": ("w1", (width, hidden, middle)),
            "down_proj": ("w2", (hidden, width, 0)),
        }
        for expert in range(layer.experts.count):
            held = layer.experts.held.start <= expert < layer.experts.held.stop
            lead = (expert - layer.experts.held.start,) if held else None
            for module, (parameter, part) in placed.items():
                rows, columns, begin = part
                index = NOWHERE if lead is None else (*lead, slice(begin, begin + rows.size))
                shape, source = (rows.count, columns.count), (rows.held, columns.held)
                name = f"{prefix}.{expert}.{module}"
                yield Piece(f"{name}.weight", parameter, index, shape, source, kind="codes")
                scale = f"{name}.{self.form.scale}"
                yield scale_piece(scale, f"{parameter}_scale", self.form, self.step, part, lead)

    def stacked_pieces(self, layer: Experts, prefix: str) -> Iterator[Piece]:
        return iter(())  # transformers' own names for them are not known in 8 bits

    def finish(self, layer: Experts) -> None:
        for name in ("w1", "w2") if self._dtype != CODES else ():
            codes = as_fnuz(layer.get_parameter(name).data, layer.get_parameter(f"{name}_scale").data)
            layer.replace(name, codes)


def experts_step(form: WeightFormat, hidden_size: int, width: Part) -> Step:
    """The step of the scales of experts, which is the same for both their parameters."""
    middle, hidden = width.size, whole(hidden_size)
    first = step_of(form, [(width, hidden, 0), (width, hidden, middle)])
    second = step_of(form, [(hidden, width, 0)])
    if first is None or second is None:
        return None
    return math.gcd(first[0], second[0]), math.gcd(first[1], second[1])


class WidenedMoE(ScaledMoE):
    """Both weights in the layer's dtype, which `then` multiplies. name: as of `WidenedMethod`."""

    def __init__(self, form: WeightFormat, then: MoEMethod, name: str = "") -> None:
        super().__init__(form)
        self._then = then
        self.name = f"{name}, widened from 8 bits"

    def _stored(self, layer: Experts) -> torch.dtype:
        return layer.dtype

    def finish(self, layer: Experts) -> None:
        for name in ("w1", "w2"):
            scales = layer.get_parameter(f"{name}_scale")
            for weight, scale in zip(layer.get_parameter(name).data, scales.data, strict=True):
                widen_(weight, scale, self.step)
            layer.register_parameter(f"{name}_scale", None)
        self._then.finish(layer)

    def apply(self, layer: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | PendingSum:
        return self._then.apply(layer, x, topk_weights, topk_ids)
