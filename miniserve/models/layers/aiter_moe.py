"""Routed experts through aiter's fused kernels, on AMD's Instinct GPUs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.attention.aiter import AiterProducts
from miniserve.models.layers.experts import Experts, MoEMethod

_GROUP = 128  # rows and columns of a block, values of a token, that share a scale


class AiterMoE(MoEMethod):
    """Weights in the order that the kernels read them in, padded with zeros to the kernels' tiles where a model's sizes
    are not multiples of these (aiter's CK kernels pad nothing themselves). Where they are codes aiter rounds what it
    multiplies them with to 8 bits too, by groups of 128 values of a token (scales of blocks) or all of a token's
    (scales of rows)."""

    def __init__(self, aiter: AiterProducts) -> None:
        self._aiter = aiter
        self._more = 0  # columns of zeros that x needs
        self._arguments: dict[str, Any] = {}

    def finish(self, layer: Experts) -> None:
        scaled, middle = layer.w1.dtype.itemsize == 1, layer.intermediate_size
        wider = -middle % (64 if middle <= 192 and not scaled else _GROUP)
        self._more = more = -layer.hidden_size % _GROUP
        if scaled:
            self._arguments = self._scales(layer, wider, more)
        w1 = _padded(layer.w1.data.unflatten(1, (2, middle)), (0, more, 0, wider)).flatten(1, 2)
        # Not parameters: these lose the mark by which aiter knows that the order is its own.
        self._arguments["w1"] = self._aiter.shuffle_weight(w1)
        layer.register_parameter("w1", None)
        self._arguments["w2"] = self._aiter.shuffle_weight(_padded(layer.w2.data, (0, wider, 0, more)))
        layer.register_parameter("w2", None)
        if layer.num_experts < layer.experts.count:  # int32 [experts of the model], 1 for those of this rank
            here = torch.zeros(layer.experts.count, dtype=torch.int32, device=w1.device)
            here[layer.experts.held] = 1
            self._arguments["expert_mask"] = here

    def _scales(self, layer: Experts, wider: int, more: int) -> dict[str, Any]:
        """Of the padded weights, and how to read them. Drops the layer's."""
        w1, w2 = layer.w1_scale.data.unflatten(1, (2, -1)), layer.w2_scale.data
        first, second = layer.weights.steps["w1"], layer.weights.steps["w2"]
        if first is None or second is None:
            quant_type = self._aiter.QuantType.per_Token
            w1 = functional.pad(w1, (0, wider)).flatten(1)[..., None]
            w2 = functional.pad(w2, (0, more))[..., None]
        else:  # each part begins with a block, so of a block's steps, which are alike, the first is taken
            quant_type = self._aiter.QuantType.per_1x128
            w1 = w1[:, :, :: _GROUP // first[0], :: _GROUP // first[1]].flatten(1, 2)
            w2 = w2[:, :: _GROUP // second[0], :: _GROUP // second[1]]
        layer.register_parameter("w1_scale", None)
        layer.register_parameter("w2_scale", None)
        return {"w1_scale": w1.contiguous(), "w2_scale": w2.contiguous(), "quant_type": quant_type}

    def apply(self, layer: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        size = x.shape[1]
        if self._more:
            x = functional.pad(x, (0, self._more))
        choice = {"topk_weight": topk_weights.contiguous(), "topk_ids": topk_ids.int()}
        return self._aiter.fused_moe(x.contiguous(), **choice, **self._arguments)[:, :size]


def _padded(weight: Tensor, more: tuple[int, ...]) -> Tensor:
    """With zeros. PyTorch pads no tensors of 8-bit floats."""
    if weight.dtype.itemsize > 1:
        return functional.pad(weight, more)
    return functional.pad(weight.view(torch.uint8), more).view(weight.dtype)
