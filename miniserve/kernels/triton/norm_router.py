"""What lies between attention and the experts of a few tokens, in one kernel: the residual stream's addition and norm,
the router's product, the choice.

As three launches each would wait for the one before it with next to nothing to read. Here every program makes the norm
for itself, while its rows of the router's weight are there already, and the last to arrive chooses.
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
# Of a program: the router's weights that it holds in registers, and the warps for them where a row is not longer.
_WEIGHTS, _WARPS = 8192, 4


@triton.jit
def _norm_router_kernel(
    x_ptr, residual_ptr, norm_ptr, w_ptr, bias_ptr, normed_ptr, sum_ptr, weights_ptr, ids_ptr, logits_ptr, counts_ptr,
    size, eps, scaling,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHOICE: tl.constexpr, WARPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the logits of BLOCK_N experts for one token."""
    E: tl.constexpr = CHOICE.num_experts
    start(PDL)
    program, token = tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D)
    inside = cols < size
    w = tl.load(w_ptr + rows[:, None] * size + cols[None, :], mask=(rows < E)[:, None] & inside[None, :], other=0.0)
    norm = tl.load(norm_ptr + cols, mask=inside, other=0.0)
    wait(PDL)
    at = token * size + cols
    x = tl.load(x_ptr + at, mask=inside, other=0.0) + tl.load(residual_ptr + at, mask=inside, other=0.0)
    normed = rms_normed(x, norm, size, eps)
    logits = tl.sum(w * normed.to(tl.float32)[None, :], axis=1)
    tl.store(logits_ptr + token * E + rows, logits, mask=rows < E)
    tl.debug_barrier()
    arrived = tl.atomic_add(counts_ptr + token, 1, sem="acq_rel")
    if program == 0:  # not earlier: others would wait for these stores, too
        tl.store(sum_ptr + at, x, mask=inside)
        tl.store(normed_ptr + at, normed, mask=inside)
    if arrived < tl.num_programs(0) - 1:
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
    what it gives with the router's weight float32 [E, hidden]; but `residual` is left as it is, since other programs
    read it. Returns the normed x and the new residual stream [T, hidden], and the choice: weights float32 and expert
    ids int32 [T, top_k]. asked: the rest of a `routing.Choice`.

    Programs read what others of the launch wrote: not for GPUs whose `Chip.splits` is false.
    """
    (tokens, size), num_experts = x.shape, weight.shape[0]
    normed, total = torch.empty_like(x), torch.empty_like(x)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    block_d = triton.next_power_of_2(size)
    block_n, num_warps = max(1, _WEIGHTS // block_d), max(_WARPS, block_d // 2048)
    _norm_router_kernel[(triton.cdiv(num_experts, block_n), tokens)](
        x, residual, norm, weight, weight if bias is None else bias, normed, total, weights, ids, workspace.parts,
        workspace.counts, size, eps, scaling,
        BLOCK_N=block_n, BLOCK_D=block_d, WARPS=num_warps, num_warps=num_warps,
        CHOICE=Choice.of(num_experts, bias, top_k=top_k, **asked), **launch_options(x.device),
    )  # fmt: skip
    return normed, total, weights, ids
