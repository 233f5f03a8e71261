"""Decode attention that norms, rotates and writes its rows' own tokens, against the same in two launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import (
    DEVICE,
    DTYPES,
    FP8,
    LAYOUTS,
    Cache,
    close,
    end_of_a_pool_above_4_gib,
    int32,
    normal,
    on_gpu,
    random_cache,
    relative_error,
)

from miniserve.kernels.triton.cache_write import rope_and_write, write_kv
from miniserve.kernels.triton.launch import Launch
from miniserve.kernels.triton.paged_decode import paged_decode
from miniserve.kernels.triton.split_kv import DecodeScratch

LENGTHS = [1, 0, 16, 97, 64]  # of 1 and 97 the last tile has nothing but the row's own token
SMALL = Launch(block_m=16, block_n=32, num_warps=4, num_stages=2)
# A sum's order may tip a rounding; an element that was written by mistake, or not at all, is further off.
_CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3, FP8: 2e-2}


def check(
    cache: Cache, heads: int, lengths: list[int], dtype: torch.dtype, *, normed: bool = True, **options: Any
) -> None:
    """The result and what changes in the cache are those of `rope_and_write` and `paged_decode`."""
    num_blocks, block_size, kv_heads, head_dim = cache.k.shape
    width = -(-max(lengths) // block_size)
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(3))[: len(lengths) * width]
    tables = (len(cache.planes[0]) - num_blocks + blocks.view(len(lengths), width)).int()  # no two rows share a block
    slots = torch.tensor(
        [int(table[(n - 1) // block_size]) * block_size + (n - 1) % block_size if n else -1
         for table, n in zip(tables, lengths, strict=True)], device=DEVICE,
    )  # fmt: skip
    qkv = normal(5, len(lengths), heads + 2 * kv_heads + 1, head_dim, dtype=dtype)[:, :-1]  # rows are strided
    angle = 3 * normal(6, len(lengths), head_dim // 2)
    cos_sin = torch.cat((angle.cos(), angle.sin()), dim=-1)
    q_weight, k_weight = (1 + normal(seed, head_dim, dtype=dtype) / 4 if normed else None for seed in (7, 8))
    num_splits, scales = options.pop("num_splits", 1), {name: options.get(name) for name in ("k_scale", "v_scale")}
    scratch = DecodeScratch.allocate([(len(lengths), num_splits)], heads, head_dim, DEVICE)
    rows, attention = (tables.to(DEVICE), int32(lengths)), {"scale": 0.125, **cache.layout, **options}

    before = [plane[-num_blocks:].clone() for plane in cache.planes]
    q = rope_and_write(
        qkv.flatten(1), cos_sin, q_weight, k_weight, 1e-6, *cache.planes, slots, num_heads=heads, head_dim=head_dim,
        **cache.layout, **scales,
    )  # fmt: skip
    want = paged_decode(q, *cache.planes, *rows, **attention)
    written = [plane[-num_blocks:].clone() for plane in cache.planes]
    for _ in range(2 if num_splits > 1 else 1):  # the second time finds the scratch as the first left it
        nothing = torch.full_like(q[:, :kv_heads], torch.nan)
        write_kv(nothing, nothing, *cache.planes, slots, block_size=block_size, shuffled=cache.shuffled, **scales)
        got = paged_decode(
            qkv, *cache.planes, *rows, cos_sin=cos_sin, q_weight=q_weight, k_weight=k_weight, eps=1e-6,
            num_splits=num_splits, scratch=scratch, out=torch.full_like(want, torch.nan), **attention,
        )  # fmt: skip
        close(got, want.double(), dtype)
        for plane, was, now in zip(cache.planes, before, written, strict=True):
            change = plane[-num_blocks:].double() - was.double()
            assert relative_error(change, now.double() - was.double()) < _CLOSE[plane.dtype]
    assert not scratch.arrivals.any()


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_splits", "fused"), [(1, None), (3, True), (3, False)])
def test_ragged_rows(num_splits: int, fused: bool | None, dtype: torch.dtype, shuffled: bool) -> None:
    cache = random_cache(35, 16, 2, 32, dtype=dtype, shuffled=shuffled)
    check(cache, 6, LENGTHS, dtype, num_splits=num_splits, fused_merge=fused, launch=SMALL)


@LAYOUTS
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
def test_head_dims(head_dim: int, shuffled: bool) -> None:
    cache = random_cache(8, 16, 1, head_dim, dtype=torch.float16, shuffled=shuffled)
    check(cache, 4, [50, 3], torch.float16)


def test_a_head_dim_that_only_the_linear_layout_takes_in_float32() -> None:
    check(random_cache(4, 16, 1, 36, dtype=torch.float32, shuffled=False), 2, [20, 3], torch.float32)


@LAYOUTS
@pytest.mark.parametrize("group", [1, 71])
def test_group_sizes(group: int, shuffled: bool) -> None:
    cache = random_cache(4, 16, 2, 32, dtype=torch.float16, shuffled=shuffled)
    check(cache, 2 * group, [20, 1], torch.float16, normed=False)


@LAYOUTS
def test_a_block_size_that_is_no_power_of_two(shuffled: bool) -> None:
    cache = random_cache(12, 48, 1, 32, dtype=torch.float16, shuffled=shuffled)
    check(cache, 2, [47, 48, 49, 103], torch.float16, launch=SMALL)


@LAYOUTS
@pytest.mark.parametrize("window", [1, 33])
def test_windows(window: int, shuffled: bool) -> None:
    cache = random_cache(35, 16, 1, 32, dtype=torch.float16, shuffled=shuffled)
    check(cache, 2, LENGTHS, torch.float16, window=window, num_splits=2, launch=SMALL)


@LAYOUTS
def test_softcap_and_sinks(shuffled: bool) -> None:
    cache = random_cache(21, 16, 1, 32, dtype=torch.float32, shuffled=shuffled)
    options: dict[str, Any] = {"num_splits": 2, "launch": SMALL}
    check(cache, 3, [1, 0, 97], torch.float32, softcap=3.0, **options)
    check(cache, 3, [1, 0, 97], torch.float32, sinks=3 * normal(9, 3), window=40, **options)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)])
def test_fp8_cache(dtype: torch.dtype, shuffled: bool) -> None:
    """What the own token's key and value lose in the cache, they lose at once."""
    cache = random_cache(21, 16, 2, 64, dtype=FP8, shuffled=shuffled)
    scales = {"k_scale": torch.tensor([0.5], device=DEVICE), "v_scale": torch.tensor([0.004], device=DEVICE)}
    check(cache, 6, [1, 0, 97], dtype, num_splits=2, launch=SMALL, **scales)


@LAYOUTS
def test_the_highest_block_of_a_pool_above_4_gib(shuffled: bool) -> None:
    small = random_cache(8, 16, 2, 128, dtype=torch.float16, shuffled=shuffled)
    key, value = end_of_a_pool_above_4_gib(*small.planes)
    check(Cache((key, value), small.k, small.v, 16, shuffled), 4, [1, 50], torch.float16)
