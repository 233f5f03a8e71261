"""Random numbers without state: a pure function of a row's key and the position of the token to draw.

A row's stream is SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014)
started at the row's key and read at any place: its n-th output is mix(key + n * GAMMA). So a draw depends on nothing
else that the batch holds, and a sequence that was preempted goes on where it stopped.
"""

from __future__ import annotations

import hashlib

import torch

# A position owns this many consecutive numbers of its stream, for draws that may have to be repeated.
NUMBERS_PER_POSITION = 32

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # torch has signed integers; products wrap to the same bits
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


def stream_key(seed: int | None, request_id: str, engine_seed: int) -> int:
    """The key of a request's stream, a signed 64-bit integer.

    With a seed it depends on the seed alone; without, on the engine's seed and the request's id, so that a run can be
    repeated with the same ids and a preempted request finds its stream again.
    """
    origin = f"request {engine_seed} {request_id}" if seed is None else f"seed {seed}"
    return int.from_bytes(hashlib.blake2b(origin.encode(), digest_size=8).digest(), "little", signed=True)


def uniform(keys: torch.Tensor, positions: torch.Tensor, number: int = 0) -> torch.Tensor:
    """One float64 in [0, 1), a multiple of 2**-53, per row, on the rows' device.

    keys, positions: int64 [num_rows]; number: which of the position's NUMBERS_PER_POSITION.
    """
    bits = positions * NUMBERS_PER_POSITION
    bits.add_(number + 1).mul_(_GAMMA).add_(keys)
    bits = bits.bitwise_xor_(_shift_right(bits, 30)).mul_(_MIX_1)
    bits = bits.bitwise_xor_(_shift_right(bits, 27)).mul_(_MIX_2)
    bits = bits.bitwise_xor_(_shift_right(bits, 31))
    return _shift_right(bits, 11).to(torch.float64).mul_(2.0**-53)


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift: torch's shift of a signed integer repeats the sign bit."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)
