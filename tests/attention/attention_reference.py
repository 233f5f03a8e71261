"""Attention written out in float64, one query at a time: what every backend is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from miniserve.attention.spec import AttentionSpec


@dataclass(frozen=True)
class Layer:
    """An `AttentionLayer` for tests."""

    spec: AttentionSpec
    sinks: torch.Tensor | None = None
    layer_index: int = 0
    k_scale: torch.Tensor = field(default_factory=lambda: torch.ones(1))
    v_scale: torch.Tensor = field(default_factory=lambda: torch.ones(1))


def attend_one(layer: Layer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q [H, D] at the last of k, v [L, KH, D] -> float64 [H, D]."""
    spec = layer.spec
    group, length = spec.num_heads // spec.num_kv_heads, k.shape[0]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("hd,lhd->hl", q.double(), keys) * spec.scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.sliding_window is not None:
        scores[:, : max(0, length - spec.sliding_window)] = float("-inf")
    if layer.sinks is not None:
        scores = torch.cat([scores, layer.sinks.double()[:, None]], dim=1)
    weights = scores.softmax(dim=1)[:, :length]
    return torch.einsum("hl,lhd->hd", weights, values)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def pack_shuffled(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear blocks [..., block_size, num_kv_heads, head_dim] -> the shuffled key and value of the same blocks."""
    x = 16 // k.dtype.itemsize
    key = k.unflatten(-1, (-1, x)).movedim(-4, -2)  # [..., KH, D/x, BS, x]
    value = v.unflatten(-3, (-1, x)).movedim(-3, -1).movedim(-3, -4)  # [..., KH, BS/x, D, x]
    return key.contiguous(), value.contiguous()
