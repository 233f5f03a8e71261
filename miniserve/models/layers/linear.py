"""Linear layers: the declaration of a weight, apart from the way in which it is multiplied."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.base import Layer, Piece

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
    """How a `Linear` keeps its weight and multiplies with it; one object per layer. This one: as it is."""

    def finish(self, layer: Linear) -> None:
        """The weight is loaded: put it into the form that `apply` wants, and free what is not needed any more."""

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, out_features], x's dtype."""
        return functional.linear(x, layer.weight, layer.bias)


class PackedMethod(LinearMethod):
    """The packed weight alone: the layer's own is dropped."""

    def __init__(self, packing: Packing) -> None:
        self._pack, self._multiply = packing.pack, packing.multiply
        self._packed = torch.empty(0)

    def finish(self, layer: Linear) -> None:
        self._packed = self._pack(layer.weight.data)
        layer.register_parameter("weight", None)

    def apply(self, layer: Linear, x: Tensor) -> Tensor:
        return self._multiply(x, self._packed, layer.bias)


class Linear(Layer):
    """y = x Wᵀ + b, where W may be several checkpoint matrices stacked by rows.

    outputs: the name of each checkpoint module and its number of rows, in order: {"o_proj": n} for a plain layer,
    {"q_proj": …, "k_proj": …, "v_proj": …} for a fused one. The names replace the last part of the layer's own name.
    """

    weight: Tensor
    bias: Tensor | None
    __call__: Callable[..., Tensor]

    def __init__(
        self, in_features: int, outputs: Mapping[str, int], *, bias: bool, dtype: torch.dtype, method: LinearMethod
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.outputs = dict(outputs)
        self.out_features = sum(outputs.values())
        self.method = method
        self.declare("weight", (self.out_features, in_features), dtype)
        if bias:
            self.declare("bias", (self.out_features,), dtype)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x: [T, in_features] -> [T, out_features]."""
        return self.method.apply(self, x)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        parent = prefix.rpartition(".")[0]
        start = 0
        for module, size in self.outputs.items():
            name = f"{parent}.{module}" if parent else module
            rows = slice(start, start + size)
            yield Piece(f"{name}.weight", "weight", rows, (size, self.in_features))
            if self.bias is not None:
                yield Piece(f"{name}.bias", "bias", rows, (size,))
            start += size

    def finish(self) -> None:
        self.method.finish(self)
