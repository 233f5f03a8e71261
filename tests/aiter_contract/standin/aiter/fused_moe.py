"""aiter.fused_moe: the experts' two matrix products."""

from __future__ import annotations

from enum import Enum

import torch

from aiter import _checks, _standin
from aiter._standin import record, require
from aiter.ops.enum import ActivationType, QuantType
from aiter.ops.shuffle import unshuffled


class GateMode(Enum):
    SEPARATED = "separated"


def fused_moe(
    hidden_states,
    w1,
    w2,
    topk_weight,
    topk_ids,
    expert_mask=None,
    activation=ActivationType.Silu,
    quant_type=QuantType.No,
    doweight_stage1=False,
    w1_scale=None,
    w2_scale=None,
    a1_scale=None,
    a2_scale=None,
    block_size_M=None,
    num_local_tokens=None,
    moe_sorting_dispatch_policy=0,
    dtype=None,
    hidden_pad=0,
    intermediate_pad=0,
    bias1=None,
    bias2=None,
    splitk=0,
    swiglu_limit=None,
    beta=None,
    linear_beta=None,
    gate_mode=GateMode.SEPARATED.value,
    shared_w1=None,
    shared_w2=None,
    shared_w1_scale=None,
    shared_w2_scale=None,
    shared_expert_id=-1,
):
    """hidden_states [T, D], w1 [E, 2I, D] (gate first), w2 [E, D, I] -> [T, D]. Weights that lost `is_shuffled` or
    never were shuffled are a violation. Quantised: fp8 with scales per 128 x 128 block (per_1x128, per_128x128) or row
    (per_Token); what is multiplied is rounded likewise, by groups of 128 of a token or all of it. Expert parallel:
    expert_mask [E_global] marks this rank's experts.
    """
    record("fused_moe", QuantType(quant_type).name)
    experts, dim, inter = w2.shape
    assert w1.shape[1] in (inter, inter * 2), f"Invalid MoE weight: {w1.shape=} {w2.shape=}"
    result_dtype = hidden_states.dtype if dtype is None else dtype
    assert result_dtype in (torch.float16, torch.bfloat16), f"Fused_moe unsupported out dtype: {result_dtype}"
    for name, w in (("w1", w1), ("w2", w2)):
        require(getattr(w, "is_shuffled", False), f"fused_moe: {name} was not through shuffle_weight, or lost its mark")
    require(w1.shape == (experts, inter * 2, dim) and hidden_states.shape[1] == dim, f"w1 {tuple(w1.shape)}")
    require(activation == ActivationType.Silu and not doweight_stage1, "the stand-in covers SiLU, weights at the end")
    extras = (num_local_tokens, bias1, bias2, swiglu_limit, shared_w1, shared_w2, a1_scale, a2_scale)
    require(all(extra is None for extra in extras), "the stand-in covers none of the optional inputs")
    tokens, topk = topk_ids.shape
    _checks.tensor("topk_weight", topk_weight, torch.float32, (tokens, topk))
    _checks.tensor("topk_ids", topk_ids, torch.int32)
    _checks.tensor("hidden_states", hidden_states, hidden_states.dtype, (tokens, dim))
    ids = topk_ids.long()
    if expert_mask is not None:
        _checks.tensor("expert_mask", expert_mask, torch.int32)
        local = torch.where(expert_mask > 0, expert_mask.cumsum(0) - 1, -1)
        require(int(expert_mask.sum()) == experts, "expert_mask marks another number of experts than w1 holds")
        ids = local[ids]
    require(
        not ids.numel() or -(expert_mask is not None) <= int(ids.min()) <= int(ids.max()) < experts, "an unknown expert"
    )
    first, second = (_dequantised(w, s, quant_type, hidden_states.dtype) for w, s in ((w1, w1_scale), (w2, w2_scale)))
    x, out = _rounded(hidden_states.float(), quant_type), torch.zeros(tokens, dim)
    for expert in ids[ids >= 0].unique().tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (x[row] @ first(expert).T).chunk(2, -1)
        down = _rounded(torch.nn.functional.silu(gate) * up, quant_type) @ second(expert).T
        out.index_add_(0, row, down * topk_weight[row, slot, None])
    return out.to(result_dtype)


def _rounded(x, quant_type):
    """float32 [T, K] to the device's fp8 and back."""
    if quant_type == QuantType.No:
        return x
    dtype = _standin.device.fp8
    size = x.shape[1] if quant_type == QuantType.per_Token else 128
    groups = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / torch.finfo(dtype).max
    return ((groups / scale).to(dtype).float() * scale).flatten(1)[:, : x.shape[1]]


def _dequantised(weight, scale, quant_type, dtype):
    """A function from an expert's number to its weight in float32."""
    plain = unshuffled(weight)
    if quant_type == QuantType.No:
        require(weight.dtype == dtype and scale is None, f"QuantType.No reads the weights as {dtype}")
        return lambda expert: plain[expert].float()
    blocks = quant_type in (QuantType.per_1x128, QuantType.per_128x128)
    require(blocks or quant_type == QuantType.per_Token, f"the stand-in covers no {quant_type!r}")
    require(weight.dtype == _standin.device.fp8, f"fp8 on {_standin.device.arch}, not {weight.dtype}")
    experts, rows, columns = weight.shape
    shape = (experts, -(-rows // 128), -(-columns // 128)) if blocks else (experts, rows, 1)
    _checks.tensor("weight scale", scale, torch.float32, shape)

    def read(expert: int) -> torch.Tensor:
        own = scale[expert]
        if blocks:
            own = own.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        return plain[expert].float() * own

    return read
