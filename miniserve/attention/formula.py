"""Attention by its formula, in float32: for what PyTorch's fused attention lacks, and to compare kernels with."""

from __future__ import annotations

import torch
from torch import Tensor


def visible_keys(distance: Tensor, window: int | None) -> Tensor:
    """distance: a query's position less a key's, any shape. window: see `AttentionSpec.sliding_window`."""
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attention_by_formula(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, *, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q [..., Lq, H, D], k [..., Lk, KH, D], v [..., Lk, KH, Dv], visible bool [..., Lq, Lk] -> float32 [..., Lq, H,
    Dv].

    Query head h reads KV head h // (H // KH); scale, softcap, sinks are as in `AttentionSpec` and `AttentionLayer`.
    """
    num_keys, num_kv_heads = k.shape[-3:-1]
    queries = q.float().unflatten(-2, (num_kv_heads, -1))
    scores = torch.einsum("...qhgd,...khd->...hgqk", queries, k.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[..., None, None, :, :], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., :num_keys]
    return torch.einsum("...hgqk,...khd->...qhgd", weights, v.float()).flatten(-3, -2)
