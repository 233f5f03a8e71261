"""The stream of random numbers: SplitMix64 read at any place."""

from __future__ import annotations

import numpy as np
import torch

from miniserve.kernels.sampling import NUMBERS_PER_POSITION, uniform
from miniserve.runner.sampling_rows import stream_key

torch.set_num_threads(1)


def split_mix(state, n):
    """The n-th output (from 0) of a SplitMix64 that starts at `state`, in Python's integers."""
    mask = 2**64 - 1
    z = (state + (n + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_known_outputs():
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [split_mix(1234567, n) for n in range(5)] == known
    assert uniform(torch.tensor([1234567]), torch.tensor([0])).item() == (known[0] >> 11) * 2.0**-53


def test_equals_the_plain_formula_for_all_keys_and_positions():
    generator = np.random.default_rng(0)
    keys = generator.integers(-(2**63), 2**63, 300)
    keys[:4] = [0, -1, 2**63 - 1, -(2**63)]
    positions = generator.integers(0, 2**20, 300)
    ours = uniform(torch.from_numpy(keys), torch.from_numpy(positions))
    outputs = [split_mix(int(k) % 2**64, int(p) * NUMBERS_PER_POSITION) for k, p in zip(keys, positions, strict=True)]
    assert ours.tolist() == [(value >> 11) * 2.0**-53 for value in outputs]
    assert ours.dtype == torch.float64
    assert ours.min() >= 0.0 and ours.max() < 1.0


def test_numbers_are_spread_evenly_over_positions_and_over_seeds():
    over_positions = uniform(torch.full((40000,), stream_key(1, "a", 0)), torch.arange(40000))
    over_seeds = uniform(torch.tensor([stream_key(s, "a", 0) for s in range(40000)]), torch.zeros(40000).long())
    for numbers in (over_positions, over_seeds):
        counts = torch.histc(numbers, 50, 0.0, 1.0)
        assert ((counts - 800) ** 2 / 800).sum() < 49 + 5 * (2 * 49) ** 0.5
        centred = numbers - 0.5
        correlation = (centred[1:] * centred[:-1]).mean() / centred.var()
        assert abs(correlation) < 5 / 200


def test_keys():
    assert stream_key(7, "a", 0) == stream_key(7, "b", 1)  # a seeded request's stream is its own
    assert stream_key(None, "a", 0) == stream_key(None, "a", 0)
    different = [stream_key(None, "a", 0), stream_key(None, "b", 0), stream_key(None, "a", 1)]
    different += [stream_key(seed, "a", 0) for seed in (0, 1, -1, 2**63 - 1, -(2**63))]
    assert len(set(different)) == len(different)
    assert all(-(2**63) <= key < 2**63 for key in different)
