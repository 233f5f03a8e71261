"""The Triton prefill and extend kernel against attention in float64, in both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
    int32,
    normal,
    random_cache,
    starts_and_lengths,
)

from miniserve.kernels.triton.paged_extend import paged_extend

# (context, new tokens) of each request: a one-token request, block boundaries, a prefill, an empty one.
REQUESTS = [(0, 1), (15, 1), (16, 17), (0, 33), (5, 0), (70, 40)]


def check(
    cache: Cache, num_heads: int, requests: list[tuple[int, int]], dtype: torch.dtype, *, scale: float = 0.125,
    **options: Any,
) -> None:  # fmt: skip
    head_dim = cache.k.shape[3]
    starts, lengths = starts_and_lengths(requests)
    q = normal(5, starts[-1], num_heads + 1, head_dim, dtype=dtype)[:, 1:]
    tables = block_tables(lengths, cache.k.shape[0], cache.block_size)
    planes = options.pop("planes", cache.planes)  # which end with the cache's
    got = paged_extend(
        q, *planes, tables + (len(planes[0]) - len(cache.planes[0])), int32(starts), int32(lengths),
        max_query_len=max(new for _, new in requests) + 3,
        scale=scale, out=torch.full_like(q, float("nan")), **cache.layout, **options,
    )  # fmt: skip
    formula = {name: options[name] for name in ("window", "softcap", "sinks") if name in options}
    for row, (start, (_, new)) in enumerate(zip(starts, requests, strict=False)):
        k, v = (cached(plane, tables, row, lengths[row]) for plane in (cache.k, cache.v))
        close(got[start : start + new], attend(q[start : start + new], k, v, scale, **formula), dtype) if new else None


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_requests(dtype: torch.dtype, shuffled: bool) -> None:
    cache = random_cache(24, 16, 2, 64, dtype=dtype, shuffled=shuffled)
    check(cache, 6, REQUESTS, dtype, launch=SMALL)
    check(cache, 2, REQUESTS, dtype)


@LAYOUTS
@pytest.mark.parametrize("num_splits", [1, 2] if NATIVE else [1])
def test_every_length_around_a_partition_of_256(num_splits: int, shuffled: bool) -> None:
    cache = random_cache(32, 16, 1, 64, dtype=torch.float16, shuffled=shuffled)
    requests = [(length - new, new) for length in range(230, 271) for new in (1 + length % 2,)]
    check(cache, 1, [*requests, (0, 256), (0, 255)], torch.float16, num_splits=num_splits)


@LAYOUTS
def test_the_highest_block_of_a_pool_above_4_gib(shuffled: bool) -> None:
    cache = random_cache(8, 16, 8, 128, dtype=torch.float16, shuffled=shuffled)
    check(cache, 16, [(0, 1), (50, 4), (100, 28)], torch.float16, planes=end_of_a_pool_above_4_gib(*cache.planes))


@LAYOUTS
@pytest.mark.parametrize("window", [1, 20, 70])
def test_windows(window: int, shuffled: bool) -> None:
    cache = random_cache(24, 16, 1, 32, dtype=torch.float16, shuffled=shuffled)
    check(cache, 3, REQUESTS, torch.float16, window=window, launch=SMALL)


@LAYOUTS
def test_softcap_sinks_and_scale(shuffled: bool) -> None:
    cache = random_cache(24, 16, 2, 32, dtype=torch.float32, shuffled=shuffled)
    options: dict[str, Any] = {"launch": SMALL, "scale": 0.7}
    requests = [(0, 20), (33, 5)]
    check(cache, 4, requests, torch.float32, softcap=3.0, **options)
    check(cache, 4, requests, torch.float32, sinks=3 * normal(9, 4), **options)
    check(cache, 4, requests, torch.float32, sinks=3 * normal(9, 4), softcap=20.0, window=17, **options)


@LAYOUTS
@pytest.mark.parametrize(
    ("num_splits", "options"), [(2, {}), (5, {}), (5, {"window": 20}), (5, {"softcap": 3.0})], ids=str
)
def test_programs_that_share_a_tiles_keys(num_splits: int, options: dict[str, Any], shuffled: bool) -> None:
    cache = random_cache(24, 16, 2, 80, dtype=torch.float16, shuffled=shuffled)
    sinks = 3 * normal(9, 6)
    requests = REQUESTS if NATIVE else REQUESTS[::2] + REQUESTS[-1:]  # the interpreter takes seconds for all of them
    check(cache, 6, requests, torch.float16, num_splits=num_splits, launch=SMALL, sinks=sinks, **options)


@LAYOUTS
@pytest.mark.parametrize(("head_dim", "group", "block_size"), [(80, 5, 32), (112, 1, 64), (256, 16, 16), (192, 3, 48)])
def test_shapes(head_dim: int, group: int, block_size: int, shuffled: bool) -> None:
    cache = random_cache(8, block_size, 1, head_dim, dtype=torch.float16, shuffled=shuffled)
    check(cache, group, [(0, 9), (block_size + 1, 4)], torch.float16, scale=0.06)


@LAYOUTS
@pytest.mark.parametrize("dtype", HALVES)
def test_fp8_cache(dtype: torch.dtype, shuffled: bool) -> None:
    cache = random_cache(24, 16, 2, 64, dtype=FP8, shuffled=shuffled)
    k_scale, v_scale = torch.tensor([0.5], device=DEVICE), torch.tensor([3.0], device=DEVICE)
    scaled = Cache(cache.planes, cache.k * 0.5, cache.v * 3.0, 16, shuffled)
    check(scaled, 4, [(0, 20), (33, 5)], dtype, k_scale=k_scale, v_scale=v_scale)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="needs a GPU: too much for the interpreter")
@LAYOUTS
@pytest.mark.parametrize("window", [None, 500])
def test_long_chunks(window: int | None, shuffled: bool) -> None:
    cache = random_cache(512, 16, 8, 128, dtype=torch.bfloat16, shuffled=shuffled)
    options: dict[str, Any] = {} if window is None else {"window": window}
    for num_splits in (1, 4):
        requests = [(0, 2048), (3000, 700), (4000, 3)]
        check(cache, 32, requests, torch.bfloat16, scale=128**-0.5, num_splits=num_splits, **options)


def test_no_requests() -> None:
    cache = random_cache(2, 16, 1, 32, dtype=torch.float16, shuffled=False)
    q, none = normal(5, 0, 1, 32, dtype=torch.float16), int32([])
    out = paged_extend(
        q, *cache.planes, block_tables([1], 2, 16)[:0], int32([0]), none, max_query_len=0, scale=1.0, **cache.layout
    )
    assert out.shape == (0, 1, 32)
