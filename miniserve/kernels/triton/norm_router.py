"""Everything between attention and the experts of a few tokens in one kernel: adding to the residual stream, the norm,
the router's product and the choice.

As three launches each would wait for the one before it with almost nothing to read. Here every program computes the
norm itself, while its row of the router's weight is being fetched, and the last to arrive chooses. A program is one
warp if a row fits its registers: warps would wait for each other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.elementwise import rms_normed
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.routing import Choice, choose
from miniserve.kernels.triton.small_linear import Workspace

FUSED_TOKENS = range(1, 5)
_COLUMNS = 2048  # of a row, that a warp holds


@triton.jit
def _norm_router_kernel(
    x_ptr, residual_ptr, norm_ptr, w_ptr, bias_ptr, normed_ptr, sum_ptr, weights_ptr, ids_ptr, logits_ptr, counts_ptr,
    size, eps, scaling,
    BLOCK_D: tl.constexpr, CHOICE: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the logit of one expert for one token."""
    E: tl.constexpr = CHOICE.num_experts
    start(PDL)
    expert, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < size
    w = tl.load(w_ptr + expert * size + cols, mask=inside, other=0.0)
    norm = tl.load(norm_ptr + cols, mask=inside, other=0.0)
    wait(PDL)
    at = token * size + cols
    x = tl.load(x_ptr + at, mask=inside, other=0.0) + tl.load(residual_ptr + at, mask=inside, other=0.0)
    normed = rms_normed(x, norm, size, eps)
    tl.store(logits_ptr + token * E + expert, tl.sum(w * normed.to(tl.float32), axis=0))
    tl.debug_barrier()
    arrived = tl.atomic_add(counts_ptr + token, 1, sem="acq_rel")
    if expert == 0:  # not earlier: others would wait for these stores, too
        tl.store(sum_ptr + at, x, mask=inside)
        tl.store(normed_ptr + at, normed, mask=inside)
    if arrived < E - 1:
        return
    tl.store(counts_ptr + token, 0)
    # The same row for each warp, so that none waits for another.
    copies = tl.arange(0, WARPS)
    tokens = token + tl.zeros_like(copies)
    experts = tl.arange(0, CHOICE.block)[None, :]
    all_logits = tl.load(logits_ptr + tokens[:, None] * E + experts, mask=experts < E, other=0.0, cache_modifier=".cg")
    choose(all_logits, tokens, copies == 0, bias_ptr, weights_ptr, ids_ptr, scaling, CHOICE)


def add_norm_route(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    workspace: Workspace,
    top_k: int,
    scaling: float,
    **asked: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `elementwise.add_rms_norm` of x and residual [T, hidden], contiguous, norm [hidden], then `routing.route` of
    the result with the router's weight float32 [E, hidden]; but `residual` does not change, since other programs read
    it. Returns the normed x and the new residual stream [T, hidden], and the choice: weights float32 and expert ids
    int32 [T, top_k]. asked: the rest of a `routing.Choice`.

    Programs read what others of the launch wrote: not for GPUs whose `Chip.splits` is false.
    """
    (tokens, size), num_experts = x.shape, weight.shape[0]
    normed, total = torch.empty_like(x), torch.empty_like(x)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    block_d = triton.next_power_of_2(size)
    num_warps = max(1, block_d // _COLUMNS)
    _norm_router_kernel[(num_experts, tokens)](
        x, residual, norm, weight, weight if bias is None else bias, normed, total, weights, ids, workspace.parts,
        workspace.counts, size, eps, scaling,
        BLOCK_D=block_d, CHOICE=Choice.of(num_experts, bias, top_k=top_k, **asked), WARPS=num_warps,
        num_warps=num_warps, **launch_options(x.device),
    )  # fmt: skip
    return normed, total, weights, ids
