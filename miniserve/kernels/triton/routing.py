"""The choice of experts on a GPU: from logits, or for tens of tokens from the hidden states in one kernel."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.small_linear import MAX_ROWS, Workspace

# Tokens for which the router's product and the choice are one launch: for fewer, a linear and `route` are faster
# (measured on an H100), for more the vendor's library is.
FUSED_TOKENS = range(17, MAX_ROWS + 1)
_MOST_SPLITS = 16


class Choice(NamedTuple):
    """What a kernel that ends with `choose` is compiled for. block: a power of two, not below num_experts."""

    num_experts: int
    block: int
    biased: bool
    top_k: int
    num_groups: int
    top_groups: int
    sigmoid: bool
    normalize: bool

    @staticmethod
    def of(num_experts: int, bias: torch.Tensor | None, **asked: Any) -> Choice:
        return Choice(num_experts, max(16, triton.next_power_of_2(num_experts)), bias is not None, **asked)


@triton.jit
def choose(
    logits, tokens, valid, bias_ptr, weights_ptr, ids_ptr, scaling,
    CHOICE: tl.constexpr,
):  # fmt: skip
    """Store the `Choice` for logits [tokens, block], of which the first num_experts count."""
    E: tl.constexpr = CHOICE.num_experts
    BLOCK_E: tl.constexpr = CHOICE.block
    K: tl.constexpr = CHOICE.top_k
    experts = tl.arange(0, BLOCK_E)[None, :]
    inside = experts < E
    logits = tl.where(inside, logits, float("-inf"))
    if CHOICE.sigmoid:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
        scores = weights / tl.sum(weights, axis=1)[:, None]
    choice = scores
    if CHOICE.biased:
        choice = scores + tl.load(bias_ptr + experts, mask=inside, other=0.0)
    choice = tl.where(inside, choice, float("-inf"))
    if CHOICE.top_groups < CHOICE.num_groups:
        choice = _close_groups(choice, CHOICE)
    # As integers of the same order, whose maximum NVIDIA's GPUs find by one instruction. Experts that cannot be chosen
    # any more sort below all others, NaNs included, so that no expert is chosen twice.
    bits = choice.to(tl.int32, bitcast=True)
    keys = tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF)
    keys = tl.where(inside, keys, -0x80000000)
    places = tl.full(keys.shape, K, tl.int32)
    for k in tl.static_range(K):
        best = tl.max(keys, axis=1)[:, None]
        expert = tl.min(tl.where(keys == best, experts, BLOCK_E), axis=1)[:, None]
        places = tl.where(experts == expert, k, places)
        keys = tl.where(experts == expert, -0x80000000, keys)
    kept = places < K
    if CHOICE.normalize:
        scores = scores / (tl.sum(tl.where(kept, scores, 0.0), axis=1)[:, None] + 1e-20)
    at = tokens[:, None] * K + places
    mask = valid[:, None] & kept
    tl.store(weights_ptr + at, scores * scaling, mask=mask)
    tl.store(ids_ptr + at, experts + tl.zeros_like(places), mask=mask)


@triton.jit
def _close_groups(choice, CHOICE: tl.constexpr):
    """-inf for all experts outside the `top_groups` best of `num_groups` equal groups; their number is a power of two
    here."""
    M: tl.constexpr = choice.shape[0]
    E: tl.constexpr = CHOICE.block
    GROUPS: tl.constexpr = CHOICE.num_groups
    TOP_GROUPS: tl.constexpr = CHOICE.top_groups
    size: tl.constexpr = E // GROUPS
    grouped = tl.reshape(choice, (M, GROUPS, size))
    worth = tl.max(grouped, axis=2)
    if CHOICE.biased:
        members = tl.arange(0, size)[None, None, :]
        first = tl.min(tl.where(grouped == worth[:, :, None], members, size - 1), axis=2)
        worth += tl.max(tl.where(members == first[:, :, None], float("-inf"), grouped), axis=2)
    groups = tl.arange(0, GROUPS)[None, :]
    opened = tl.zeros((M, GROUPS), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        best = tl.min(tl.where(worth == tl.max(worth, axis=1)[:, None], groups, GROUPS - 1), axis=1)[:, None]
        opened = tl.where(groups == best, 1, opened)
        worth = tl.where(groups == best, float("-inf"), worth)
    closed = tl.where(opened[:, :, None] == 1, grouped, float("-inf"))
    return tl.reshape(closed, (M, E))


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, scaling,
    CHOICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    E: tl.constexpr = CHOICE.num_experts
    BLOCK_E: tl.constexpr = CHOICE.block
    start(PDL)
    wait(PDL)
    tokens = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    experts = tl.arange(0, BLOCK_E)[None, :]
    logits = tl.load(logits_ptr + tokens[:, None] * E + experts, mask=experts < E, other=0.0).to(tl.float32)
    choose(logits, tokens, tokens >= 0, bias_ptr, weights_ptr, ids_ptr, scaling, CHOICE)


@triton.jit
def _add_product(acc, x, w):
    """acc + x wᵀ as in float32, x [tokens, k], w float32 [experts, k]. For bfloat16 x the weight is split into three
    bfloat16 parts, whose sum is the weight: the matrix units multiply them exactly and sum in float32."""
    if x.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(x, tl.trans(low), acc)
        acc = tl.dot(x, tl.trans(middle), acc)
        return tl.dot(x, tl.trans(high), acc)
    return tl.dot(x.to(tl.float32), tl.trans(w), acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def _router_kernel(
    x_ptr, w_ptr, bias_ptr, weights_ptr, ids_ptr, parts_ptr, counts_ptr, num_tokens, size, x_row, scaling,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, CHOICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens and one of SPLITS parts of the hidden size; the last to arrive sums and chooses."""
    E: tl.constexpr = CHOICE.num_experts
    BLOCK_E: tl.constexpr = CHOICE.block
    start(PDL)
    block, split = tl.program_id(0), tl.program_id(1)
    tokens = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    valid = tokens < num_tokens
    experts = tl.arange(0, BLOCK_E)
    cols = tl.arange(0, BLOCK_D)
    share = tl.cdiv(tl.cdiv(size, BLOCK_D), SPLITS) * BLOCK_D
    first = split * share
    end = tl.minimum(first + share, size)
    inside = (experts < E)[:, None]
    w_ptrs = w_ptr + experts[:, None] * size + cols[None, :]
    w = tl.load(w_ptrs + first, mask=inside & (first + cols < end)[None, :], other=0.0)
    wait(PDL)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for at in range(first, end, BLOCK_D):
        mask = valid[:, None] & (at + cols < end)[None, :]
        x = tl.load(x_ptr + tokens[:, None] * x_row + (at + cols)[None, :], mask=mask, other=0.0)
        acc = _add_product(acc, x, w)
        following = at + BLOCK_D
        w = tl.load(w_ptrs + following, mask=inside & (following + cols < end)[None, :], other=0.0)
    mask = valid[:, None] & (experts < E)[None, :]
    places = tokens[:, None] * E + experts[None, :]
    plane = tl.cast(num_tokens, tl.int64) * E
    tl.store(parts_ptr + split * plane + places, acc, mask=mask)
    tl.debug_barrier()
    if tl.atomic_add(counts_ptr + block, 1, sem="acq_rel") < SPLITS - 1:
        return
    tl.store(counts_ptr + block, 0)
    logits = tl.zeros_like(acc)
    for part in tl.static_range(SPLITS):
        logits += tl.load(parts_ptr + part * plane + places, mask=mask, other=0.0, cache_modifier=".cg")
    choose(logits, tokens, valid, bias_ptr, weights_ptr, ids_ptr, scaling, CHOICE)


def can_route(num_experts: int, num_groups: int, top_groups: int) -> bool:
    """Whether `route` supports these sizes: the number of groups and their size must be powers of two."""
    limited = top_groups < num_groups
    return not limited or (
        num_experts >= 16 and num_experts & (num_experts - 1) == 0 and num_groups & (num_groups - 1) == 0
    )


def route(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    workspace: Workspace,
    top_k: int,
    scaling: float,
    **asked: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `models/layers/routing.route`: x are float32 logits [T, E] or, with the router's weight float32 [E, hidden],
    hidden states [T, hidden] of at most MAX_ROWS tokens -> weights float32 and expert ids int32, [T, top_k]. asked: the
    rest of a `Choice`.

    With a weight, programs read what others of the launch wrote: not for GPUs whose `Chip.splits` is false.
    """
    tokens = x.shape[0]
    num_experts = x.shape[1] if weight is None else weight.shape[0]
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    compiled = {"CHOICE": Choice.of(num_experts, bias, top_k=top_k, **asked), **launch_options(x.device)}
    given_bias = x if bias is None else bias
    if weight is None:
        _route_kernel[(tokens,)](x, given_bias, weights, ids, scaling, num_warps=1, **compiled)
        return weights, ids
    if tokens > MAX_ROWS:
        raise ValueError(f"a router takes up to {MAX_ROWS} tokens, not {tokens}")
    size = weight.shape[1]
    block_m, block_d = 16, 64
    splits = min(_MOST_SPLITS, triton.cdiv(size, block_d))
    _router_kernel[(triton.cdiv(tokens, block_m), splits)](
        x, weight, given_bias, weights, ids, workspace.parts, workspace.counts, tokens, size, x.stride(0), scaling,
        BLOCK_M=block_m, BLOCK_D=block_d, SPLITS=splits, num_warps=8 if num_experts > 128 else 4, **compiled,
    )  # fmt: skip
    return weights, ids
