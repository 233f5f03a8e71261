"""aiter.ops.gemm_op_a8w8: products of weights and activations in 8 bits."""

from __future__ import annotations

import torch
from aiter import _checks, _standin
from aiter._standin import record, require


def gemm_a8w8_blockscale(XQ, WQ, x_scale, w_scale, dtype=torch.bfloat16, isBpreshuffled=False):
    """XQ [M, K] and WQ [N, K] in the device's fp8, x_scale float32 [M, K / 128], w_scale float32 [⌈N / 128⌉, K / 128]
    -> [M, N]."""
    record("gemm_a8w8_blockscale")
    assert dtype in (torch.bfloat16, torch.float16), f"Output {dtype=} is currently not supported in gemm_a8w8"
    require(not isBpreshuffled, "the stand-in covers weights as they are")
    (m, k), n = XQ.shape, WQ.shape[0]
    _checks.tensor("XQ", XQ, _standin.device.fp8)
    _checks.tensor("WQ", WQ, _standin.device.fp8, (n, k))
    require(k % 128 == 0, f"the kernel reads whole groups of 128 columns, not {k}")
    _checks.tensor("x_scale", x_scale, torch.float32, (m, k // 128))
    _checks.tensor("w_scale", w_scale, torch.float32, (-(-n // 128), k // 128))
    x = XQ.float() * x_scale.repeat_interleave(128, 1)
    w = WQ.float() * w_scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)
    return (x @ w.T).to(dtype)
