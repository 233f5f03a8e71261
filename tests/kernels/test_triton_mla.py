"""The Triton decode kernel for latent attention against attention in float64."""

from __future__ import annotations

import pytest
import torch
from triton_support import (
    DEVICE,
    DTYPES,
    FP8,
    HALVES,
    NATIVE,
    SMALL,
    attend,
    block_tables,
    cached,
    close,
    end_of_a_pool_above_4_gib,
    int32,
    normal,
)

from miniserve.kernels.triton.launch import Launch
from miniserve.kernels.triton.mla_decode import mla_decode
from miniserve.kernels.triton.split_kv import DecodeScratch

LENGTHS = [1, 0, 16, 17, 129]


def check(
    dtype: torch.dtype, kv_dtype: torch.dtype, *, heads: int, rank: int, rope: int, lengths: list[int] = LENGTHS,
    block_size: int = 16, num_splits: int = 1, fused: bool | None = None, kv_scale: float | None = None,
    launch: Launch | None = SMALL, large_pool: bool = False, fresh: int | None = None,
) -> None:  # fmt: skip
    num_blocks = 24
    cache = normal(1, num_blocks, block_size, rank + rope).to(kv_dtype)
    q = normal(2, len(lengths), heads + 1, rank + rope, dtype=dtype)[:, 1:]
    tables = block_tables(lengths, num_blocks, block_size)
    pool = end_of_a_pool_above_4_gib(cache)[0] if large_pool else cache
    scratch = DecodeScratch.allocate([(len(lengths), num_splits)], heads, rank, DEVICE)
    for _ in range(2 if num_splits > 1 and (NATIVE or fused is not None) else 1):
        got = mla_decode(
            q[..., :rank], q[..., rank:], pool, tables + (len(pool) - num_blocks), int32(lengths), scale=0.1,
            num_splits=num_splits, scratch=scratch,
            kv_scale=None if kv_scale is None else torch.tensor([kv_scale], device=DEVICE), fused_merge=fused,
            out=torch.full((len(lengths), heads, rank), float("nan"), dtype=dtype, device=DEVICE), launch=launch,
            fresh=fresh,
        )  # fmt: skip
        want = []
        for row, length in enumerate(lengths):
            latent = cached(cache, tables, row, length)[:, None].double() * (kv_scale or 1.0)
            empty = torch.zeros(1, heads, rank, dtype=torch.float64, device=DEVICE)
            want.append(attend(q[row : row + 1], latent, latent[..., :rank], 0.1) if length else empty)
        close(got, torch.cat(want), dtype)
    assert not scratch.arrivals.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_splits", "fused"), [(1, None), (3, True), (3, False)])
def test_ragged_rows(num_splits: int, fused: bool | None, dtype: torch.dtype) -> None:
    check(dtype, dtype, heads=16, rank=64, rope=16, num_splits=num_splits, fused=fused)


@pytest.mark.parametrize("fresh", [1, 3])
@pytest.mark.parametrize("num_splits", [1, 3])
def test_lengths_that_are_read_before_the_step_is_done(num_splits: int, fresh: int) -> None:
    check(torch.float16, torch.float16, heads=4, rank=48, rope=16, num_splits=num_splits, fresh=fresh)


def test_every_length_around_a_partition_of_256() -> None:
    lengths = range(230, 271) if NATIVE else range(246, 266)
    check(torch.float16, torch.float16, heads=2, rank=64, rope=16, lengths=[*lengths])


@pytest.mark.parametrize("num_splits", [1, 3])
def test_the_highest_block_of_a_pool_above_4_gib(num_splits: int) -> None:
    check(torch.float16, torch.float16, heads=4, rank=64, rope=16, num_splits=num_splits, large_pool=True)


@pytest.mark.parametrize("heads", [1, 8, 20, 128])
def test_head_counts(heads: int) -> None:
    check(torch.float16, torch.float16, heads=heads, rank=64, rope=32, lengths=[1, 70], num_splits=2, launch=None)


@pytest.mark.parametrize("block_size", [1, 16, 32, 64])
def test_block_sizes(block_size: int) -> None:
    lengths = [max(1, block_size - 1), block_size, 3 * block_size + 1]
    check(torch.float16, torch.float16, heads=4, rank=32, rope=16, lengths=lengths, block_size=block_size)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [16, 128])
def test_the_dimensions_of_deepseek(heads: int, dtype: torch.dtype) -> None:
    # The interpreter takes its time for many heads.
    lengths = [40, 0, 7] if NATIVE or heads == 16 else [9]
    check(dtype, dtype, heads=heads, rank=512, rope=64, lengths=lengths, num_splits=2, launch=None)


@pytest.mark.parametrize("dtype", HALVES)
def test_fp8_cache(dtype: torch.dtype) -> None:
    check(dtype, FP8, heads=16, rank=64, rope=16, num_splits=2, kv_scale=0.5)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no interpreter runs Gluon")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "block_size"), [(16, 16), (5, 128), (16, 64)])
def test_by_hoppers_matrix_units(heads: int, block_size: int, dtype: torch.dtype) -> None:
    """Beside keys that no query sees, which are NaN."""
    from miniserve.kernels.triton.runtime import gluon_kernels

    hopper = gluon_kernels("hopper_mla", DEVICE, "decode runs slower")
    if hopper is None:
        pytest.skip("needs Hopper's matrix units")
    lengths = [1, 0, 63, 64, 65, 129, 300, 350]  # the last: 6 tiles, of which 5 splits have one or two
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    cache = torch.full((len(order), block_size, 576), float("nan"), dtype=dtype, device=DEVICE)
    tables = torch.full((len(lengths), max(counts) + 1), 1 << 30, dtype=torch.int32, device=DEVICE)
    q = normal(2, len(lengths), heads + 1, 576, dtype=dtype)[:, 1:]
    want = torch.zeros(len(lengths), heads, 512, dtype=torch.float64, device=DEVICE)
    for row, (length, count, blocks) in enumerate(zip(lengths, counts, order.split(counts), strict=True)):
        tables[row, :count] = blocks
        latent = normal(row, length, 576, dtype=dtype)
        at = torch.arange(length, device=DEVICE)
        cache[blocks.long()[at // block_size], at % block_size] = latent
        if length:
            keys = latent[:, None].double()
            want[row] = attend(q[row : row + 1], keys, keys[..., :512], 0.05)[0]
    for num_splits, fresh in ((1, None), (1, 1), (2, 3), (5, 1)):
        scratch = DecodeScratch.allocate([(len(lengths), num_splits)], heads, 512, DEVICE)
        got = hopper.hopper_mla(
            q[..., :512], q[..., 512:], cache, tables, int32(lengths), scale=0.05, num_splits=num_splits, fresh=fresh,
            scratch=scratch,
        )  # fmt: skip
        close(got, want, dtype)
