"""Linear layers: the declaration of a weight, apart from the way in which it is multiplied."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn import functional

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.base import Layer, Piece

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels

# Rows that a CPU weight is packed for. It stays correct for any number; of 1, 16, 64, 128 and 512, measured over six
# shapes, 16 was best or within noise of the best from 1 to 256 rows, in bfloat16 and in float32.
PACK_ROWS = 16


class LinearMethod(Protocol):
    """How a `Linear` keeps its weight and multiplies with it; one object per layer."""

    def finish(self, layer: Linear) -> None:
        """The weight is loaded: put it into the form that `apply` wants, and free what is not needed any more."""
        ...

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        """x: [T, in_features] -> [T, out_features], x's dtype."""
        ...


class PlainMethod:
    """The weight as it is, [out_features, in_features]."""

    def finish(self, layer: Linear) -> None:
        pass

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, layer.weight, layer.bias)


class PackedCpuMethod:
    """oneDNN's blocked form of the weight. At few rows it reads memory 1.4 to 2 times as fast as the plain form, in
    float32 up to 3 times. The plain form is freed unless the layer shares it (`keeps_weight`)."""

    def __init__(self) -> None:
        self.packed: torch.Tensor | None = None

    def finish(self, layer: Linear) -> None:
        self.packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.data, PACK_ROWS)
        layer.drop_weight()

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, layer.bias, "none", [], "")
        return y


@functools.cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this processor and this torch build multiply with packed weights of `dtype`, found by trying it.

    float16, for one, needs a processor with AVX512-FP16 or AVX-NE-CONVERT.
    """
    weight, x, bias = torch.ones(48, 32, dtype=dtype), torch.ones(3, 32, dtype=dtype), torch.ones(48, dtype=dtype)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
        y = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    except (RuntimeError, AttributeError, TypeError):  # the operators are private: absent, refusing or changed
        return False
    return bool(torch.equal(y, torch.full_like(y, 33.0)))


class NativeCpuMethod:
    """Panels of the weight for the C++ kernel (`kernels/cpu.cpp`), bfloat16. From 1 to 32 rows it is 1.1 to 1.8 times
    as fast as oneDNN's packed form, beyond that equal; at one row it reads at the memory's bandwidth."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels
        self._packed = torch.empty(0)

    def finish(self, layer: Linear) -> None:
        self._packed = self._kernels.pack_linear(layer.weight.data)
        layer.drop_weight()

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._packed, layer.bias)


def choose_method(
    dtype: torch.dtype,
    device: torch.device,
    in_features: int,
    out_features: int,
    native: NativeKernels | None,
    triton: TritonKernels | None = None,
) -> LinearMethod:
    """The fastest method there is for a weight [out_features, in_features] on the device."""
    if triton is not None:
        from miniserve.models.layers.triton import TritonMethod

        return TritonMethod(triton)
    if device.type != "cpu":
        return PlainMethod()
    if native is not None and native.can_pack(dtype, in_features, out_features):
        return NativeCpuMethod(native)
    return PackedCpuMethod() if can_pack(dtype) else PlainMethod()


class Linear(Layer):
    """y = x Wᵀ + b, where W may be several checkpoint matrices stacked by rows.

    outputs: the name of each checkpoint module and its number of rows, in order: {"o_proj": n} for a plain layer,
    {"q_proj": …, "k_proj": …, "v_proj": …} for a fused one. The names replace the last part of the layer's own name.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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

    def drop_weight(self) -> None:
        """Free the plain weight: from here on the method holds the only copy."""
        self.register_parameter("weight", None)
