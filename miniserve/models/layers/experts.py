"""Routed experts: the declaration of their weights, apart from the way in which tokens are multiplied with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.base import NOWHERE, Layer, Piece
from miniserve.models.layers.linear import Packing, choose_packing
from miniserve.models.layers.ops import PendingSum, silu_and_mul
from miniserve.parallel.shard import Part, whole

if TYPE_CHECKING:
    from miniserve.models.layers.contracts import Route

EXPERT_MODULES = ("gate_proj", "up_proj", "down_proj")


class MoEMethod:
    """The format of `Experts`: their parameters, the tensors of a checkpoint that fill them, and how tokens are
    multiplied with them; one object per layer. name: for people. Here: two tensors, w1 [num_experts, 2 *
    intermediate_size, hidden_size], gates before ups, and w2 [num_experts, hidden_size, intermediate_size]."""

    route: Route | None = None
    name: str = ""

    def declare(self, layer: Experts) -> None:
        """Declare the layer's parameters, once it knows its sizes."""
        experts, hidden, middle = layer.num_experts, layer.hidden_size, layer.intermediate_size
        layer.declare("w1", (experts, 2 * middle, hidden), layer.dtype)
        layer.declare("w2", (experts, hidden, middle), layer.dtype)

    def pieces(self, layer: Experts, prefix: str) -> Iterator[Piece]:
        """As `Layer.pieces`, of a checkpoint with three matrices of each expert."""
        hidden, width, middle = whole(layer.hidden_size), layer.width, layer.intermediate_size
        both = {"gate_proj": slice(0, middle), "up_proj": slice(middle, 2 * middle)}
        for expert in range(layer.experts.count):
            held = layer.experts.held.start <= expert < layer.experts.held.stop
            place = expert - layer.experts.held.start
            for name, rows in both.items():
                shape, source = (width.count, hidden.count), (width.held, hidden.held)
                yield Piece(f"{prefix}.{expert}.{name}.weight", "w1", (place, rows) if held else NOWHERE, shape, source)
            shape, source = (hidden.count, width.count), (hidden.held, width.held)
            index = (place, hidden.held) if held else NOWHERE
            yield Piece(f"{prefix}.{expert}.down_proj.weight", "w2", index, shape, source)

    def stacked_pieces(self, layer: Experts, prefix: str) -> Iterator[Piece]:
        """The same, of a checkpoint under transformers' own names: both tensors of all experts, which it stores by
        `save_original_format=False`."""
        experts, hidden, width, middle = layer.experts, whole(layer.hidden_size), layer.width, layer.intermediate_size
        shape = (experts.count, 2 * width.count, hidden.count)
        for ups in (0, 1):
            rows = slice(ups * middle, (ups + 1) * middle)
            source = slice(ups * width.count + width.held.start, ups * width.count + width.held.stop)
            index = (slice(None), rows)
            yield Piece(f"{prefix}.gate_up_proj", "w1", index, shape, (experts.held, source, hidden.held))
        shape, parts = (experts.count, hidden.count, width.count), (experts.held, hidden.held, width.held)
        yield Piece(f"{prefix}.down_proj", "w2", slice(None), shape, parts)

    def finish(self, layer: Experts) -> None:
        """The weights are loaded: put them into the form that `apply` wants, and free what is not needed any more."""

    def apply(self, layer: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | PendingSum:
        """x [T, hidden], topk_weights float32 [T, K], topk_ids int [T, K] -> [T, hidden], x's dtype: the sum of each
        token's experts, weighted; or what will give that sum. Ids count all experts of the model; those that other
        ranks have add nothing."""
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
        chosen = topk_ids.flatten() - layer.experts.held.start
        elsewhere = (chosen < 0) | (chosen >= layer.num_experts)
        chosen, order = chosen.masked_fill(elsewhere, layer.num_experts).sort(stable=True)
        tokens = order // topk_ids.shape[1]
        rows, weights = x[tokens], topk_weights.flatten()[order, None]
        experts, counts = torch.unique_consecutive(chosen, return_counts=True)
        # Summed in float32 and in the order of the experts, whatever else is in the batch.
        out = x.new_zeros(x.shape, dtype=torch.float32)
        start = 0
        for expert, count in zip(experts.tolist(), counts.tolist(), strict=True):
            if expert == layer.num_experts:  # the last: those of other ranks
                break
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
    """SwiGLU experts. experts, width: how many there are and the size of each one's middle, all or the part that this
    rank has; then the output is a part of a sum over ranks. num_experts, intermediate_size: of this rank."""

    w1: Tensor
    w2: Tensor
    w1_scale: Tensor
    w2_scale: Tensor

    def __init__(
        self, experts: int | Part, hidden_size: int, width: int | Part, *, dtype: torch.dtype, method: MoEMethod
    ) -> None:
        super().__init__()
        self.experts, self.hidden_size, self.width = whole(experts), hidden_size, whole(width)
        self.num_experts, self.intermediate_size = self.experts.size, self.width.size
        self.dtype = dtype
        self.method = method
        method.declare(self)

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | PendingSum:
        """As `MoEMethod.apply`."""
        return self.method.apply(self, x, topk_weights, topk_ids)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        return self.method.pieces(self, prefix)

    def stacked_pieces(self, prefix: str) -> Iterator[Piece]:
        return self.method.stacked_pieces(self, prefix)

    def finish(self) -> None:
        self.method.finish(self)
