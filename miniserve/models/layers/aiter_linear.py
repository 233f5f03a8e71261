"""Linear layers with weights in 8 bits through aiter, on AMD's Instinct GPUs: what is multiplied is rounded too."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from miniserve.attention.aiter import AiterProducts
from miniserve.models.layers.linear import ScaledProduct
from miniserve.models.layers.weights import Step

_GROUP = 128  # values of a token that share a scale
# gfx942's format goes to 240; that near its end less is lost is vLLM's finding.
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 224.0}


def aiter_blockscale(aiter: AiterProducts, first_row: int) -> ScaledProduct:
    """For scales of blocks of 128 x 128."""
    return ScaledProduct(partial(_multiply, aiter), first_row)


def _multiply(
    aiter: AiterProducts, x: Tensor, weight: Tensor, scale: Tensor, step: Step, bias: Tensor | None
) -> Tensor:
    codes, x_scale = rounded_groups(x, weight.dtype)
    y = aiter.gemm_a8w8_blockscale(codes, weight, x_scale, scale, dtype=x.dtype)
    return y if bias is None else y + bias


def rounded_groups(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [T, K], K a multiple of 128 -> codes of that 8-bit dtype, [T, K], and float32 scales, [T, K / 128]."""
    groups = x.float().unflatten(1, (-1, _GROUP))
    scale = groups.abs().amax(-1).clamp_(min=1e-10) / _LARGEST[dtype]
    # The largest may come out a little beyond, which is NaN.
    codes = (groups / scale[..., None]).clamp_(-_LARGEST[dtype], _LARGEST[dtype])
    return codes.flatten(1).to(dtype), scale
