"""What config.json alone tells of a model, also of one that the engine has no code for: its attention and its size.

`explain` reads it: every layer's `AttentionSpec` and the weights' bytes, on each of several GPUs that share the model.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.core import UserError
from miniserve.models.config import SIZES, weight_quantization
from miniserve.models.config_families import FAMILIES
from miniserve.models.description import yarn_magnitude

Config = dict[str, Any]

# The model types whose config.json is understood here, and those of them that gate attention's output, which makes
# q_proj twice as wide.
_LATENT = ("deepseek_v2", "deepseek_v3")
_GATED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_QK_NORM = ("qwen3", "qwen3_moe", *_GATED)
KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", *_LATENT, "gpt_oss", *_GATED)
_MXFP4_BYTES = 0.5 + 1 / 32  # four bits, and a scale of eight for 32 of them
_FP8_METHODS = ("fp8", "quark", "compressed-tensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """A model by its config.json.

    layers: None for a layer without KV cache. missing: why the engine cannot serve it, a sentence each. fp8_kv: the
    checkpoint states scales for an fp8 KV cache. config: that of the text model.
    """

    architecture: str
    layers: tuple[AttentionSpec | None, ...]
    max_position_embeddings: int
    dtype: torch.dtype
    quantization: str | None
    fp8_kv: bool
    missing: tuple[str, ...]
    config: Config

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """Of the layers that have a KV cache."""
        return tuple(spec for spec in self.layers if spec is not None)


def read_outline(raw: Config, name: str) -> Outline:
    """raw: what config.json holds; name: the model's, for errors. Raises `UserError` for what is not understood."""
    # Null and absent are the same, and false is no window.
    config = {key: value for key, value in (raw.get("text_config") or raw).items() if value is not None}
    model_type = config.get("model_type")
    architecture = str((raw.get("architectures") or [model_type])[0])
    if model_type not in KNOWN_TYPES:
        raise UserError(
            f"{name} is a {architecture} (model_type {model_type!r}), whose config.json is not understood; known: "
            f"{', '.join(KNOWN_TYPES)}."
        )
    for key in (*SIZES, "head_dim"):
        if (size := config.get(key)) is not None and (type(size) is not int or size < 1):
            raise UserError(f"{key} {size!r} in the config.json of {name} is not supported; it must be 1 or more.")
    quantization = raw.get("quantization_config") or config.get("quantization_config") or {}
    method = weight_quantization({"quantization_config": quantization or None})
    missing = [] if architecture in FAMILIES else [f"the engine has no {architecture} model yet"]
    missing += [f"the engine does not load quantised weights ({method}) yet"] if method else []
    try:
        dtype = _dtype(config.get("dtype") or config.get("torch_dtype") or raw.get("dtype") or "bfloat16")
        return Outline(
            architecture=architecture,
            layers=_layers(config, dtype),
            max_position_embeddings=config["max_position_embeddings"],
            dtype=dtype,
            quantization=method,
            fp8_kv=isinstance(quantization, dict) and bool(quantization.get("kv_cache_scheme")),
            missing=tuple(missing),
            config=config,
        )
    except KeyError as error:
        raise UserError(f"The config.json of {name} lacks {error}, which a {architecture} needs.") from None


def shard(spec: AttentionSpec, tp: int) -> AttentionSpec:
    """The layer's part on each of `tp` GPUs: fewer heads; a KV head shared by several of them is on each.

    Raises `UserError` where the heads cannot be divided."""
    if spec.num_heads % tp:
        raise UserError(f"--tp {tp} does not divide the model's {spec.num_heads} heads.")
    if spec.num_kv_heads % tp and tp % spec.num_kv_heads and spec.latent is None:
        raise UserError(f"--tp {tp} and the model's {spec.num_kv_heads} KV heads cannot be divided by one another.")
    return dataclasses.replace(
        spec, num_heads=spec.num_heads // tp, num_kv_heads=max(1, spec.num_kv_heads // tp if spec.latent is None else 1)
    )


def weight_bytes(outline: Outline, tp: int) -> int | None:
    """Bytes of the weights on each of `tp` GPUs that divide every matrix but the routers and the latents' first ones.

    Biases are not counted. None where the way the weights are quantised is not known.
    """
    config, dense = outline.config, outline.dtype.itemsize
    linear, expert = float(dense), float(dense)
    if outline.quantization == "mxfp4":
        expert = _MXFP4_BYTES
    elif outline.quantization in _FP8_METHODS:
        linear = expert = 1.0
    elif outline.quantization is not None:
        return None
    hidden, width = config["hidden_size"], math.ceil(config["vocab_size"] / tp)
    total = hidden * width * (1 if config.get("tie_word_embeddings") else 2) * dense + hidden * dense
    for index, spec in enumerate(outline.layers):
        part = None if spec is None else shard(spec, tp)
        total += _attention_elements(config, part, tp) * linear + 2 * hidden * dense
        if _is_sparse(config, index):
            experts, router, shared = _expert_elements(config, tp)
            total += experts * expert + router * dense + shared * linear
        else:
            total += 3 * hidden * config["intermediate_size"] / tp * linear
    return int(total)


def _layers(config: Config, dtype: torch.dtype) -> tuple[AttentionSpec | None, ...]:
    heads, latent = config["num_attention_heads"], None
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads, scale = config.get("num_key_value_heads") or heads, head_dim**-0.5
    if config["model_type"] in _LATENT:
        latent = LatentDims(
            config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"], config["v_head_dim"]
        )
        kv_heads, head_dim = 1, latent.kv_lora_rank + latent.rope_dim
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        magnitude = yarn_magnitude(rope.get("factor", 1), rope.get("mscale_all_dim"))
        scale = (latent.nope_dim + latent.rope_dim) ** -0.5 * magnitude**2
    spec = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=scale,
        dtype=dtype,
        kv_dtype=dtype,
        sinks=config["model_type"] == "gpt_oss",
        latent=latent,
        qk_norm=config["model_type"] in _QK_NORM,
        rotary_dim=_rotary_dim(config, head_dim),
    )
    kinds = {
        "full_attention": spec,
        "sliding_attention": dataclasses.replace(spec, sliding_window=config.get("sliding_window") or None),
        "linear_attention": None,
    }
    return tuple(kinds[name] for name in _layer_types(config))


def _rotary_dim(config: Config, head_dim: int) -> int | None:
    given = config | (config.get("rope_parameters") or {})
    factor = given.get("partial_rotary_factor") or (0.25 if config["model_type"] in _GATED else 1.0)
    return None if factor == 1.0 else int(head_dim * factor)


def _layer_types(config: Config) -> list[str]:
    count, model_type = config["num_hidden_layers"], config["model_type"]
    if config.get("layer_types"):
        return list(config["layer_types"])
    if model_type in _GATED:
        every = config.get("full_attention_interval", 4)
        return ["linear_attention" if (index + 1) % every else "full_attention" for index in range(count)]
    if model_type == "gpt_oss":
        return ["full_attention" if index % 2 else "sliding_attention" for index in range(count)]
    # As each architecture has it: Mistral's on every layer, Qwen's where they are switched on, no others.
    has_windows = model_type == "mistral" or (model_type.startswith("qwen") and config.get("use_sliding_window"))
    windowed = 0 if has_windows and config.get("sliding_window") else count
    if model_type in ("qwen2", "qwen3"):
        windowed = max(windowed, config.get("max_window_layers", 28))
    return ["sliding_attention" if index >= windowed else "full_attention" for index in range(count)]


def _attention_elements(config: Config, spec: AttentionSpec | None, tp: int) -> int:
    """Of one layer's attention on one GPU; spec: its part there, None for linear attention."""
    hidden: int = config["hidden_size"]
    if spec is None:
        key = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        value = config["linear_num_value_heads"] * config["linear_value_head_dim"]
        convolution = config.get("linear_conv_kernel_dim", 4) * (2 * key + value)
        projections = hidden * (2 * key + 3 * value + 2 * config["linear_num_value_heads"])
        return int(projections + convolution) // tp
    if (latent := spec.latent) is not None:
        q_size = spec.num_heads * (latent.nope_dim + latent.rope_dim)
        rank: int | None = config.get("q_lora_rank")
        queries = hidden * q_size if rank is None else rank * (hidden + q_size)
        up = latent.kv_lora_rank * spec.num_heads * (latent.nope_dim + latent.v_head_dim)
        return queries + hidden * spec.head_dim + up + hidden * spec.num_heads * latent.v_head_dim
    q_heads = spec.num_heads * (2 if config["model_type"] in _GATED else 1)
    return hidden * spec.head_dim * (q_heads + 2 * spec.num_kv_heads + spec.num_heads)


def _is_sparse(config: Config, index: int) -> bool:
    if not _num_experts(config) or index in (config.get("mlp_only_layers") or ()):
        return False
    if config["model_type"] in _LATENT:
        return bool(index >= config["first_k_dense_replace"] and index % (config.get("moe_layer_freq") or 1) == 0)
    return bool((index + 1) % (config.get("decoder_sparse_step") or 1) == 0)


def _expert_elements(config: Config, tp: int) -> tuple[int, int, int]:
    """Of one layer on one GPU: the routed experts, the router, the MLP that every token passes."""
    hidden, count = config["hidden_size"], _num_experts(config)
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared = config.get("shared_expert_intermediate_size") or (config.get("n_shared_experts") or 0) * width
    return int(count * 3 * hidden * width // tp), int(count * hidden), int(3 * hidden * shared // tp)


def expert_shape(outline: Outline) -> tuple[int, int] | None:
    """hidden_size and intermediate_size of a routed expert, None where there are none."""
    config = outline.config
    if not _num_experts(config):
        return None
    return config["hidden_size"], config.get("moe_intermediate_size") or config["intermediate_size"]


def _num_experts(config: Config) -> int:
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"dtype {name!r} in config.json is not known.")
    return dtype
