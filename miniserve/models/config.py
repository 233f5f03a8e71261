"""What a model is, read from its config.json: a frozen description in one vocabulary for every architecture.

No torch at import time; `load_model_config` imports transformers when it is called.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from miniserve.core import UserError

# The model_type that each architecture's config.json must have: transformers chooses the model by it.
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
SUPPORTED_ARCHITECTURES = tuple(MODEL_TYPES)
SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")
# transformers knows SiLU by two names.
SUPPORTED_ACTIVATIONS = ("silu", "swish")

_FLOAT_TAGS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# What each rope type reads beside rope_theta. Any other key that is set would change the result and is refused.
ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", *_YARN_KEYS),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# `finetuned` is a note that some YaRN checkpoints carry; nothing reads it.
_ROPE_NOTES = ("rope_type", "type", "rope_theta", "finetuned")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over the whole head. Lengths in tokens; fields that a type does not read stay None.

    dynamic: transformers derives the frequencies from the longest sequence of the call, which has no meaning where
    sequences of different lengths share a step. Up to the model's max_position_embeddings they are the plain ones; that
    is what is built, and longer contexts are refused.
    """

    rope_type: str = "default"
    theta: float = 10000.0
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A dense decoder. Sizes in elements, lengths in tokens.

    max_position_embeddings: the longest context the model may be served with, rope scaling included.
    sliding_windows: one entry per layer, None where the layer sees everything.
    dtype: the one the weights are stored in: bfloat16, float16 or float32.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...]
    dtype: str = "float32"


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `path`/config.json through transformers. Raises `UserError` naming the setting that is not supported."""
    raw = _read_json(Path(path) / "config.json")
    architecture = _architecture(raw, Path(path))
    from transformers import AutoConfig

    with _config_errors(Path(path)):
        _refuse_unreadable(raw)
        hf = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        return _from_transformers(hf, architecture, _stored_dtype(hf, Path(path)))


def _refuse_unreadable(raw: dict[str, Any]) -> None:
    """What transformers, depending on its version, would fail at or act upon before it can be looked at."""
    if raw.get("quantization_config") is not None:
        method = raw["quantization_config"].get("quant_method", "unknown")
        raise UserError(
            f"Quantised weights (quantization_config, method {method!r}) are not supported; choose the unquantised "
            f"checkpoint of this model, stored as {_listed(SUPPORTED_DTYPES)}."
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError("rope_parameters that differ between layer types are not supported; one set for all layers is.")


def _from_transformers(hf: Any, architecture: str, dtype: str) -> ModelConfig:
    if hf.hidden_act not in SUPPORTED_ACTIVATIONS:
        raise UserError(f"hidden_act {hf.hidden_act!r} is not supported; supported: {_listed(SUPPORTED_ACTIVATIONS)}.")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    if head_dim % 2:
        raise UserError(f"head_dim {head_dim} is odd, and rotary position embedding needs an even one.")
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise UserError(
            f"num_attention_heads {hf.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{hf.num_key_value_heads}."
        )
    particulars = _PARTICULARS[architecture](hf)
    if any(window is not None and window < 1 for window in particulars["sliding_windows"]):
        raise UserError(f"sliding_window {hf.sliding_window} is not supported; it must be 1 or more, or null for none.")
    rope = _rope(hf.rope_parameters, hf.max_position_embeddings)
    return ModelConfig(
        architecture=architecture,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        max_position_embeddings=_longest_context(rope, hf.max_position_embeddings),
        rms_norm_eps=hf.rms_norm_eps,
        rope=rope,
        tie_word_embeddings=hf.tie_word_embeddings,
        dtype=dtype,
        **particulars,
    )


# --- what is particular to each architecture: biases, norms of q and k, windows --------------------------------------


def _llama(hf: Any) -> dict[str, Any]:
    return {
        "qkv_bias": hf.attention_bias,
        "o_bias": hf.attention_bias,
        "mlp_bias": hf.mlp_bias,
        "sliding_windows": (None,) * hf.num_hidden_layers,
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


_PARTICULARS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
}


def _windows_by_layer_type(hf: Any) -> tuple[int | None, ...]:
    """transformers has already turned use_sliding_window and max_window_layers into layer_types."""
    for layer_type in hf.layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"layer_types entry {layer_type!r} is not supported; supported: full_attention, sliding_attention."
            )
        if layer_type == "sliding_attention" and hf.sliding_window is None:
            raise UserError("layer_types has sliding_attention layers but sliding_window is not set (or switched off).")
    return tuple(hf.sliding_window if kind == "sliding_attention" else None for kind in hf.layer_types)


# --- rope ------------------------------------------------------------------------------------------------------------


def _rope(parameters: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    given = {key: value for key, value in parameters.items() if value is not None}
    rope_type = given.get("rope_type", "default")
    if rope_type not in ROPE_KEYS:
        raise UserError(f"rope type {rope_type!r} is not supported; supported: {_listed(ROPE_KEYS)}.")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial_rotary_factor below 1 is not supported; rope over the whole head is.")
    for key in given:
        if key not in _ROPE_NOTES and key not in ROPE_KEYS[rope_type]:
            known = _listed(ROPE_KEYS[rope_type]) or "nothing else"
            raise UserError(f"rope type {rope_type!r} with {key!r} is not supported; it takes rope_theta and {known}.")
    if rope_type == "yarn" and "factor" not in given and "original_max_position_embeddings" in given:
        given["factor"] = max_position_embeddings / given["original_max_position_embeddings"]
    _check_rope_values(rope_type, given)
    return RopeConfig(
        rope_type=rope_type,
        theta=float(given.get("rope_theta", 10000.0)),
        **{key: given[key] for key in ROPE_KEYS[rope_type] if key in given},
    )


def _check_rope_values(rope_type: str, given: dict[str, Any]) -> None:
    for key in ROPE_KEYS[rope_type]:
        if key not in given and key not in _YARN_KEYS:
            raise UserError(f"rope type {rope_type!r} needs {key!r} in its parameters, and the config has none.")
    for key, value in given.items():
        if key in ROPE_KEYS[rope_type] and key != "truncate" and not (isinstance(value, int | float) and value > 0):
            raise UserError(f"{key} of rope type {rope_type!r} must be a positive number, not {value!r}.")
    if rope_type == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise UserError("high_freq_factor of rope type 'llama3' must be above its low_freq_factor.")


def _longest_context(rope: RopeConfig, max_position_embeddings: int) -> int:
    """Linear and YaRN stretch the trained length by `factor`; llama3 configs already state the stretched one."""
    if rope.rope_type == "linear" and rope.factor is not None:
        return int(max_position_embeddings * rope.factor)
    if rope.rope_type == "yarn" and rope.factor is not None and rope.original_max_position_embeddings is not None:
        return int(rope.original_max_position_embeddings * rope.factor)
    return max_position_embeddings


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no config.json; give the directory of a Hugging Face model.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object.")
    return content


def _architecture(raw: dict[str, Any], path: Path) -> str:
    names = raw.get("architectures") or []
    known = [name for name in names if name in MODEL_TYPES]
    if not known:
        found = _listed(names) or f"none named in {path / 'config.json'}"
        raise UserError(f"Architecture not supported ({found}); supported: {_listed(SUPPORTED_ARCHITECTURES)}.")
    if raw.get("model_type") != MODEL_TYPES[known[0]]:
        raise UserError(
            f"config.json names {known[0]} with model_type {raw.get('model_type')!r}, which do not belong together; "
            f"model_type must be {MODEL_TYPES[known[0]]!r}."
        )
    return str(known[0])


def _stored_dtype(hf: Any, path: Path) -> str:
    """The dtype that config.json states, else that of the checkpoint's first floating tensor, else float32."""
    if hf.dtype is not None:
        name = str(hf.dtype).removeprefix("torch.")
        if name not in SUPPORTED_DTYPES:
            raise UserError(f"dtype {name} in config.json is not supported; supported: {_listed(SUPPORTED_DTYPES)}.")
        return name
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        tags = [entry["dtype"] for name, entry in header.items() if name != "__metadata__"]
        if dtype := next((_FLOAT_TAGS[tag] for tag in tags if tag in _FLOAT_TAGS), None):
            return dtype
    return "float32"


@contextlib.contextmanager
def _config_errors(path: Path) -> Iterator[None]:
    """transformers refuses a bad config.json with many kinds of exception; each becomes one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path / 'config.json'} cannot be used: {type(error).__name__}: {reason}") from error


def _listed(names: Any) -> str:
    return ", ".join(str(name) for name in names)
