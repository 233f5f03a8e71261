"""Attention over parts of a sequence, put together by the parts' log-sum-exps."""

from __future__ import annotations

import torch
from torch import Tensor


def merge_lse(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two parts' results as those of their union (Flash-Decoding, Dao et al. 2023).

    out [tokens, num_heads, head_dim]; lse float32 [num_heads, tokens], the natural logarithm of the softmax's sum, -inf
    where a part has no keys (what its out holds there does not count). Returns both, in float32.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    total = torch.zeros(out_a.shape, dtype=torch.float32, device=out_a.device)
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part - lse).nan_to_num_(0.0).T[..., None]  # NaN: -inf - -inf
        total += torch.where(weight > 0, out.float() * weight, 0.0)
    return total, lse
