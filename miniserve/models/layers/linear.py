"""Linear layers: the declaration of a weight, apart from the way in which it is multiplied."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.base import NOWHERE, Layer, Piece
from miniserve.models.layers.weights import Step, Weights, placed, spread
from miniserve.parallel.shard import Part, whole

if TYPE_CHECKING:
    from miniserve.models.layers.contracts import Route

# Rows that a CPU weight is packed for. It stays correct for any number; of 1, 16, 64, 128 and 512, measured over six
# shapes, 16 was best or within noise of the best from 1 to 256 rows, in bfloat16 and in float32.
PACK_ROWS = 16


@dataclass(frozen=True, slots=True)
class Packing:
    """A form of a weight: `pack(weight)` once, then `multiply(x, packed, bias)` gives x Wᵀ + b. name: whose."""

    name: str
    pack: Callable[[Tensor], Tensor]
    multiply: Callable[[Tensor, Tensor, Tensor | None], Tensor]


PLAIN = Packing("PyTorch", lambda weight: weight, functional.linear)
# oneDNN's blocked form. At few rows it reads memory 1.4 to 2 times as fast as the plain form, in float32 up to 3 times.
ONEDNN = Packing(
    "oneDNN",
    lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS),
    lambda x, packed, bias: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""),
)


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor and this torch build multiply with oneDNN's packed weights of `dtype`, found by trying it.

    float16, for one, needs a processor with AVX512-FP16 or AVX-NE-CONVERT.
    """
    weight, x, bias = torch.ones(48, 32, dtype=dtype), torch.ones(3, 32, dtype=dtype), torch.ones(48, dtype=dtype)
    try:
        y = ONEDNN.multiply(x, ONEDNN.pack(weight), bias)
    except (RuntimeError, AttributeError, TypeError):  # the operators are private: absent, refusing or changed
        return False
    return bool(torch.equal(y, torch.full_like(y, 33.0)))


def choose_packing(
    dtype: torch.dtype, device: torch.device, sizes: Sequence[tuple[int, int]], native: NativeKernels | None
) -> Packing:
    """The fastest there is on the device for weights of these sizes, (in_features, out_features) each."""
    if device.type != "cpu":
        return PLAIN
    if native is not None and all(native.can_pack(dtype, *size) for size in sizes):
        # Panels for the C++ kernel (`kernels/cpu.cpp`), bfloat16. From 1 to 32 rows it is 1.1 to 1.8 times as fast as
        # oneDNN's packed form, beyond that equal; at one row it reads at the memory's bandwidth.
        return Packing("C++ kernels", native.pack_linear, native.linear)
    return ONEDNN if can_pack(dtype) else PLAIN


class LinearMethod:
    """How a `Linear` multiplies; one object per layer. This one: its weight as it is, [out_features, in_features].

    route: the kernels of `contracts.py` that it multiplies with; name: of what multiplies where these do not."""

    route: Route | None = None
    name: str = PLAIN.name

    def finish(self, layer: Linear) -> None:
        """The weight is loaded: put it into the form that `apply` wants, and free what is not needed any more."""

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, out_features], x's dtype."""
        return functional.linear(x, layer.weight, layer.bias)

    def gated(self, layer: Linear, x: Tensor) -> Tensor | None:
        """`silu_and_mul` of that, gates before ups, [T, out_features / 2]; None where that is no faster."""
        return None


class PackedMethod(LinearMethod):
    """The packed weight alone: the layer's own is dropped."""

    def __init__(self, packing: Packing) -> None:
        self._pack, self._multiply, self.name = packing.pack, packing.multiply, packing.name
        self._packed = torch.empty(0)

    def finish(self, layer: Linear) -> None:
        self._packed = self._pack(layer.weight.data)
        layer.register_parameter("weight", None)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return self._multiply(x, self._packed, layer.bias)


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
    """By the weight's codes. products: the first whose rows a step has multiplies it."""

    def __init__(self, products: Sequence[ScaledProduct]) -> None:
        self._products = products

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return self._product(x).multiply(x, layer.weight, layer.weight_scale, layer.weights.steps["weight"], layer.bias)

    def gated(self, layer: Linear, x: Tensor) -> Tensor | None:
        product = self._product(x)
        if not product.gates:
            return None
        step = layer.weights.steps["weight"]
        return product.multiply(x, layer.weight, layer.weight_scale, step, layer.bias, gated=True)

    def _product(self, x: Tensor) -> ScaledProduct:
        return next(product for product in self._products if product.first_row <= x.shape[0])


class Linear(Layer):
    """y = x Wᵀ + b, where W may be several checkpoint matrices stacked by rows, or this rank's parts of them.

    columns: in_features of the checkpoint, or the part of them that this rank has; then y is a part of a sum over
    ranks, to which the first alone adds the bias. outputs: the name of each checkpoint module and its rows, all or a
    part, in order: {"o_proj": n} for a plain layer, {"q_proj": …, "k_proj": …, "v_proj": …} for a fused one. The
    names replace the last part of the layer's own name. in_features, out_features: of this rank.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    __call__: Callable[..., Tensor]

    def __init__(
        self,
        columns: int | Part,
        outputs: Mapping[str, int | Part],
        *,
        bias: bool,
        dtype: torch.dtype,
        method: LinearMethod,
        weights: Weights | None = None,
    ) -> None:
        """weights: how they are stored, None for plain ones."""
        super().__init__()
        self.columns = whole(columns)
        self.outputs = {name: whole(rows) for name, rows in outputs.items()}
        self.in_features = self.columns.size
        self.out_features = sum(rows.size for rows in self.outputs.values())
        self.method, self.weights = method, weights or Weights()
        self._parts = placed(columns, outputs)
        self.weights.declare(self, {"weight": self._parts}, dtype)
        self._has_bias, adds_bias = bias, self.columns.held.start == 0
        if bias and adds_bias:
            self.declare("bias", (self.out_features,), dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, out_features]."""
        return self.method.apply(self, x)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        parent = prefix.rpartition(".")[0]
        for module, part in self._parts.items():
            name, rows = f"{parent}.{module}" if parent else module, part.rows
            yield from self.weights.pieces(f"{name}.weight", "weight", part)
            if self.bias is not None:
                yield Piece(f"{name}.bias", "bias", part.place, (rows.count,), (rows.held,))
            elif self._has_bias:
                yield Piece(f"{name}.bias", "weight", NOWHERE, (rows.count,))

    def finish(self) -> None:
        self.weights.finish(self, ["weight"])
        self.method.finish(self)
