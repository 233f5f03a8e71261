"""Rope settings, read from transformers' rope_parameters: what each type takes, and nothing else."""

from __future__ import annotations

import math
from typing import Any

from miniserve.core import UserError
from miniserve.models.description import RopeConfig

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


def read_rope(parameters: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    """`parameters`: transformers' rope_parameters."""
    given = {key: value for key, value in parameters.items() if value is not None}
    if "truncate" in parameters:
        given["truncate"] = bool(parameters["truncate"])  # null is false to transformers
    rope_type = given.get("rope_type", "default")
    if rope_type not in ROPE_KEYS:
        raise UserError(f"rope type {rope_type!r} is not supported; supported: {listed(ROPE_KEYS)}.")
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UserError("partial_rotary_factor below 1 is not supported; rope over the whole head is.")
    for key in given:
        if key not in _ROPE_NOTES and key not in ROPE_KEYS[rope_type]:
            known = listed(ROPE_KEYS[rope_type]) or "nothing else"
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
        checked = key == "rope_theta" or (key in ROPE_KEYS[rope_type] and key != "truncate")
        if checked and not (isinstance(value, int | float) and 0 < value < math.inf):
            raise UserError(f"{key} of rope type {rope_type!r} must be a positive number, not {value!r}.")
    if rope_type == "yarn" and given.get("rope_theta") == 1:
        raise UserError("rope_theta of rope type 'yarn' must not be 1, which turns all dimensions at one speed.")
    if rope_type == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise UserError("high_freq_factor of rope type 'llama3' must be above its low_freq_factor.")


def longest_context(rope: RopeConfig, max_position_embeddings: int) -> int:
    """Linear and YaRN stretch the trained length by `factor`; llama3 configs already state the stretched one."""
    if rope.rope_type == "linear":
        return int(max_position_embeddings * rope.factor)
    if rope.rope_type == "yarn":
        return int(rope.original_max_position_embeddings * rope.factor)
    return max_position_embeddings


def listed(names: Any) -> str:
    """a, b, c"""
    return ", ".join(str(name) for name in names)
