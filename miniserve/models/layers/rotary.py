"""Rotary position embedding: the table of cosines and sines, with every supported scaling of its frequencies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from miniserve.core import UserError
from miniserve.models.description import RopeConfig, yarn_magnitude
from miniserve.models.layers.base import Module
from miniserve.models.layers.ops import Ops


class RotaryEmbedding(Module):
    """cos(p·f) and sin(p·f) of every position p up to `max_positions`, in float32, built once.

    The table is [max_positions, head_dim]: head_dim/2 cosines, then head_dim/2 sines, both times the attention factor
    that YaRN asks for.
    """

    table: Tensor

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        *,
        max_positions: int,
        device: torch.device,
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops or Ops()
        table = torch.empty(max_positions, head_dim, device=device)
        if device.type != "meta":  # where arithmetic would make torch import its compiler, for seconds
            inv_freq, attention_factor = inverse_frequencies(rope, head_dim)
            # On the CPU whatever the device, so that every device rotates by the same numbers.
            angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq
            table.copy_(torch.cat((angles.cos(), angles.sin()), dim=-1).mul_(attention_factor))
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: Tensor) -> Tensor:
        """positions: int64 [T] -> float32 [T, head_dim]."""
        return self.ops.look_up(positions, self.table)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Returns (radians per position, float32 [head_dim/2]; the factor on cosines and sines)."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    inv_freq = 1.0 / powers
    match rope.rope_type:
        case "default" | "dynamic":  # dynamic: up to the trained length, see RopeConfig
            return inv_freq, 1.0
        case "linear":
            return inv_freq / rope.factor, 1.0
        case "llama3":
            return _llama3(rope, inv_freq), 1.0
        case "yarn":
            return _yarn(rope, powers, head_dim)
    raise UserError(f"rope type {rope.rope_type!r} is not supported.")


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, and a linear blend lies between."""
    factor, original = rope.factor, rope.original_max_position_embeddings
    low, high = rope.low_freq_factor, rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    kept = (original / wavelength - low) / (high - low)
    blend = (1 - kept) * inv_freq / factor + kept * inv_freq
    long_ones = torch.where(wavelength > original / low, inv_freq / factor, blend)
    return torch.where(wavelength < original / high, inv_freq, long_ones)


def _yarn(rope: RopeConfig, powers: Tensor, head_dim: int) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023): interpolate the slow dimensions, keep the fast ones, ramp between the two bounds."""
    factor, original = rope.factor, rope.original_max_position_embeddings

    def bound(rotations: float) -> float:
        """The dimension that turns `rotations` times over the original length."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = bound(rope.beta_fast), bound(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    interpolated = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - interpolated
    inv_freq = 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept
    return inv_freq, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_magnitude(rope.factor, rope.mscale) / yarn_magnitude(rope.factor, rope.mscale_all_dim)
    return yarn_magnitude(rope.factor, 1.0)
