"""The Triton decode kernel against attention in float64, in both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_reference import pack_shuffled
from triton_support import (
    DEVICE,
    DTYPES,
    FP8,
    HALVES,
    LAYOUTS,
    NATIVE,
    SMALL,
    Cache,
    attend,
    block_tables,
    cached,
    close,
    end_of_a_pool_above_4_gib,
    every_other,
    int32,
    normal,
    random_cache,
)

from miniserve.kernels.triton.paged_decode import paged_decode
from miniserve.kernels.triton.split_kv import DecodeScratch

LENGTHS = [1, 0, 16, 17, 129, 64]


def expected(q: torch.Tensor, cache: Cache, tables: torch.Tensor, lengths: list[int], **options: Any) -> torch.Tensor:
    rows = []
    for row, length in enumerate(lengths):
        k, v = (cached(plane, tables, row, length) for plane in (cache.k, cache.v))
        rows.append(attend(q[row : row + 1], k, v, **options) if length else torch.zeros_like(q[:1], dtype=v.dtype))
    return torch.cat(rows)


def check(
    cache: Cache, num_heads: int, lengths: list[int], dtype: torch.dtype, *, scale: float = 0.125,
    again: bool = NATIVE, **options: Any,
) -> None:  # fmt: skip
    """again: twice, of which the second finds the scratch as the first left it."""
    head_dim, num_blocks = cache.k.shape[3], cache.k.shape[0]
    q = normal(5, len(lengths), num_heads + 2, head_dim, dtype=dtype)[:, 1:-1]  # strided: a view of something wider
    tables = block_tables(lengths, num_blocks, cache.block_size)
    num_splits = options.pop("num_splits", 1)
    scratch = DecodeScratch.allocate([(len(lengths), num_splits)], num_heads, head_dim, DEVICE)
    formula = {name: options[name] for name in ("window", "softcap", "sinks") if name in options}
    want = expected(q, cache, tables, lengths, scale=scale, **formula)
    for fresh in (None, 2)[: 1 + again]:
        got = paged_decode(
            q, *cache.planes, tables, int32(lengths), scale=scale, num_splits=num_splits, fresh=fresh, scratch=scratch,
            out=torch.full_like(q, float("nan")), **cache.layout, **options,
        )  # fmt: skip
        close(got, want, dtype)
    assert not scratch.arrivals.any()


@every_other("splits,dtype,shuffled", [(1, None), (3, True), (3, False)], DTYPES, [False, True])
def test_ragged_rows(splits: tuple[int, bool | None], dtype: torch.dtype, shuffled: bool) -> None:
    num_splits, fused = splits
    heads = 2 if NATIVE or dtype == torch.float32 else 1  # the interpreter takes its time for each
    cache = random_cache(24, 16, heads, 64, dtype=dtype, shuffled=shuffled)
    again = NATIVE or dtype == torch.float16
    check(cache, 4 * heads, LENGTHS, dtype, num_splits=num_splits, fused_merge=fused, launch=SMALL, again=again)


def test_no_split_idles_while_another_has_two_tiles_more() -> None:
    cache, num_splits = random_cache(16, 16, 1, 32, dtype=torch.float16, shuffled=False), 4
    scratch = DecodeScratch.allocate([(1, num_splits)], 2, 32, DEVICE)
    for tiles, used in ((5, 4), (3, 3)):
        scratch.lse.fill_(float("nan"))
        lengths = [tiles * SMALL.block_n - 1]
        paged_decode(
            normal(5, 1, 2, 32, dtype=torch.float16), *cache.planes, block_tables(lengths, 16, 16), int32(lengths),
            scale=0.1, num_splits=num_splits, scratch=scratch, launch=SMALL, **cache.layout,
        )  # fmt: skip
        assert scratch.lse.view(2, num_splits).isfinite().sum(1).tolist() == [used, used]


@LAYOUTS
@pytest.mark.parametrize("num_splits", [1, 2] if NATIVE else [1])
def test_every_length_around_a_partition_of_256(num_splits: int, shuffled: bool) -> None:
    cache = random_cache(32, 16, 1, 64, dtype=torch.float16, shuffled=shuffled)
    lengths = range(230, 271) if NATIVE else range(246, 266)
    check(cache, 1, [*lengths], torch.float16, num_splits=num_splits)


@LAYOUTS
@pytest.mark.parametrize("head_dim", [16, 80, 96, 112, 128, 192, 256])
def test_head_dims(head_dim: int, shuffled: bool) -> None:
    cache = random_cache(8, 16, 1, head_dim, dtype=torch.float16, shuffled=shuffled)
    check(cache, 4, [50, 3], torch.float16, num_splits=2)


def test_a_head_dim_that_only_the_linear_layout_takes_in_float32() -> None:
    check(random_cache(8, 16, 2, 36, dtype=torch.float32, shuffled=False), 4, [50, 3], torch.float32)


@every_other("group,shuffled", [1, 2, 3, 5, 8, 12, 16, 71], [False, True])
def test_group_sizes(group: int, shuffled: bool) -> None:
    cache = random_cache(8, 16, 2, 32, dtype=torch.float16, shuffled=shuffled)
    check(cache, 2 * group, [70, 1], torch.float16, num_splits=2)


@LAYOUTS
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_block_sizes(block_size: int, shuffled: bool) -> None:
    cache = random_cache(8, block_size, 2, 32, dtype=torch.float16, shuffled=shuffled)
    check(cache, 4, [block_size - 1, block_size, block_size + 1, 5 * block_size + 7], torch.float16, launch=SMALL)


@every_other("window,num_splits,shuffled", [1, 33, 100], [1, 3], [False, True])
def test_windows(window: int, num_splits: int, shuffled: bool) -> None:
    cache = random_cache(24, 16, 1, 32, dtype=torch.float16, shuffled=shuffled)
    check(cache, 2, LENGTHS, torch.float16, window=window, num_splits=num_splits, launch=SMALL)


@every_other("num_splits,shuffled", [1, 3], [False, True])
def test_softcap_sinks_and_scale(num_splits: int, shuffled: bool) -> None:
    cache = random_cache(24, 16, 2, 32, dtype=torch.float32, shuffled=shuffled)
    options: dict[str, Any] = {"num_splits": num_splits, "launch": SMALL, "scale": 0.7}
    lengths = [1, 0, 97]
    check(cache, 6, lengths, torch.float32, softcap=3.0, **options)
    check(cache, 6, lengths, torch.float32, sinks=3 * normal(9, 6), **options)
    check(cache, 6, lengths, torch.float32, sinks=3 * normal(9, 6), softcap=20.0, window=40, **options)


@LAYOUTS
def test_what_other_sequences_left_behind_is_not_read(shuffled: bool) -> None:
    """Beyond a sequence's end and before its window, blocks may hold anything, NaN and infinities included."""
    cache = random_cache(24, 16, 2, 32, dtype=torch.float16, shuffled=False)
    lengths = [1, 9, 16, 37, 90]
    tables = block_tables(lengths, 24, 16)
    k, v = (plane.clone() for plane in cache.planes)
    owned = torch.zeros(24, 16, dtype=torch.bool, device=DEVICE)
    separate = torch.arange(12, device=DEVICE).split([-(-length // 16) for length in lengths])
    for row, (ids, length) in enumerate(zip(separate, lengths, strict=True)):
        tables[row, : len(ids)] = ids.int()
        flat = torch.zeros(len(ids) * 16, dtype=torch.bool, device=DEVICE)
        flat[max(0, length - 50) : length] = True
        owned[ids] = flat.view(-1, 16)
    for plane, bad in ((k, float("nan")), (v, float("nan")), (v[:12], float("inf"))):
        plane[~owned[: len(plane)]] = bad
    clean_k, clean_v = (t.double().masked_fill(~owned[:, :, None, None], 0.0) for t in (k, v))
    dirty = Cache(pack_shuffled(k, v) if shuffled else (k, v), clean_k, clean_v, 16, shuffled)
    q = normal(5, len(lengths), 4, 32, dtype=torch.float16)
    for num_splits in (1, 2):
        got = paged_decode(
            q, *dirty.planes, tables, int32(lengths), scale=0.2, window=50, num_splits=num_splits,
            scratch=DecodeScratch.allocate([(5, num_splits)], 4, 32, DEVICE), launch=SMALL, **dirty.layout,
        )  # fmt: skip
        close(got, expected(q, dirty, tables, lengths, scale=0.2, window=50), torch.float16)


@LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
def test_fp8_cache(dtype: torch.dtype, shuffled: bool) -> None:
    cache = random_cache(24, 16, 1, 64, dtype=FP8, shuffled=shuffled)
    k_scale, v_scale = torch.tensor([0.5], device=DEVICE), torch.tensor([3.0], device=DEVICE)
    scaled = Cache(cache.planes, cache.k * 0.5, cache.v * 3.0, 16, shuffled)
    for num_splits in (1, 3):
        check(scaled, 4, LENGTHS, dtype, k_scale=k_scale, v_scale=v_scale, num_splits=num_splits, launch=SMALL)


def test_no_rows_and_missing_scratch() -> None:
    cache = random_cache(2, 16, 1, 32, dtype=torch.float16, shuffled=False)
    q = normal(5, 1, 1, 32, dtype=torch.float16)
    tables, lengths = block_tables([1], 2, 16), int32([1])
    assert paged_decode(q[:0], *cache.planes, tables[:0], lengths[:0], scale=1.0, **cache.layout).shape == (0, 1, 32)
    with pytest.raises(ValueError, match="scratch"):
        paged_decode(q, *cache.planes, tables, lengths, scale=1.0, num_splits=2, **cache.layout)


@LAYOUTS
@pytest.mark.parametrize("num_splits", [1, 4])
def test_the_highest_block_of_a_pool_above_4_gib(num_splits: int, shuffled: bool) -> None:
    block_size, heads, head_dim, top = (16, 8, 128, 40) if NATIVE else (16, 2, 64, 20)
    small = random_cache(top, block_size, heads, head_dim, dtype=torch.float16, shuffled=shuffled)
    planes = end_of_a_pool_above_4_gib(*small.planes)
    lengths = [1, 200, 16 * top]
    tables = block_tables(lengths, top, block_size)
    q = normal(5, 3, 4 * heads, head_dim, dtype=torch.float16)
    want = expected(q, small, tables, lengths, scale=0.1)
    got = paged_decode(
        q, *planes, tables + (len(planes[0]) - top), int32(lengths), scale=0.1, num_splits=num_splits,
        scratch=DecodeScratch.allocate([(3, num_splits)], 4 * heads, head_dim, DEVICE), **small.layout,
    )  # fmt: skip
    close(got, want, torch.float16)
