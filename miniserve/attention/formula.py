"""Attention by its formula, in float32: for what PyTorch's fused attention lacks, and to compare kernels with."""

from __future__ import annotations

import torch
from torch import Tensor

FP8_PARTITION = 256  # keys whose weights aiter's HIP kernels normalise together


def visible_keys(distance: Tensor, window: int | None) -> Tensor:
    """distance: a query's position less a key's, any shape. window: see `AttentionSpec.sliding_window`."""
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attention_by_formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    fp8: torch.dtype | None = None,
) -> Tensor:
    """q [..., Lq, H, D], k [..., Lk, KH, D], v [..., Lk, KH, Dv], visible bool [..., Lq, Lk] -> float32 [..., Lq, H,
    Dv].

    Query head h reads KV head h // (H // KH); scale, softcap, sinks are as in `AttentionSpec` and `AttentionLayer`.
    fp8: multiplied in that dtype, as aiter's HIP kernels do over an fp8 cache: queries are rounded to it, and so are
    the weights of each 256 keys, which sum to 1 there.
    """
    num_keys, num_kv_heads = k.shape[-3:-1]
    queries = (q if fp8 is None else q.to(fp8)).float().unflatten(-2, (num_kv_heads, -1))
    scores = torch.einsum("...qhgd,...khd->...hgqk", queries, k.float()) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible[..., None, None, :, :], float("-inf"))
    if sinks is not None:
        column = sinks.float().view(num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1) if fp8 is None else _rounded_softmax(scores, fp8)
    weights = weights[..., :num_keys]
    return torch.einsum("...hgqk,...khd->...qhgd", weights, v.float()).flatten(-3, -2)


def _rounded_softmax(scores: Tensor, fp8: torch.dtype) -> Tensor:
    parts = scores.split(FP8_PARTITION, dim=-1)
    shares = torch.stack([part.logsumexp(-1) for part in parts], dim=-1).softmax(-1)
    # NaN: a part of which no key is visible, whose share is 0.
    rounded = [part.softmax(-1).nan_to_num(0.0).to(fp8).float() for part in parts]
    return torch.cat([part * share[..., None] for part, share in zip(rounded, shares.unbind(-1), strict=True)], dim=-1)
