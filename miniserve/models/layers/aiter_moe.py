"""Routed experts through aiter's fused kernels, on AMD's Instinct GPUs."""

from __future__ import annotations

import torch
from torch.nn import functional

from miniserve.attention.aiter import AiterExperts, Unavailable, load_experts
from miniserve.attention.platform import Platform
from miniserve.models.layers.experts import Experts

DTYPES = (torch.bfloat16, torch.float16)
_ARCHS = ("gfx942", "gfx950")
_MINIMUM_AITER = (0, 1, 20)  # v0.1.19's routing kernel writes where it must not (aiter #4530)


def find_experts(platform: Platform) -> AiterExperts | None:
    """aiter's kernels, None where they cannot be used: the engine's own are there everywhere."""
    version = platform.aiter_version
    if platform.arch not in _ARCHS or version is None or version < _MINIMUM_AITER:
        return None
    try:
        return load_experts()
    except Unavailable:
        return None


class AiterMoE:
    """A `MoEMethod`: the weights in the order that the kernels read them in, and padded with zeros to the
    kernels' tiles (aiter's CK kernels pad nothing themselves) where a model's sizes are not multiples of these."""

    def __init__(self, aiter: AiterExperts) -> None:
        self._aiter = aiter
        self._hidden_size = 0
        # Not parameters: these lose the mark by which aiter knows that the order is its own.
        self._w1, self._w2 = torch.empty(0), torch.empty(0)

    def finish(self, layer: Experts) -> None:
        middle, hidden = layer.intermediate_size, layer.hidden_size
        self._hidden_size = _whole_tiles(hidden, 128)
        more = self._hidden_size - hidden
        wider = _whole_tiles(middle, 64 if middle <= 192 else 128) - middle
        w1 = layer.w1.data.unflatten(1, (2, middle))
        self._w1 = self._aiter.shuffle_weight(functional.pad(w1, (0, more, 0, wider)).flatten(1, 2))
        layer.register_parameter("w1", None)
        self._w2 = self._aiter.shuffle_weight(functional.pad(layer.w2.data, (0, wider, 0, more)))
        layer.register_parameter("w2", None)

    def apply(
        self, layer: Experts, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
    ) -> torch.Tensor:
        if (more := self._hidden_size - layer.hidden_size) > 0:
            x = functional.pad(x, (0, more))
        out = self._aiter.fused_moe(x.contiguous(), self._w1, self._w2, topk_weights.contiguous(), topk_ids.int())
        return out[:, : layer.hidden_size]


def _whole_tiles(size: int, tile: int) -> int:
    return -(-size // tile) * tile
