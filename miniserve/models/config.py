"""What a model is, read from its config.json.

No torch at import time; `load_model_config` imports transformers when it is called.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from miniserve.core import UserError
from miniserve.models.checkpoint import (
    EMBEDDING,
    HEAD,
    describe_weights,
    differ,
    find_tensors,
    find_weights,
    read_json,
)
from miniserve.models.config_families import ARCHITECTURES, FAMILIES
from miniserve.models.config_rope import listed, longest_context, read_rope
from miniserve.models.description import ModelConfig
from miniserve.models.quantization import read_quantization

SUPPORTED_DTYPES = ("bfloat16", "float16", "float32")
# transformers knows SiLU by two names.
SUPPORTED_ACTIVATIONS = ("silu", "swish")

_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "head_dim",
)  # fmt: skip
_LARGEST = 2**24  # above every model's, below what tables of that size would take of memory
# What stands beside the text model's settings.
_OF_THE_WHOLE = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
# Nulls that mean something in rope settings: the ratio of two lengths, and false.
_MEANT_NULL = ("factor", "truncate")
_FLOAT_TAGS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def load_model_config(path: str | Path, *, weights: bool = True) -> ModelConfig:
    """Read `path`/config.json through transformers. Raises `UserError` naming the setting that is not supported.

    weights: the weight files, if there are any, are to be loaded, so what they say counts too: a head that differs from
    the embedding is not tied to it, whatever config.json says.
    """
    path = Path(path)
    check_config(read_json(path / "config.json"), str(path))
    config = describe_model(path, str(path))
    return _as_stored(config, path) if weights else config


def describe_model(path: Path, name: str) -> ModelConfig:
    """As `load_model_config`, also of a model that the engine cannot run: `ModelConfig.missing` says why. Weight files
    need not be there. name: the model's, for errors."""
    raw = read_json(path / "config.json")
    text = _text_model(raw)
    model_type, architecture = str(text.get("model_type") or ""), _architecture(raw)
    if model_type not in FAMILIES:
        raise UserError(
            f"{name} is a {architecture} (model_type {model_type!r}), whose config.json is not understood; known: "
            f"{listed(FAMILIES)}."
        )
    quantization = read_quantization(text)
    text.pop("quantization_config", None)
    missing = [] if architecture in ARCHITECTURES else [f"the engine has no {architecture} model yet"]
    if quantization is not None and quantization.unknown is not None:
        missing.append(f"the engine does not load quantised weights ({quantization.unknown}) yet")
    from transformers import CONFIG_MAPPING

    with _config_errors(path):
        _refuse_unreadable(text)
        hf_class = CONFIG_MAPPING[model_type]
        hf = hf_class.from_dict(as_meant(text, hf_class))
        hf.standardize_rope_params()  # once more, as the model does: by now hf has what stands beside rope_scaling
        config = _from_transformers(hf, architecture, _stored_dtype(hf, path))
    return dataclasses.replace(config, missing=tuple(missing), quantization=quantization)


def check_config(config: dict[str, Any], name: str) -> None:
    """Raise `UserError` where config.json alone tells that miniserve cannot serve the model called `name`: its
    architecture is another, or its weights are quantised in a way that is not known. (`load_model_config` looks at the
    rest.)"""
    names = _architectures(config)
    if not any(entry in ARCHITECTURES for entry in names):
        raise UserError(
            f"{name} is a {listed(names) or 'model that names no architecture'}, which miniserve does not support: "
            f"choose a model of one of {listed(ARCHITECTURES)}."
        )
    quantization = read_quantization(config)
    if quantization is not None and quantization.unknown is not None:
        raise UserError(
            f"{name} has quantised weights ({quantization.unknown}), which miniserve does not support: "
            "choose the model's FP8 or its unquantised repository."
        )


def _refuse_unreadable(raw: dict[str, Any]) -> None:
    """What transformers, depending on its version, would fail at or act upon before it can be looked at."""
    for name in _SIZES:
        size = raw.get(name)
        if isinstance(size, int | float) and size is not False and not 1 <= size <= _LARGEST:
            raise UserError(f"{name} {size} is not supported; it must be from 1 to {_LARGEST}.")
    for key in ("rope_parameters", "rope_scaling"):
        rope = raw.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{key} {rope!r} is not supported; it must be an object, or null for none.")
        if any(isinstance(value, dict) for value in rope.values()):
            raise UserError(f"{key} that differ between layer types are not supported; one set for all layers is.")
    for key in ("per_layer_config", "transformers_weights"):
        if raw.get(key):
            raise UserError(f"{key} in config.json is not supported.")


def as_meant(raw: dict[str, Any], hf_class: Any) -> dict[str, Any]:
    """What config.json holds, as the fields of a transformers config class want it: they take no int for a float, no
    false for a number that is switched off, no null for a default, and no dtype with torch's name before it."""
    fields = {field.name: set(get_args(field.type) or (field.type,)) for field in dataclasses.fields(hf_class)}
    found = {}
    for key, value in raw.items():
        types = fields.get(key) or fields.get(hf_class.attribute_map.get(key), {NoneType})
        if value is False and bool not in types and types & {int, float}:
            value = None
        if type(value) is int and float in types and int not in types:
            value = float(value)
        if key in ("dtype", "torch_dtype") and isinstance(value, str):
            value = value.removeprefix("torch.")
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            # transformers would take null for a value, where others do not state one.
            value = {name: each for name, each in value.items() if each is not None or name in _MEANT_NULL}
        if value is not None or (key in fields and NoneType in types):
            found[key] = value
    return found


def _from_transformers(hf: Any, architecture: str, dtype: str) -> ModelConfig:
    if not 0.0 <= hf.rms_norm_eps < math.inf:
        raise UserError(f"rms_norm_eps {hf.rms_norm_eps} is not supported; it must be 0 or more.")
    if hf.hidden_act not in SUPPORTED_ACTIVATIONS:
        raise UserError(f"hidden_act {hf.hidden_act!r} is not supported; supported: {listed(SUPPORTED_ACTIVATIONS)}.")
    if hf.num_attention_heads % hf.num_key_value_heads:
        raise UserError(
            f"num_attention_heads {hf.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{hf.num_key_value_heads}."
        )
    particulars = FAMILIES[hf.model_type][1](hf)
    if any(window is not None and window < 1 for window in particulars.get("sliding_windows", ())):
        raise UserError(f"sliding_window {hf.sliding_window} is not supported; it must be 1 or more, or null for none.")
    rope = read_rope(hf.rope_parameters, hf.max_position_embeddings)
    shared = {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": getattr(hf, "intermediate_size", 0),
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "max_position_embeddings": longest_context(rope, hf.max_position_embeddings),
        "rms_norm_eps": hf.rms_norm_eps,
        "tie_word_embeddings": hf.tie_word_embeddings,
        "sliding_windows": (None,) * hf.num_hidden_layers,
    }
    config = ModelConfig(architecture=architecture, rope=rope, dtype=dtype, **(shared | particulars))
    if not 1 <= config.head_dim <= _LARGEST:
        raise UserError(f"head_dim {config.head_dim} is not supported; it must be from 1 to {_LARGEST}.")
    if config.rotary_dim % 2:
        raise UserError(f"head_dim {config.rotary_dim} is odd, and rotary position embedding needs an even one.")
    return config


# --- reading ---------------------------------------------------------------------------------------------------------


def _architectures(raw: dict[str, Any]) -> list[str]:
    declared = raw.get("architectures")
    return [str(entry) for entry in declared] if isinstance(declared, list) else []


def _text_model(raw: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the language model, which may be a part of the whole."""
    text = raw.get("text_config")
    if str(raw.get("model_type")) in FAMILIES or not isinstance(text, dict):
        return dict(raw)
    return text | {key: raw[key] for key in _OF_THE_WHOLE if key in raw and text.get(key) is None}


def _architecture(raw: dict[str, Any]) -> str:
    """The first that the engine runs, else the first."""
    names = _architectures(raw) or [str(raw.get("model_type"))]
    architecture = next((name for name in names if name in ARCHITECTURES), names[0])
    model_type = ARCHITECTURES.get(architecture)
    if model_type is not None and raw.get("model_type") != model_type:
        raise UserError(
            f"config.json names {architecture} with model_type {raw.get('model_type')!r}, which do not belong "
            f"together; model_type must be {model_type!r}."
        )
    return architecture


def _stored_dtype(hf: Any, path: Path) -> str:
    """The dtype that config.json states, else that of the checkpoint's first floating tensor, else bfloat16."""
    if hf.dtype is not None:
        name = str(hf.dtype).removeprefix("torch.")
        if name not in SUPPORTED_DTYPES:
            raise UserError(f"dtype {name} in config.json is not supported; supported: {listed(SUPPORTED_DTYPES)}.")
        return name
    for file in filter(Path.is_file, find_weights(path).loaded[:1]):
        tags = [tensor.dtype for _, (tensor,) in sorted(find_tensors([file]).items())]
        return next((_FLOAT_TAGS[tag] for tag in tags if tag in _FLOAT_TAGS), "bfloat16")
    return "bfloat16"


def _as_stored(config: ModelConfig, path: Path) -> ModelConfig:
    """With what the weight files say: whether the head is tied, as transformers decides it, and notes for people."""
    found = find_weights(path)
    if not found.loaded or found.absent:
        return config
    tensors = find_tensors(found.loaded)
    notes = describe_weights(found, tensors)
    if config.tie_word_embeddings and {EMBEDDING, HEAD} <= tensors.keys() and differ(EMBEDDING, HEAD, tensors):
        notes.append(f"weights: {HEAD} differs from the embeddings, so it is used, though config.json ties them")
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return dataclasses.replace(config, notes=tuple(notes))


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
