"""Routed experts: the declaration of their weights, apart from the way in which tokens are multiplied with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.linear import Packing, choose_packing
from miniserve.models.layers.ops import PendingSum, silu_and_mul

TRITON_MOE = "the engine's Triton kernels"


class MoEMethod:
    """How `Experts` keep their weights and multiply with them; one object per layer. name: for people."""

    name: str

    def finish(self, layer: Experts) -> None:
        """The weights are loaded: put them into the form that `apply` wants, and free what is not needed any more."""

    def apply(self, layer: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | PendingSum:
        """x [T, hidden], topk_weights float32 [T, K], topk_ids int [T, K] -> [T, hidden], x's dtype: the sum of each
        token's experts, weighted; or what will give that sum."""
        raise NotImplementedError


class GroupedMoE(MoEMethod):
    """Tokens grouped by expert, then the experts that have any, one after the other, each read once. Any device; made
    for a CPU: the host must know which experts those are, which makes a GPU wait."""

    def __init__(self, packing: Packing, gate: Callable[[Tensor], Tensor] = silu_and_mul) -> None:
        self._pack, self._multiply, self._gate = packing.pack, packing.multiply, gate
        self.name = f"{packing.name}, one expert after the other"
        self._w1: list[Tensor] = []
        self._w2: list[Tensor] = []

    def finish(self, layer: Experts) -> None:
        self._w1 = [self._pack(weight) for weight in layer.w1.data]
        layer.register_parameter("w1", None)
        self._w2 = [self._pack(weight) for weight in layer.w2.data]
        layer.register_parameter("w2", None)

    def apply(self, layer: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        chosen, order = topk_ids.flatten().sort(stable=True)
        tokens = order // topk_ids.shape[1]
        rows, weights = x[tokens], topk_weights.flatten()[order, None]
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        # Summed in float32 and in the order of the experts, whatever else is in the batch.
        out = x.new_zeros(x.shape, dtype=torch.float32)
        start = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            span = slice(start, start + count)
            middle = self._gate(self._multiply(rows[span], self._w1[expert], None))
            part = self._multiply(middle, self._w2[expert], None)
            out.index_add_(0, tokens[span], part * weights[span])
            start += count
        return out.to(x.dtype)


def choose_moe_method(
    dtype: torch.dtype, device: torch.device, hidden_size: int, intermediate_size: int, native: NativeKernels | None
) -> MoEMethod:
    """The fastest method there is for experts [hidden_size, intermediate_size] on the device."""
    sizes = ((hidden_size, 2 * intermediate_size), (intermediate_size, hidden_size))
    gate = silu_and_mul if native is None else native.silu_and_mul
    return GroupedMoE(choose_packing(dtype, device, sizes, native), gate)


class Experts(Layer):
    """SwiGLU experts in two tensors: w1 [num_experts, 2 * intermediate_size, hidden_size], gates before ups, and w2
    [num_experts, hidden_size, intermediate_size]. A checkpoint has three matrices of each expert, or both tensors."""

    w1: Tensor
    w2: Tensor

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype, method: MoEMethod
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.method = method
        self.declare("w1", (num_experts, 2 * intermediate_size, hidden_size), dtype)
        self.declare("w2", (num_experts, hidden_size, intermediate_size), dtype)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | PendingSum:
        """As `MoEMethod.apply`."""
        return self.method.apply(self, x, topk_weights, topk_ids)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        hidden, middle = self.hidden_size, self.intermediate_size
        for expert in range(self.num_experts):
            name = f"{prefix}.{expert}"
            yield Piece(f"{name}.gate_proj.weight", "w1", (expert, slice(0, middle)), (middle, hidden))
            yield Piece(f"{name}.up_proj.weight", "w1", (expert, slice(middle, 2 * middle)), (middle, hidden))
            yield Piece(f"{name}.down_proj.weight", "w2", (expert, slice(0, hidden)), (hidden, middle))

    def stacked_pieces(self, prefix: str) -> Iterator[Piece]:
        """The same under transformers' own names, which it stores by `save_original_format=False`."""
        for name, parameter in (("gate_up_proj", "w1"), ("down_proj", "w2")):
            yield Piece(f"{prefix}.{name}", parameter, slice(None), tuple(self.get_parameter(parameter).shape))

    def finish(self) -> None:
        self.method.finish(self)
