"""The Triton prefill and extend kernel against attention in float64, in both layouts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
    every_other,
    int32,
    normal,
    random_cache,
    starts_and_lengths,
)

from miniserve.attention.backends.torch_mla import dense_attention
from miniserve.kernels.triton.paged_extend import paged_extend
from miniserve.kernels.triton.small_linear import chip_of

# (context, new tokens) of each request: a one-token request, block boundaries, a prefill, an empty one.
REQUESTS = [(0, 1), (15, 1), (16, 17), (0, 33), (5, 0), (70, 40)]


def check(
    cache: Cache, num_heads: int, requests: list[tuple[int, int]], dtype: torch.dtype, *, scale: float = 0.125,
    extend: Callable[..., torch.Tensor] = paged_extend, **options: Any,
) -> None:  # fmt: skip
    head_dim = cache.k.shape[3]
    starts, lengths = starts_and_lengths(requests)
    q = normal(5, starts[-1], num_heads + 1, head_dim, dtype=dtype)[:, 1:]
    tables = block_tables(lengths, cache.k.shape[0], cache.block_size)
    planes = options.pop("planes", cache.planes)  # which end with the cache's
    got = extend(
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
    check(cache, 2, REQUESTS if NATIVE else REQUESTS[2:], dtype)


@LAYOUTS
@pytest.mark.parametrize("num_splits", [1, 2] if NATIVE else [1])
def test_every_length_around_a_partition_of_256(num_splits: int, shuffled: bool) -> None:
    cache = random_cache(32, 16, 1, 64, dtype=torch.float16, shuffled=shuffled)
    lengths = range(230, 271) if NATIVE else range(246, 266)
    requests = [(length - new, new) for length in lengths for new in (1 + length % 2,)]
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


@every_other("terms,shuffled", [(2, {}), (5, {}), (5, {"softcap": 3.0}), (5, {"window": 20})], [False, True])
def test_programs_that_share_a_tiles_keys(terms: tuple[int, dict[str, Any]], shuffled: bool) -> None:
    num_splits, options = terms
    heads = 2 if NATIVE else 1
    cache = random_cache(24, 16, heads, 80, dtype=torch.float16, shuffled=shuffled)
    sinks = 3 * normal(9, 3 * heads)
    requests = REQUESTS if NATIVE else [(0, 1), (16, 17), (70, 9)]  # the interpreter takes seconds for all of them
    check(cache, 3 * heads, requests, torch.float16, num_splits=num_splits, launch=SMALL, sinks=sinks, **options)


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


def hopper(*tensors: torch.Tensor, num_kv_heads: int, block_size: int, shuffled: bool, **options: Any) -> torch.Tensor:
    from miniserve.kernels.triton.hopper_extend import can_extend, hopper_extend

    assert can_extend(tensors[0], tensors[1], 64)
    assert (tensors[1].shape[1:3], shuffled) == ((block_size, num_kv_heads), False)
    return hopper_extend(*tensors, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE or not chip_of(DEVICE).wgmma, reason="needs a Hopper GPU, whose matrix units it uses")
@pytest.mark.parametrize(
    ("group", "block_size", "head_dim", "dtype"),
    [
        (1, 16, 64, torch.float16),
        (4, 16, 128, torch.bfloat16),
        (5, 8, 128, torch.float16),
        (8, 64, 64, torch.bfloat16),
        (64, 256, 128, torch.bfloat16),
    ],
)
def test_hopper_extend(group: int, block_size: int, head_dim: int, dtype: torch.dtype) -> None:
    cache = random_cache(6144 // block_size, block_size, 2, head_dim, dtype=dtype, shuffled=False)
    options: dict[str, Any] = {"scale": head_dim**-0.5, "extend": hopper}
    requests = [*REQUESTS, (0, 128), (100, 28), (0, 127), (3, 126), (1000, 300), (511, 513)]
    check(cache, 2 * group, requests, dtype, **options)
    check(cache, 2 * group, requests, dtype, sinks=3 * normal(9, 2 * group), **options)
    for window in (1, 100, 128, 700):
        check(cache, 2 * group, requests, dtype, window=window, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE or not chip_of(DEVICE).wgmma, reason="needs a Hopper GPU, whose matrix units it uses")
def test_hopper_extend_reads_nothing_into_what_no_query_sees() -> None:
    cache = random_cache(64, 16, 2, 128, dtype=torch.bfloat16, shuffled=False)
    for context, new in [(5, 200), (0, 37), (0, 1), (100, 157)]:
        last, offset = divmod(context + new, 16)
        planes = [plane.clone() for plane in cache.planes]
        for plane in planes:
            plane[block_tables([context + new], 64, 16)[0, last].long(), offset:] = float("nan")
        check(cache, 8, [(context, new)], torch.bfloat16, planes=planes, extend=hopper)
    window, context, new = 150, 500, 40  # the first query sees keys from 351 on
    planes = [plane.clone() for plane in cache.planes]
    for plane in planes:
        plane[block_tables([context + new], 64, 16)[0, : 351 // 16].long()] = float("nan")
    check(cache, 8, [(context, new)], torch.bfloat16, planes=planes, extend=hopper, window=window)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE or not chip_of(DEVICE).wgmma, reason="needs a Hopper GPU, whose matrix units it uses")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_hopper_dense(causal: bool, dtype: torch.dtype) -> None:
    from miniserve.kernels.triton.hopper_extend import can_attend_dense, hopper_dense

    heads, queries = 3, [1, 200, 64, 129, 700]
    keys = queries if causal else [1, 3, 384, 1000, 127]
    starts, key_starts = ([0, *itertools.accumulate(lens)] for lens in (queries, keys))
    q, kv = normal(1, starts[-1], heads, 192, dtype=dtype), normal(2, key_starts[-1], heads, 256, dtype=dtype)
    k_nope, v, k_pe = kv[..., :128], kv[..., 128:], normal(3, key_starts[-1], 576, dtype=dtype)[:, 512:]
    v[key_starts[2]] = float("inf")  # the third row's first, in the last tile of the first two
    assert can_attend_dense(q, k_nope, k_pe, v)
    out, lse = hopper_dense(
        q, k_nope, k_pe, v, int32(starts), int32(key_starts), max(queries), scale=0.07, causal=causal
    )
    whole = torch.cat([k_nope, k_pe[:, None].expand(-1, heads, -1)], dim=-1)
    for row in (0, 1, 3, 4):
        span, seen = slice(*starts[row : row + 2]), slice(*key_starts[row : row + 2])
        want, sums = dense_attention(q[span].double(), whole[seen].double(), v[seen].double(), 0.07, causal=causal)
        close(out[span], want.double(), dtype)
        assert float((lse[:, span] - sums).abs().max()) < 1e-2


def test_no_requests() -> None:
    cache = random_cache(2, 16, 1, 32, dtype=torch.float16, shuffled=False)
    q, none = normal(5, 0, 1, 32, dtype=torch.float16), int32([])
    out = paged_extend(
        q, *cache.planes, block_tables([1], 2, 16)[:0], int32([0]), none, max_query_len=0, scale=1.0, **cache.layout
    )
    assert out.shape == (0, 1, 32)
