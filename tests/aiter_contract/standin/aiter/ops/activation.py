"""aiter.ops.activation."""

from __future__ import annotations

import torch
from aiter import _checks
from aiter._standin import check, record, require


def silu_and_mul(out: torch.Tensor, input: torch.Tensor, limit: float = 0.0) -> None:
    """input [..., 2I], gate first -> out [..., I]; out comes first in the call."""
    record("silu_and_mul")
    check(limit >= 0.0, "silu_and_mul: limit must be >= 0")
    check(input.dtype == out.dtype, "For bf16/fp16 input, output type must match input type")
    require(limit == 0.0, "the stand-in covers no limit")
    _checks.tensor("input", input, input.dtype)
    _checks.tensor("out", out, input.dtype, (*input.shape[:-1], input.shape[-1] // 2))
    gate, up = input.float().chunk(2, -1)
    out.copy_(torch.nn.functional.silu(gate) * up)
