"""Routed experts through aiter's fused kernels, on AMD's Instinct GPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from miniserve.attention.aiter import AiterExperts, Unavailable, load_experts
from miniserve.attention.platform import Platform
from miniserve.models.layers.experts import Experts, MoEMethod

NAME = "aiter fused_moe"
_DTYPES = (torch.bfloat16, torch.float16)
_ARCHS = ("gfx942", "gfx950")
_MINIMUM_AITER = (0, 1, 20)  # v0.1.19's routing kernel writes where it must not (aiter #4530)


def refusal(platform: Platform, dtype: torch.dtype) -> str | None:
    """Why aiter's kernels cannot be used there, None where they can. The engine's own can be everywhere."""
    if platform.arch not in _ARCHS:
        return f"it runs on {' or '.join(_ARCHS)}, not on {platform.arch}"
    if platform.aiter_version is None:
        return platform.aiter_unavailable
    if platform.aiter_version < _MINIMUM_AITER:
        needed, found = (".".join(map(str, version)) for version in (_MINIMUM_AITER, platform.aiter_version))
        return f"it needs aiter v{needed} or newer, not v{found}, whose routing writes where it must not"
    return None if dtype in _DTYPES else f"it does not compute in {str(dtype).removeprefix('torch.')}"


def find_experts(platform: Platform, dtype: torch.dtype) -> AiterExperts | str:
    """aiter's kernels, or why they cannot be used."""
    if (reason := refusal(platform, dtype)) is not None:
        return reason
    try:
        return load_experts()
    except Unavailable as error:
        return str(error)


def describe_experts(name: str, refused: str | None) -> str:
    """Which method multiplies the experts, and why not aiter's, for people."""
    return f"experts by {name}{f'; not by {NAME}: {refused}' if refused else ''}"


class AiterMoE(MoEMethod):
    """The weights in the order that the kernels read them in, padded with zeros to the kernels' tiles where a model's
    sizes are not multiples of these (aiter's CK kernels pad nothing themselves)."""

    name = NAME

    def __init__(self, aiter: AiterExperts) -> None:
        self._aiter = aiter
        self._hidden_size = 0
        # Not parameters: these lose the mark by which aiter knows that the order is its own.
        self._w1, self._w2 = torch.empty(0), torch.empty(0)
        self._here: Tensor | None = None  # int32 [experts of the model], 1 for those of this rank; None: all are

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
        if layer.num_experts < layer.experts.count:
            self._here = torch.zeros(layer.experts.count, dtype=torch.int32, device=self._w1.device)
            self._here[layer.experts.held] = 1

    def apply(self, layer: Experts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        if (more := self._hidden_size - layer.hidden_size) > 0:
            x = functional.pad(x, (0, more))
        choice = (topk_weights.contiguous(), topk_ids.int())
        more_arguments = {} if self._here is None else {"expert_mask": self._here}
        out = self._aiter.fused_moe(x.contiguous(), self._w1, self._w2, *choice, **more_arguments)
        return out[:, : layer.hidden_size]


def _whole_tiles(size: int, tile: int) -> int:
    return -(-size // tile) * tile
