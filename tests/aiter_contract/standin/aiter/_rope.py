"""Rotary embedding in float32, both pairings."""

from __future__ import annotations

import torch


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """x [..., d] by angles whose cos and sin are [..., d/2] (or d: one per element) -> float32. NeoX pairs i with
    i + d/2, GPT-J 2i with 2i + 1."""
    x, half = x.float(), x.shape[-1] // 2
    if cos.shape[-1] == half:
        cos, sin = (torch.cat([t, t], -1) if is_neox else t.repeat_interleave(2, -1) for t in (cos, sin))
    if is_neox:
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos.float() + turned * sin.float()
