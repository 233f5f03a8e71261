"""aiter.ops.rmsnorm."""

from __future__ import annotations

import torch
from aiter import _checks
from aiter._standin import record, require


def _demand(input: torch.Tensor, weight: torch.Tensor) -> None:
    assert input.dtype in (torch.float16, torch.bfloat16, torch.float32), f"rms_norm_opus: {input.dtype}"
    assert weight.dtype == input.dtype, "rms_norm_opus: weight dtype must match input"
    assert weight.shape[-1] == input.shape[-1], "rms_norm_opus: weight length != hidden"
    require(input.stride(-1) == 1 and weight.is_contiguous(), "rms_norm: dense rows and weight")


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight


def rms_norm(
    input: torch.Tensor, weight: torch.Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0
) -> torch.Tensor:
    """input / rms(input) * weight, in float32, rounded once."""
    record("rms_norm")
    _demand(input, weight)
    return _normed(input.float(), weight.float(), epsilon).to(input.dtype)


def rmsnorm2d_fwd(
    input: torch.Tensor, weight: torch.Tensor, epsilon: float, use_model_sensitive_rmsnorm: int = 0
) -> torch.Tensor:
    return rms_norm(input, weight, epsilon, use_model_sensitive_rmsnorm)


def rmsnorm2d_fwd_with_add(
    out: torch.Tensor,
    input: torch.Tensor,
    residual_in: torch.Tensor,
    residual_out: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    gemma_norm: bool = False,
    use_model_sensitive_rmsnorm: int = 0,
) -> None:
    """residual_out = input + residual_in; out = its norm (weight + 1 with gemma_norm)."""
    record("rmsnorm2d_fwd_with_add")
    _demand(input, weight)
    for name, t in (("out", out), ("residual_in", residual_in), ("residual_out", residual_out)):
        _checks.tensor(name, t, input.dtype, tuple(input.shape))
    total = input.float() + residual_in.float()
    residual_out.copy_(total)
    out.copy_(_normed(total, weight.float() + gemma_norm, epsilon))
