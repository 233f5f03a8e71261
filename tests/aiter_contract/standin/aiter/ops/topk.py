"""aiter.ops.topk and the routing part of aiter.ops.moe_op. Results go into the given tensors."""

from __future__ import annotations

import torch
from aiter import _checks
from aiter._standin import check, record, require


def _emit(weights, ids, scores, choice, need_renorm, factor) -> None:
    tokens, topk = ids.shape
    _checks.tensor("topk_weights", weights, torch.float32, (tokens, topk))
    _checks.tensor("topk_ids", ids, torch.int32, (tokens, topk))
    require(tokens == scores.shape[0] and topk <= scores.shape[1], f"top {topk} of {scores.shape[1]} experts")
    chosen = choice.topk(topk, dim=-1).indices
    found = scores.gather(1, chosen)
    if need_renorm:
        found = found / found.sum(-1, keepdim=True)
    weights.copy_(found * factor)
    ids.copy_(chosen)


def _grouped(choice: torch.Tensor, num_group: int, topk_group: int, members: int) -> torch.Tensor:
    """choice with all but the topk_group best groups at -inf; a group scores the sum of its `members` best experts."""
    check(num_group in (1, 2, 4, 8), f"Unsupported num_expert_group: {num_group}")
    check(1 <= topk_group <= num_group, f"topk_grp must be in [1, num_expert_group], but got topk_grp={topk_group}")
    require(choice.shape[1] % num_group == 0, f"{choice.shape[1]} experts in {num_group} groups")
    groups = choice.unflatten(1, (num_group, -1))
    best = groups.topk(min(members, groups.shape[2]), dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
    kept = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter_(1, best, True)
    return groups.masked_fill(~kept[..., None], float("-inf")).flatten(1)


def topk_softmax(
    topk_weights, topk_indices, token_expert_indices, gating_output, need_renorm, num_shared_experts=0,
    shared_expert_scoring_func="",
):  # fmt: skip
    record("topk_softmax")
    require(num_shared_experts == 0, "the stand-in covers no fused shared experts")
    _checks.tensor("token_expert_indices", token_expert_indices, torch.int32, tuple(topk_indices.shape))
    require(gating_output.stride(1) == 1, "gating_output must be of dense rows")
    scores = gating_output.float().softmax(-1)
    _emit(topk_weights, topk_indices, scores, scores, need_renorm, 1.0)


def grouped_topk(
    gating_output, topk_weights, topk_ids, num_expert_group, topk_group, need_renorm, is_softmax=True,
    routed_scaling_factor=1.0,
):  # fmt: skip
    record("grouped_topk")
    check(gating_output.stride(1) == 1, "gating_output last dimension must be contiguous")
    scores = gating_output.float().softmax(-1) if is_softmax else gating_output.float().sigmoid()
    choice = _grouped(scores, num_expert_group, topk_group, members=1)
    _emit(topk_weights, topk_ids, scores, choice, need_renorm, routed_scaling_factor)


def biased_grouped_topk(
    gating_output, correction_bias, topk_weights, topk_ids, num_expert_group, topk_group, need_renorm,
    routed_scaling_factor=1.0,
):  # fmt: skip
    """Sigmoid scores; the bias only chooses. The kernel reads the bias in gating_output's dtype: another one is a
    violation."""
    record("biased_grouped_topk")
    check(gating_output.stride(1) == 1, "gating_output last dimension must be contiguous")
    _checks.tensor("correction_bias", correction_bias, gating_output.dtype, (gating_output.shape[1],))
    scores = gating_output.float().sigmoid()
    choice = _grouped(scores + correction_bias.float(), num_expert_group, topk_group, members=2)
    _emit(topk_weights, topk_ids, scores, choice, need_renorm, routed_scaling_factor)
