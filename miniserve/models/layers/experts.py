"""Routed experts: the declaration of their weights, apart from the way in which tokens are multiplied with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miniserve.kernels.native import NativeKernels
from miniserve.models.layers.base import Layer, Piece
from miniserve.models.layers.linear import Packing, choose_packing
from miniserve.models.layers.ops import PendingSum, silu_and_mul
from miniserve.models.layers.weights import Placed, Weights, placed
from miniserve.parallel.shard import Part, whole

if TYPE_CHECKING:
    from miniserve.models.layers.contracts import Route


def expert_matrices(hidden_size: int, width: int | Part) -> dict[str, dict[str, Placed]]:
    """An expert's matrices, in the parameters w1, gates before ups, and w2."""
    gate_up = placed(hidden_size, {"gate_proj": width, "up_proj": width})
    return {"w1": gate_up, "w2": placed(width, {"down_proj": hidden_size})}


class MoEMethod:
    """How tokens are multiplied with `Experts`; one object per layer. name: for people."""

    route: Route | None = None
    name: str = ""

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
    rank has; then the output is a part of a sum over ranks. num_experts, intermediate_size: of this rank.

    Two parameters: w1 [num_experts, 2 * intermediate_size, hidden_size], gates before ups, and w2 [num_experts,
    hidden_size, intermediate_size]."""

    w1: Tensor
    w2: Tensor
    w1_scale: Tensor
    w2_scale: Tensor

    def __init__(
        self,
        experts: int | Part,
        hidden_size: int,
        width: int | Part,
        *,
        dtype: torch.dtype,
        method: MoEMethod,
        weights: Weights | None = None,
    ) -> None:
        """weights: how they are stored, None for plain ones."""
        super().__init__()
        self.experts, self.hidden_size, self.width = whole(experts), hidden_size, whole(width)
        self.num_experts, self.intermediate_size = self.experts.size, self.width.size
        self.dtype = dtype
        self.method, self.weights = method, weights or Weights()
        self._matrices = expert_matrices(hidden_size, width)
        self.weights.declare(self, self._matrices, dtype, lead=(self.num_experts,))

    def forward(self, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor | PendingSum:
        """As `MoEMethod.apply`."""
        return self.method.apply(self, x, topk_weights, topk_ids)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        for expert in range(self.experts.count):
            place = expert - self.experts.held.start
            lead = (place,) if 0 <= place < self.num_experts else None
            for parameter, parts in self._matrices.items():
                for module, part in parts.items():
                    yield from self.weights.pieces(f"{prefix}.{expert}.{module}.weight", parameter, part, lead)

    def stacked_pieces(self, prefix: str) -> Iterator[Piece]:
        """The same of a checkpoint under transformers' own names: both tensors of all experts, as it stores them by
        `save_original_format=False`. Of weights in 8 bits there is none but by blocks, the ups beginning one: what
        scales mean where a block has gates and ups is not agreed on."""
        form, count = self.weights.form, self.width.count
        if form is not None and (form.grain != "blocks" or count % form.block[0]):
            return
        for parameter, stacked in (("w1", "gate_up_proj"), ("w2", "down_proj")):
            parts = self._matrices[parameter].values()
            for number, (rows, columns, begin) in enumerate(parts):
                first = number * rows.count
                held = slice(first + rows.held.start, first + rows.held.stop)
                part = Placed(Part(len(parts) * rows.count, held), columns, begin)
                yield from self.weights.pieces(f"{prefix}.{stacked}", parameter, part, (slice(None),), self.experts)

    def finish(self) -> None:
        self.weights.finish(self, self._matrices)
        self.method.finish(self)
