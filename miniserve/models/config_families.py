"""What is particular to each family, in terms of `ModelConfig`: biases, norms, windows, latents, experts.

Every function takes transformers' config object and returns fields of `ModelConfig`; `UserError` names what it cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from miniserve.attention.spec import LatentDims
from miniserve.core import UserError
from miniserve.models.description import LinearAttentionConfig, MoEConfig


def _llama(hf: Any) -> dict[str, Any]:
    return {
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "mlp_bias": hf.mlp_bias,
    }


def _mistral(hf: Any) -> dict[str, Any]:
    if getattr(hf, "layer_types", None) is not None:
        raise UserError("layer_types in a Mistral config is not supported; every layer has the same sliding_window.")
    return {"sliding_windows": (hf.sliding_window,) * hf.num_hidden_layers}


def _qwen2(hf: Any) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_windows": _windows_by_layer_type(hf)}


def _qwen3(hf: Any) -> dict[str, Any]:
    return {
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "qk_norm": True,
        "sliding_windows": _windows_by_layer_type(hf),
    }


def _qwen3_moe(hf: Any) -> dict[str, Any]:
    return {
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "qk_norm": True,
        "sliding_windows": (hf.sliding_window,) * hf.num_hidden_layers,
        "moe": _experts(hf),
    }


def _experts(hf: Any) -> MoEConfig | None:
    """Of families whose router has no groups. Every layer is sparse where there are no settings for it."""
    step, dense = getattr(hf, "decoder_sparse_step", 1), getattr(hf, "mlp_only_layers", ())
    if step < 1:
        raise UserError(f"decoder_sparse_step {step} is not supported; it must be 1 or more.")
    layers = range(hf.num_hidden_layers)
    moe = MoEConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        intermediate_size=getattr(hf, "moe_intermediate_size", None) or hf.intermediate_size,
        sparse_layers=tuple(hf.num_experts > 0 and at not in dense and (at + 1) % step == 0 for at in layers),
        normalize=bool(getattr(hf, "norm_topk_prob", True)),
        shared_size=getattr(hf, "shared_expert_intermediate_size", 0),
    )
    return _checked(moe)


def _gpt_oss(hf: Any) -> dict[str, Any]:
    return {
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "sinks": True,
        "sliding_windows": _windows_by_layer_type(hf),
        "moe": _experts(hf),
    }


def _qwen3_5(hf: Any) -> dict[str, Any]:
    for key in ("mrope_section", "mrope_interleaved"):  # of pictures alone
        hf.rope_parameters.pop(key, None)
    if "full_attention" not in hf.layer_types:
        raise UserError("layer_types without full_attention is not supported.")
    return {
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "qk_norm": True,
        "gated": True,
        "sliding_windows": _windows_by_layer_type(hf, "linear_attention"),
        "rotary_factor": hf.rope_parameters.pop("partial_rotary_factor", 1.0),
        "linear": LinearAttentionConfig(
            num_key_heads=hf.linear_num_key_heads,
            num_value_heads=hf.linear_num_value_heads,
            key_head_dim=hf.linear_key_head_dim,
            value_head_dim=hf.linear_value_head_dim,
            conv_kernel=hf.linear_conv_kernel_dim,
            layers=tuple(kind == "linear_attention" for kind in hf.layer_types),
        ),
    }


def _qwen3_5_moe(hf: Any) -> dict[str, Any]:
    return _qwen3_5(hf) | {"moe": _experts(hf)}


def _deepseek_v2(hf: Any) -> dict[str, Any]:
    grouped = hf.topk_method == "group_limited_greedy"
    if not grouped and hf.topk_method != "greedy":
        raise UserError(
            f"topk_method {hf.topk_method!r} is not supported in a DeepSeek-V2 config; supported: greedy, "
            "group_limited_greedy."
        )
    if hf.norm_topk_prob:
        raise UserError("norm_topk_prob in a DeepSeek-V2 config is not supported; no released model has it.")
    _expect(hf, "scoring_func", "softmax")
    moe = MoEConfig(
        **_routed(hf),
        scoring="softmax",
        num_groups=hf.n_group if grouped else 1,
        top_groups=hf.topk_group if grouped else 1,
    )
    return _latent_attention(hf, interleaved=True) | {"mlp_bias": hf.mlp_bias, "moe": _checked(moe)}


def _deepseek_v3(hf: Any) -> dict[str, Any]:
    _expect(hf, "topk_method", "noaux_tc")
    _expect(hf, "scoring_func", "sigmoid")
    moe = MoEConfig(
        **_routed(hf),
        scoring="sigmoid",
        normalize=bool(hf.norm_topk_prob),
        num_groups=hf.n_group,
        top_groups=hf.topk_group,
        correction_bias=True,
    )
    return _latent_attention(hf, interleaved=bool(hf.rope_interleave)) | {
        "moe": _checked(moe),
        "num_draft_layers": getattr(hf, "num_nextn_predict_layers", None) or 0,
    }


def _latent_attention(hf: Any, *, interleaved: bool) -> dict[str, Any]:
    if hf.num_key_value_heads != hf.num_attention_heads:
        raise UserError(
            f"num_key_value_heads {hf.num_key_value_heads} is not supported with latent attention; it must be "
            f"num_attention_heads, {hf.num_attention_heads}."
        )
    return {
        "head_dim": hf.qk_nope_head_dim + hf.qk_rope_head_dim,
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "latent": LatentDims(hf.kv_lora_rank, hf.qk_rope_head_dim, hf.qk_nope_head_dim, hf.v_head_dim),
        "q_lora_rank": hf.q_lora_rank,
        "rope_interleaved": interleaved,
    }


def _routed(hf: Any) -> dict[str, Any]:
    """What both DeepSeek routers share. transformers does not read moe_layer_freq; the models' own code does."""
    every = getattr(hf, "moe_layer_freq", None) or 1
    return {
        "num_experts": hf.n_routed_experts,
        "top_k": hf.num_experts_per_tok,
        "intermediate_size": hf.moe_intermediate_size,
        "sparse_layers": tuple(
            layer >= hf.first_k_dense_replace and layer % every == 0 for layer in range(hf.num_hidden_layers)
        ),
        "scaling": float(hf.routed_scaling_factor),
        "shared_size": hf.moe_intermediate_size * (hf.n_shared_experts or 0),
    }


def _expect(hf: Any, name: str, value: str) -> None:
    """A setting that transformers does not read, which therefore must be what it assumes (or absent)."""
    found = getattr(hf, name, None)
    if found not in (None, value):
        raise UserError(f"{name} {found!r} is not supported in a {hf.model_type} config; supported: {value}.")


def _checked(moe: MoEConfig) -> MoEConfig | None:
    """None where no layer is sparse."""
    if not any(moe.sparse_layers):
        return None
    if moe.num_groups < 1 or moe.num_experts % moe.num_groups:
        raise UserError(f"{moe.num_experts} experts cannot be divided into {moe.num_groups} groups.")
    in_group = moe.num_experts // moe.num_groups
    if not 1 <= moe.top_groups <= moe.num_groups:
        raise UserError(f"topk_group must be from 1 to {moe.num_groups}, the number of groups, not {moe.top_groups}.")
    if not isinstance(moe.top_k, int) or not 1 <= moe.top_k <= in_group * moe.top_groups:
        raise UserError(
            f"num_experts_per_tok must be from 1 to {in_group * moe.top_groups}, the experts it can choose from, not "
            f"{moe.top_k}."
        )
    if moe.correction_bias and in_group < 2:
        raise UserError("n_group with one expert each is not supported: a group is judged by its two best experts.")
    return moe


# By model_type, by which transformers chooses the model: the architecture, None where the engine cannot run it, and
# what is particular to it.
FAMILIES: dict[str, tuple[str | None, Callable[[Any], dict[str, Any]]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _qwen3_moe),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _deepseek_v2),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _deepseek_v3),
    "gpt_oss": (None, _gpt_oss),
    "qwen3_next": (None, _qwen3_5_moe),
    "qwen3_5_text": (None, _qwen3_5),
    "qwen3_5_moe_text": (None, _qwen3_5_moe),
}
# Those that the engine runs, with the model_type that config.json must have.
ARCHITECTURES = {architecture: model_type for model_type, (architecture, _) in FAMILIES.items() if architecture}


def _windows_by_layer_type(hf: Any, *kinds: str) -> tuple[int | None, ...]:
    """transformers has already turned use_sliding_window and max_window_layers into layer_types. kinds: others of the
    family."""
    for layer_type in hf.layer_types:
        if layer_type not in (supported := ("full_attention", "sliding_attention", *kinds)):
            raise UserError(f"layer_types entry {layer_type!r} is not supported; supported: {', '.join(supported)}.")
        if layer_type == "sliding_attention" and hf.sliding_window is None:
            raise UserError("layer_types has sliding_attention layers but sliding_window is not set (or switched off).")
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)
