"""The choice of experts on a GPU, and the router's product for tens and hundreds of tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.launch import cdiv, next_power_of_2
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import quick

_LEAST_TOKENS, _MOST_SMALL = 17, 256  # of `logit_parts`; the most for tiles of 16 tokens
_MOST_SPLITS, _PROGRAMS = 16, 256


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
        return Choice(num_experts, max(16, next_power_of_2(num_experts)), bias is not None, **asked)


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


@quick
@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    parts_ptr, bias_ptr, weights_ptr, ids_ptr, num_tokens, scaling,
    SPLITS: tl.constexpr, CHOICE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one token."""
    E: tl.constexpr = CHOICE.num_experts
    start(PDL)
    wait(PDL)
    tokens = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    experts = tl.arange(0, CHOICE.block)[None, :]
    at = tokens[:, None] * E + experts
    plane = tl.cast(num_tokens, tl.int64) * E
    logits = tl.zeros(experts.shape, tl.float32)
    for part in tl.static_range(SPLITS):
        logits += tl.load(parts_ptr + part * plane + at, mask=experts < E, other=0.0).to(tl.float32)
    choose(logits, tokens, tokens >= 0, bias_ptr, weights_ptr, ids_ptr, scaling, CHOICE)


@triton.jit
def _add_product(acc, x, w):
    """acc + x wᵀ as in float32, x [tokens, k], w float32 [experts, k]. For bfloat16 x the weight is split into three
    bfloat16 parts, whose sum is the weight: the matrix units multiply them exactly. They sum in float32, but cut off
    what does not fit instead of rounding: over 7,168 columns that adds up to 1e-4, so they sum a tile's alone."""
    if x.dtype == tl.bfloat16:
        high = w.to(tl.bfloat16)
        rest = w - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        tile = tl.dot(x, tl.trans(low))
        tile = tl.dot(x, tl.trans(middle), tile)
        return acc + tl.dot(x, tl.trans(high), tile)
    return tl.dot(x.to(tl.float32), tl.trans(w), acc, input_precision="ieee")


@quick
@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x_ptr, w_ptr, parts_ptr, num_tokens, size, x_row,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M tokens, BLOCK_E of E experts and one part of the hidden size."""
    start(PDL)
    tokens = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    valid = tokens < num_tokens
    cols = tl.arange(0, BLOCK_D)
    share = tl.cdiv(tl.cdiv(size, BLOCK_D), tl.num_programs(2)) * BLOCK_D
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
    places = (split * num_tokens + tokens[:, None]) * E + experts[None, :]
    tl.store(parts_ptr + places, acc, mask=valid[:, None] & (experts < E)[None, :])


def can_route(num_experts: int, num_groups: int, top_groups: int) -> bool:
    """Whether `route` supports these sizes: the number of groups and their size must be powers of two."""
    limited = top_groups < num_groups
    return not limited or (
        num_experts >= 16 and num_experts & (num_experts - 1) == 0 and num_groups & (num_groups - 1) == 0
    )


def has_parts(x: torch.Tensor) -> bool:
    """Whether `logit_parts` is the fastest product: for fewer tokens a small linear is, for many in float32 or float16,
    which the matrix units do not multiply exactly, the vendor's library."""
    return len(x) >= _LEAST_TOKENS and (len(x) <= _MOST_SMALL or x.dtype == torch.bfloat16)


def logit_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A router's logits for hidden states x [T, hidden], of its weight float32 [E, hidden], in parts to be summed:
    float32 [parts, T, E]."""
    (tokens, size), num_experts = x.shape, weight.shape[0]
    block_m = 16 if tokens <= _MOST_SMALL else 64
    block_e, block_d = max(16, min(64, next_power_of_2(num_experts))), 64
    blocks = cdiv(tokens, block_m), cdiv(num_experts, block_e)
    splits = min(_MOST_SPLITS, cdiv(size, block_d), max(1, _PROGRAMS // (blocks[0] * blocks[1])))
    parts = torch.empty(splits, tokens, num_experts, dtype=torch.float32, device=x.device)
    _logits_kernel[(*blocks, splits)](
        x, weight, parts, tokens, size, x.stride(0),
        E=num_experts, BLOCK_E=block_e, BLOCK_M=block_m, BLOCK_D=block_d, **launch_options(x.device),
    )  # fmt: skip
    return parts


def route(
    parts: torch.Tensor, bias: torch.Tensor | None, *, top_k: int, scaling: float, **asked: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `models/layers/routing.route`: the sum of parts float32 [parts, T, E] are the logits -> weights float32 and
    expert ids int32, [T, top_k]. asked: the rest of a `Choice`."""
    splits, tokens, num_experts = parts.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=parts.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=parts.device)
    _route_kernel[(tokens,)](
        parts, parts if bias is None else bias, weights, ids, tokens, scaling,
        SPLITS=splits, CHOICE=Choice.of(num_experts, bias, top_k=top_k, **asked), num_warps=1,
        **launch_options(parts.device),
    )  # fmt: skip
    return weights, ids
