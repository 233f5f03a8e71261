"""Filter and draw: one token per row from logits whose bias and penalties have been applied.

The filters follow each other as in vLLM: temperature, min_p, top_k, top_p. Tokens are ordered by probability. min_p
keeps those at least min_p times as likely as the most likely one. top_k keeps exactly k, the lowest ids among equals.
top_p keeps the most likely ones until their share of what the other two filters left reaches top_p; tokens as likely
as the last one kept are kept too. A row takes the same way through this file whatever the other rows of its batch ask
for.

This is the way of a CPU; `kernels.triton.sampling` draws on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from miniserve.runner import sampling_blocks
from miniserve.runner.sampling_random import NUMBERS_PER_POSITION, uniform

_LOG2_E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class DrawParams:
    """The parameters of `num_rows` rows that are drawn alike; every tensor but `keys` is [num_rows, 1].

    max_top_k is the largest of `top_k`, 0 where none of these rows has a top_k; then all rows take `draw_any`. The
    flags tell without a look at the device whether a filter is used by any of the rows.
    """

    keys: torch.Tensor  # int64 [num_rows], see sampling_random
    temperature: torch.Tensor  # float32, above 0
    top_k: torch.Tensor  # int64
    top_p: torch.Tensor  # float64
    min_p: torch.Tensor  # float32
    max_top_k: int
    any_top_p: bool
    any_min_p: bool


def draw(logits: torch.Tensor, positions: torch.Tensor, params: DrawParams) -> torch.Tensor:
    """Token ids, int64 [num_rows]. logits: float32 [num_rows, vocab_size], overwritten; positions: int64 [num_rows],
    the number of output tokens each row has so far."""
    if params.max_top_k:
        return draw_top_k(logits, positions, params)
    return draw_any(logits, positions, params)


def draw_top_k(logits: torch.Tensor, positions: torch.Tensor, params: DrawParams) -> torch.Tensor:
    """For rows that have a top_k: everything happens on the max_top_k best tokens, sorted."""
    values, ids = sampling_blocks.largest(logits, params.max_top_k)
    weights = ((values - values[:, :1]) / params.temperature).double().exp_()  # the best token weighs 1
    place = torch.arange(params.max_top_k, device=logits.device)
    kept = place < params.top_k
    if params.any_min_p:
        kept &= weights >= params.min_p
    weights *= kept
    if params.any_top_p:
        mass = weights.cumsum(-1)
        ahead = mass - weights
        ahead[:, 1:].masked_fill_(values[:, 1:] == values[:, :-1], 0.0)
        ahead = ahead.cummax(-1).values  # equal tokens have the same tokens ahead of them
        weights *= (ahead < params.top_p * mass[:, -1:]) | (params.top_p >= 1.0)
    ids, order = ids.sort(-1)
    weights = weights.gather(1, order)
    place = _invert(weights.cumsum(-1), uniform(params.keys, positions))
    return ids.gather(1, place[:, None]).squeeze(1)


def draw_any(logits: torch.Tensor, positions: torch.Tensor, params: DrawParams) -> torch.Tensor:
    """For rows without a top_k: inverse CDF over the whole vocabulary, in the order of the ids, without a sort."""
    # exp2 takes half the time of torch's softmax. It works on padded rows: an entry's vector lane is always the same.
    weights = sampling_blocks.blocked(logits, float("-inf")).flatten(1)
    weights.sub_(weights.amax(-1, keepdim=True)).mul_(_LOG2_E / params.temperature).exp2_()
    if params.any_min_p:
        weights = torch.ge(weights, params.min_p, out=torch.empty_like(weights)).mul_(weights)
    blocks = weights.view(len(weights), -1, sampling_blocks.BLOCK)
    mass = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    ids = _locate(blocks, mass, uniform(params.keys, positions))
    if params.any_top_p:
        ids = _redraw(ids, blocks, mass, positions, params)
    return ids.clamp_(max=logits.shape[1] - 1)  # only a row of NaNs could point at the padding


def _redraw(
    ids: torch.Tensor, blocks: torch.Tensor, mass: torch.Tensor, positions: torch.Tensor, params: DrawParams
) -> torch.Tensor:
    """Replace draws that top_p forbids by further draws, until all are allowed: on a CPU a sort of a vocabulary takes
    fifty times as long as a draw, and reading what was rejected costs nothing.

    Rejection sampling as in FlashInfer's sorting-free kernels (Ye et al., 2025): a token is in the nucleus if and only
    if the tokens more likely than it weigh less than top_p of the total. A draw outside shows that all tokens up to
    its weight are outside, so the next one is made among the heavier ones. What is drawn in the end is distributed
    as if the nucleus had been cut out first. The expected number of draws is below 1 / top_p and about logarithmic in
    the vocabulary at worst; the last one that a position has numbers for takes the most likely token.
    """
    limit = torch.where(params.top_p < 1.0, params.top_p * mass[:, -1:], torch.inf).squeeze(1)
    keys, result, left, drawn = params.keys, ids.clone(), torch.arange(len(ids), device=ids.device), ids
    for number in range(1, NUMBERS_PER_POSITION + 1):
        weight = blocks.flatten(1).gather(1, drawn[:, None])[:, :, None]
        blocks = torch.gt(blocks, weight, out=torch.empty_like(blocks)).mul_(blocks)  # floats: no detour by bools
        mass = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
        rejected = (mass[:, -1] >= limit).nonzero().squeeze(1)
        if not len(rejected):
            break
        left, blocks, mass, limit = left[rejected], blocks[rejected], mass[rejected], limit[rejected]
        keys, positions = keys[rejected], positions[rejected]
        if number < NUMBERS_PER_POSITION:
            drawn = _locate(blocks, mass, uniform(keys, positions, number))
        else:
            drawn = sampling_blocks.argmax(blocks.flatten(1))
        result[left] = drawn
    return result


def _locate(blocks: torch.Tensor, mass: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Inverse CDF in two levels: the block, then the token in it. mass: float64, running sum of the blocks' weights."""
    block = _invert(mass, numbers)
    inside = sampling_blocks.take(blocks, block).cumsum(-1, dtype=torch.float64)
    start = torch.where(block > 0, mass.gather(1, (block - 1).clamp_(min=0)[:, None]).squeeze(1), 0.0)
    target = (numbers * mass[:, -1] - start).clamp_(min=0.0)
    return block * sampling_blocks.BLOCK + _first_above(inside, target)


def _invert(mass: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    return _first_above(mass, numbers * mass[:, -1])


def _first_above(mass: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The first index whose running sum exceeds the target: never one of weight 0, at which the sum does not grow."""
    total = mass[:, -1]
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))  # rounding may have reached it
    index = torch.searchsorted(mass, target[:, None], right=True).squeeze(1)
    return index.clamp_(max=mass.shape[1] - 1)
