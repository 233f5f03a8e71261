"""The copy of a shuffled cache's blocks in the linear layout."""

from __future__ import annotations

import pytest
import torch
from attention_reference import pack_shuffled
from triton_support import (
    DEVICE,
    FP8,
    attend,
    block_tables,
    cached,
    close,
    end_of_a_pool_above_4_gib,
    int32,
    normal,
    starts_and_lengths,
)

from miniserve.kernels.triton.linearize import linearize
from miniserve.kernels.triton.paged_extend import paged_extend

REQUESTS = [(0, 1), (15, 1), (16, 17), (0, 33), (70, 40)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
@pytest.mark.parametrize(("block_size", "head_dim"), [(16, 64), (32, 80), (48, 128)])
@pytest.mark.parametrize("window", [None, 20])
def test_blocks_are_copied_token_by_token(
    dtype: torch.dtype, block_size: int, head_dim: int, window: int | None
) -> None:
    k, v = (normal(seed, 12, block_size, 2, head_dim).to(dtype) for seed in (1, 2))
    starts, lengths = starts_and_lengths(REQUESTS)
    tables = block_tables(lengths, 12, block_size)
    found = linearize(*pack_shuffled(k, v), tables, int32(starts), int32(lengths), window=window)
    for row, (context, new) in enumerate(REQUESTS):
        first = 0 if window is None else max(0, context - window + 1)
        blocks = range(first // block_size, -(-(context + new) // block_size))
        for got, want in zip(found, (k, v), strict=True):
            for place in blocks:
                copied, there = got[row * tables.shape[1] + place], want[tables[row, place]]
                assert torch.equal(copied.view(torch.uint8), there.view(torch.uint8))


def test_nothing_is_read_that_was_not_copied() -> None:
    block_size, window = 16, 20
    k, v = (normal(seed, 12, block_size, 2, 64, dtype=torch.float16) for seed in (1, 2))
    starts, lengths = starts_and_lengths(REQUESTS)
    tables = block_tables(lengths, 12, block_size)
    planes = linearize(*pack_shuffled(k, v), tables, int32(starts), int32(lengths), window=window)
    for row, (context, new) in enumerate(REQUESTS):
        first = max(0, context - window + 1) // block_size
        last = -(-(context + new) // block_size)
        for place in {*range(tables.shape[1])} - {*range(first, last)}:
            for plane in planes:
                plane[row * tables.shape[1] + place] = float("nan")
    q = normal(5, starts[-1], 4, 64, dtype=torch.float16)
    own_tables = torch.arange(tables.numel(), dtype=torch.int32, device=DEVICE).view(tables.shape)
    out = paged_extend(
        q, *planes, own_tables, int32(starts), int32(lengths), max_query_len=40, num_kv_heads=2, block_size=block_size,
        shuffled=False, scale=0.125, window=window,
    )  # fmt: skip
    for row, (start, (_, new)) in enumerate(zip(starts, REQUESTS, strict=False)):
        keys, values = (cached(plane, tables, row, lengths[row]) for plane in (k, v))
        want = attend(q[start : start + new], keys, values, 0.125, window=window)
        close(out[start : start + new], want, torch.float16)


def test_the_highest_block_of_a_pool_above_4_gib() -> None:
    k, v = (normal(seed, 3, 16, 8, 128, dtype=torch.float16) for seed in (1, 2))
    key, value = end_of_a_pool_above_4_gib(*pack_shuffled(k, v))
    tables = block_tables([40], 3, 16)
    high = tables + (len(key) - 3)
    for got, want in zip(linearize(key, value, high, int32([0, 40]), int32([40]), window=None), (k, v), strict=True):
        assert torch.equal(got[:3], want[tables[0, :3]])
