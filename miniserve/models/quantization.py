"""What `quantization_config` says of a checkpoint's weights: the format of each module's matrix, or what is not known.

One reader for the dialects that people bring: fp8 (DeepSeek, Qwen, AutoFP8), compressed-tensors (llm-compressor) and
Quark (AMD). No torch. Whether the files agree is the loader's to check, tensor by tensor.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """float8_e4m3fn codes, and float32 numbers that multiply them: one for the whole matrix ("tensor"), one for each
    row ("rows"), or one for each block of `block` rows and columns ("blocks"). scale: the name of the numbers' tensor,
    in place of "weight". inputs: what is multiplied with it is to be rounded to 8 bits, too."""

    grain: str
    scale: str = "weight_scale"
    block: tuple[int, int] = (0, 0)
    inputs: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """Of modules whose name one of `patterns` matches; None: their weights are plain."""

    patterns: tuple[str, ...]
    format: WeightFormat | None


@dataclass(frozen=True, slots=True)
class Quantization:
    """method: its name. rules: the first that matches a module counts; where none does its weight is plain.
    static_inputs: modules also have an `input_scale`, which products with weights alone in 8 bits do not need.
    kv_scales: the checkpoint states scales for an fp8 KV cache. unknown: what of it is not known, and so cannot be
    loaded, None where all is."""

    method: str
    rules: tuple[Rule, ...] = ()
    static_inputs: bool = False
    kv_scales: bool = False
    unknown: str | None = None

    def format_of(self, module: str) -> WeightFormat | None:
        """Of the matrix of the module of that (whole) name, None for a plain one."""
        for rule in self.rules:
            if any(_matches(pattern, module) for pattern in rule.patterns):
                return rule.format
        return None

    def leaves_out(self, tensor: str) -> bool:
        """Whether a checkpoint may have this tensor and the engine reads no such one."""
        module, _, name = tensor.rpartition(".")
        return self.static_inputs and name == "input_scale" and self.format_of(module) is not None


class _Unknown(Exception):
    """Something in a config that would change the weights' meaning and is not understood; `str(error)` names it."""


def read_quantization(config: dict[str, Any]) -> Quantization | None:
    """What a model's config.json says. None where nothing is quantised."""
    raw = config.get("quantization_config")
    if raw is None:
        return None
    if not isinstance(raw, dict):
        return Quantization("unknown", unknown="unknown")
    method = str(raw.get("quant_method", "unknown"))
    kv_scales = bool(raw.get("kv_cache_scheme") or raw.get("kv_cache_quant_config") or _kv_group(raw))
    try:
        if method not in _READERS:
            raise _Unknown(method)
        rules, static = _READERS[method](raw)
    except _Unknown as error:
        return Quantization(method, kv_scales=kv_scales, unknown=str(error))
    return Quantization(method, tuple(rules), static, kv_scales)


# --- the dialects ----------------------------------------------------------------------------------------------------

_Read = tuple[list[Rule], bool]
_EVERY = ("*",)


def _fp8(raw: dict[str, Any]) -> _Read:
    _require(raw, "fp8", fmt="e4m3", expert_dtype="fp8", modules_to_convert=None)
    scheme = str(raw.get("activation_scheme", "dynamic")).lower()
    if scheme not in ("dynamic", "static"):
        raise _Unknown(f"fp8 with activation_scheme {scheme}")
    block = raw.get("weight_block_size")
    found = WeightFormat("tensor") if block is None else WeightFormat("blocks", "weight_scale_inv", _block(block))
    # Its linear layers are all but the head, which transformers and others leave out unasked.
    plain = ("lm_head", *_names(raw, "modules_to_not_convert"), *_names(raw, "ignored_layers"))
    return [Rule(plain, None), Rule(_EVERY, found)], scheme == "static"


def _compressed_tensors(raw: dict[str, Any]) -> _Read:
    _require(raw, "compressed-tensors", transform_config=None)
    if (raw.get("sparsity_config") or {}).get("format", "dense") != "dense":
        raise _Unknown("compressed-tensors with sparse weights")
    rules, static = [Rule(_names(raw, "ignore"), None)], False
    groups = raw.get("config_groups")
    if not isinstance(groups, dict):
        raise _Unknown("compressed-tensors without config_groups")
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise _Unknown(f"compressed-tensors with {name} {group!r}")
        targets, weights = _names(group, "targets"), group.get("weights")
        if all(target.lower().endswith("attention") for target in targets) or weights is None:
            continue  # about the KV cache
        if group.get("output_activations"):
            raise _Unknown("compressed-tensors with quantised outputs")
        patterns = _EVERY if "Linear" in targets else targets
        inputs = group.get("input_activations") or {}
        rules.append(Rule(patterns, replace(_compressed_weights(weights), inputs=bool(inputs))))
        if inputs and (inputs.get("type"), inputs.get("num_bits")) != ("float", 8):
            raise _Unknown(f"compressed-tensors with {_bits(inputs)} activations")
        static = static or (bool(inputs) and not inputs.get("dynamic"))
    return rules, static


def _compressed_weights(weights: Any) -> WeightFormat:
    if not isinstance(weights, dict) or (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        raise _Unknown(f"compressed-tensors with {_bits(weights)} weights")
    strategy = weights.get("strategy")
    if strategy == "block":
        return WeightFormat("blocks", block=_block(weights.get("block_structure")))
    if strategy not in ("tensor", "channel") or weights.get("symmetric") is False or weights.get("dynamic"):
        raise _Unknown(f"compressed-tensors with weights of strategy {strategy}, symmetric {weights.get('symmetric')}")
    return WeightFormat("tensor" if strategy == "tensor" else "rows")


def _quark(raw: dict[str, Any]) -> _Read:
    _require(raw, "quark", layer_type_quant_config=None)
    group = _kv_group(raw)
    own = raw.get("layer_quant_config") or {}
    if not isinstance(own, dict):
        raise _Unknown(f"quark with layer_quant_config {own!r}")
    rules, static = [Rule(_names(raw, "exclude"), None)], False
    configs = [((pattern,), each, pattern in group) for pattern, each in own.items()]
    for patterns, config, of_cache in [*configs, (_EVERY, raw.get("global_quant_config"), False)]:
        if not isinstance(config, dict):
            raise _Unknown(f"quark with a configuration {config!r}")
        if (config.get("output_tensors") and not of_cache) or config.get("bias"):
            raise _Unknown("quark with quantised outputs or biases")
        inputs = config.get("input_tensors") or {}
        if inputs and (not isinstance(inputs, dict) or inputs.get("dtype") != "fp8_e4m3"):
            raise _Unknown(f"quark with {_quark_name(inputs)} activations")
        form = _quark_weights(config.get("weight"))
        rules.append(Rule(patterns, form and replace(form, inputs=bool(inputs))))
        static = static or (bool(inputs) and not inputs.get("is_dynamic"))
    return rules, static


def _quark_weights(weight: Any) -> WeightFormat | None:
    if weight is None:
        return None
    known = isinstance(weight, dict) and weight.get("dtype") == "fp8_e4m3" and not weight.get("is_dynamic")
    if (
        not known
        or weight.get("qscheme") not in ("per_tensor", "per_channel")
        or weight.get("ch_axis") not in (None, 0)
    ):
        raise _Unknown(f"quark with {_quark_name(weight)} weights")
    return WeightFormat("tensor" if weight["qscheme"] == "per_tensor" else "rows")


_READERS = {"fp8": _fp8, "compressed-tensors": _compressed_tensors, "quark": _quark}

# --- reading ---------------------------------------------------------------------------------------------------------


def _matches(pattern: str, module: str) -> bool:
    """A pattern is "re:" and a regular expression, or a glob, or the name of the module, of one that it is in, or the
    last part of its name."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], module) is not None
    if "*" in pattern:
        return fnmatch.fnmatchcase(module, pattern)
    return f".{module}.".startswith(f".{pattern}.") or f".{module}".endswith(f".{pattern}")


def _require(raw: dict[str, Any], method: str, **values: Any) -> None:
    """Each setting is not there, empty, or as given."""
    for name, value in values.items():
        if raw.get(name) and raw[name] != value:
            raise _Unknown(f"{method} with {name} {raw[name]!r}")


def _names(raw: dict[str, Any], key: str) -> tuple[str, ...]:
    names = raw.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and _is_pattern(name) for name in names):
        raise _Unknown(f"{key} {names!r}")
    return tuple(names)


def _is_pattern(name: str) -> bool:
    try:
        re.compile(name[3:] if name.startswith("re:") else "")
    except re.error:
        return False
    return True


def _block(block: Any) -> tuple[int, int]:
    """Steps of scales are refined down to 32 where a shard cuts a block, so blocks are multiples of that."""
    if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 and n % 32 == 0 for n in block):
        return block[0], block[1]
    raise _Unknown(f"blocks of {block!r}")


def _kv_group(raw: dict[str, Any]) -> list[str]:
    export = raw.get("export")
    group = export.get("kv_cache_group") if isinstance(export, dict) else None
    return [str(pattern) for pattern in group] if isinstance(group, list) else []


def _bits(scheme: Any) -> str:
    return f"{scheme.get('type')} {scheme.get('num_bits')}" if isinstance(scheme, dict) else repr(scheme)


def _quark_name(config: Any) -> str:
    return f"{config.get('dtype')} {config.get('qscheme')}" if isinstance(config, dict) else repr(config)
