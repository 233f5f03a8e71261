"""Before aiter's experts are used they run at the model's own shapes: where these have no tuned kernel, its choice of
one may be wrong, or none."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from miniserve.attention.aiter import AiterExperts
from miniserve.models.description import MoEConfig
from miniserve.models.layers.aiter_moe import AiterMoE
from miniserve.models.layers.experts import Experts, GroupedMoE
from miniserve.models.layers.linear import Packing
from miniserve.runner.self_check import TOLERANCE, distance

_FLOAT32 = Packing("float32", lambda weight: weight, lambda x, weight, _: functional.linear(x, weight.float()))


def experts_failure(
    aiter: AiterExperts,
    config: MoEConfig,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
    num_tokens: Sequence[int],
) -> str | None:
    """What is wrong with steps of these sizes beside float32, a sentence; None where nothing is. The weights are made
    up, and as large as a layer's while it runs."""
    generator = torch.Generator(device=device).manual_seed(0)
    shape = (config.num_experts, hidden_size, config.intermediate_size)
    exact = Experts(*shape, dtype=dtype, method=GroupedMoE(_FLOAT32))
    exact.allocate(device)
    tried = Experts(*shape, dtype=dtype, method=AiterMoE(aiter))
    for name, weight in exact.named_parameters():
        weight.data.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)
        tried.register_parameter(name, nn.Parameter(weight.data, requires_grad=False))
    try:
        exact.finish()
        tried.finish()
        for count in num_tokens:
            x = torch.randn(count, hidden_size, device=device, generator=generator).to(dtype)
            scores = torch.rand(count, config.num_experts, device=device, generator=generator)
            weights, ids = scores.topk(config.top_k, dim=-1)
            # Of rows, not of the whole: one wrong row must not be lost among many.
            error = max(map(distance, tried(x, weights, ids).float(), exact(x.float(), weights, ids)))
            if not error <= TOLERANCE[dtype]:  # NaN too
                return f"for {count} tokens it is {error:.2%} off ({TOLERANCE[dtype]:.0%} allowed)"
    except Exception as error:  # what a kernel raises is a failure, whatever it is
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None
