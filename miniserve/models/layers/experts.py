"""Routed experts: the declaration of their weights, apart from the way in which tokens are multiplied with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.linear import PACK_ROWS, can_pack
from miniserve.models.layers.ops import PendingSum, silu_and_mul

TRITON_MOE = "the engine's Triton kernels"


class MoEMethod(Protocol):
    """How `Experts` keep their weights and multiply with them; one object per layer. name: for people."""

    @property
    def name(self) -> str: ...

    def finish(self, layer: Experts) -> None:
        """The weights are loaded: put them into the form that `apply` wants, and free what is not needed any more."""
        ...

    def apply(
        self, layer: Experts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor | PendingSum:
        """x [T, hidden], topk_weights float32 [T, K], topk_ids int [T, K] -> [T, hidden], x's dtype: the sum of each
        token's experts, weighted; or what will give that sum."""
        ...


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """One matrix at a time: `pack` once, then `multiply(x, packed)` is x Wᵀ; `gate` is `silu_and_mul`. name: whose."""

    name: str
    pack: Callable[[torch.Tensor], torch.Tensor]
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    gate: Callable[[torch.Tensor], torch.Tensor] = silu_and_mul


class GroupedMoE:
    """Tokens grouped by expert, then the experts that have any, one after the other, each read once. Any device; made
    for a CPU: the host must know which experts those are, which makes a GPU wait."""

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._do = arithmetic
        self.name = f"{arithmetic.name}, one expert after the other"
        self._w1: list[torch.Tensor] = []
        self._w2: list[torch.Tensor] = []

    def finish(self, layer: Experts) -> None:
        self._w1 = [self._do.pack(weight) for weight in layer.w1.data]
        layer.register_parameter("w1", None)
        self._w2 = [self._do.pack(weight) for weight in layer.w2.data]
        layer.register_parameter("w2", None)

    def apply(
        self, layer: Experts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        chosen, order = topk_ids.flatten().sort(stable=True)
        tokens = order // topk_ids.shape[1]
        rows, weights = x[tokens], topk_weights.flatten()[order, None]
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        # Summed in float32 and in the order of the experts, whatever else is in the batch.
        out = x.new_zeros(x.shape, dtype=torch.float32)
        start = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            span = slice(start, start + count)
            middle = self._do.gate(self._do.multiply(rows[span], self._w1[expert]))
            part = self._do.multiply(middle, self._w2[expert])
            out.index_add_(0, tokens[span], part * weights[span])
            start += count
        return out.to(x.dtype)


def choose_moe_method(
    dtype: torch.dtype, device: torch.device, hidden_size: int, intermediate_size: int, native: NativeKernels | None
) -> MoEMethod:
    """The fastest method there is for experts [hidden_size, intermediate_size] on the device."""
    if device.type != "cpu":
        return GroupedMoE(Arithmetic("PyTorch", lambda weight: weight, functional.linear))
    gate = silu_and_mul if native is None else native.silu_and_mul
    shapes = ((hidden_size, 2 * intermediate_size), (intermediate_size, hidden_size))
    if native is not None and all(native.can_pack(dtype, *shape) for shape in shapes):
        kernels = native
        return GroupedMoE(
            Arithmetic("C++ kernels", native.pack_linear, lambda x, packed: kernels.linear(x, packed, None), gate)
        )
    if can_pack(dtype):
        return GroupedMoE(Arithmetic("oneDNN", _pack, _multiply, gate))
    return GroupedMoE(Arithmetic("PyTorch", lambda weight: weight, functional.linear, gate))


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACK_ROWS)
    return packed


def _multiply(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return y


class Experts(Layer):
    """SwiGLU experts in two tensors: w1 [num_experts, 2 * intermediate_size, hidden_size], gates before ups, and w2
    [num_experts, hidden_size, intermediate_size]. A checkpoint has three matrices of each expert."""

    w1: torch.Tensor
    w2: torch.Tensor

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, method: MoEMethod
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.method = method
        self.declare("w1", (num_experts, 2 * intermediate_size, hidden_size), dtype)
        self.declare("w2", (num_experts, hidden_size, intermediate_size), dtype)

    def forward(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor | PendingSum:
        """As `MoEMethod.apply`."""
        return self.method.apply(self, x, topk_weights, topk_ids)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        hidden, middle = self.hidden_size, self.intermediate_size
        for expert in range(self.num_experts):
            name = f"{prefix}.{expert}"
            yield Piece(f"{name}.gate_proj.weight", "w1", (expert, slice(0, middle)), (middle, hidden))
            yield Piece(f"{name}.up_proj.weight", "w1", (expert, slice(middle, 2 * middle)), (middle, hidden))
            yield Piece(f"{name}.down_proj.weight", "w2", (expert, slice(0, hidden)), (hidden, middle))

    def finish(self) -> None:
        self.method.finish(self)
