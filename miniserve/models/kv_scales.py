"""The scales for an fp8 KV cache that a checkpoint was calibrated with: for each layer one number for keys and one for
values, by the names that vLLM, llm-compressor, AutoFP8, ModelOpt and Quark give them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch

from miniserve.attention.spec import AttentionSpec
from miniserve.core import UserError
from miniserve.models.decoder import CausalLM

_NAMES = ("{}_scale", "{}_proj.{}_scale", "{}_proj.output_scale", "qkv_proj.{}_scale", "qkqkv_proj.{}_scale")
_KEYS, _VALUES = (tuple(name.format(of, of) for name in (*_NAMES, "{}_cache.scale")) for of in "kv")
_BOTH = ("kv_scale",)  # of older checkpoints, and of latents
# Of what an fp8 cache does not hold: queries, and the softmax.
_UNUSED = (".q_scale", ".q.scale", ".q_proj.output_scale", ".prob_scale", ".prob_output_scale")
_KNOWN = "|".join(map(re.escape, (*_KEYS, *_VALUES, *_BOTH, "q_proj.q_scale", *(name[1:] for name in _UNUSED))))
_NAME = re.compile(rf"model\.layers\.(\d+)\.self_attn\.({_KNOWN})")


def is_kv_scale(name: str, num_layers: int) -> bool:
    """Whether a checkpoint's tensor of that name is a scale of one of the model's layers."""
    match = _NAME.fullmatch(name)
    return match is not None and int(match[1]) < num_layers


def set_kv_scales(model: CausalLM, tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Give every layer its scales. tensors: a checkpoint's, by name. Returns a sentence on where they came from, none
    where there is nothing to say.

    A checkpoint's scale is for float8_e4m3fn, whose codes float8_e4m3fnuz, the format of gfx942, takes for half as much
    (its largest is 240, not 448): there it counts twice. Raises `UserError` where only some layers have scales, or one
    is not a positive number.
    """
    tensors = {name: each for name, each in tensors.items() if not name.endswith(_UNUSED)}
    layers = [cast(Any, layer).self_attn.attn for layer in model.model.layers]
    spec: AttentionSpec = layers[0].spec
    dtype = str(spec.kv_dtype).removeprefix("torch.")
    if not spec.fp8_kv:
        return [f"KV scales: those of the checkpoint are not used, as the KV cache is {dtype}"] if tensors else []
    if not tensors:
        return ["KV scales: 1, as the checkpoint states none"]
    factor = 2.0 if spec.kv_dtype == torch.float8_e4m3fnuz else 1.0
    found: list[float] = []
    for index, attn in enumerate(layers):
        key = factor * _scale(tensors, index, (*_KEYS, *_BOTH))
        value = key if spec.latent is not None else factor * _scale(tensors, index, (*_VALUES, *_BOTH))
        k_scale, v_scale = (torch.tensor([each], device=model.options.device) for each in (key, value))
        if spec.latent is not None:
            attn.kv_scale = k_scale
        else:
            attn.k_scale, attn.v_scale = k_scale, v_scale
        found += [key, value]
    doubled = f", twice what it states, for {dtype}" if factor > 1 else ""
    return [f"KV scales: the checkpoint's, {min(found):.3g} to {max(found):.3g}{doubled}"]


def _scale(tensors: Mapping[str, torch.Tensor], layer: int, names: Iterable[str]) -> float:
    candidates = [f"model.layers.{layer}.self_attn.{name}" for name in names]
    given = [name for name in candidates if name in tensors]
    if len(given) != 1:
        what = f"two of them, {given[0]} and {given[1]}" if given else f"no {candidates[0]}, though others"
        raise UserError(f"The checkpoint's KV scales are not whole: it has {what}.")
    tensor = tensors[given[0]].float()
    if tensor.numel() != 1 or not torch.isfinite(tensor).all() or not (tensor > 0).all():
        shown = f"{tensor.item():g}" if tensor.numel() == 1 else f"of shape {list(tensor.shape)}"
        raise UserError(f"{given[0]} is {shown}; a KV scale must be one positive number.")
    return float(tensor)
