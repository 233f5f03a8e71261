"""aiter's HIP/ASM switch mirrored, table by table."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.routes import (
    aiter_route,
    asm_possible,
    common_route,
    describe_chunks,
    describe_decode,
    fuses_rope,
    has_wrong_length,
    high_precision,
    kv_cache_dtype,
    window_pair,
)
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import LayerRoute

MI300X, MI355X = NAMED_PLATFORMS["mi300x"], NAMED_PLATFORMS["mi355x"]


@pytest.mark.parametrize(
    ("rows", "heads", "head_dim", "compute_units", "route"),
    [
        (38, 16, 128, 304, "hip"),  # 608 is not above 608
        (39, 16, 128, 304, "asm"),
        (64, 16, 128, 304, "asm"),
        (32, 16, 128, 256, "hip"),
        (33, 16, 128, 256, "asm"),
        (1, 609, 128, 304, "asm"),
        (512, 64, 64, 304, "hip"),
        (512, 64, 256, 304, "hip"),
        (512, 64, 192, 256, "hip"),
    ],
)
def test_the_switch_counts_rows_times_heads(
    rows: int, heads: int, head_dim: int, compute_units: int, route: str
) -> None:
    assert aiter_route(rows, heads, head_dim, compute_units) == route


@pytest.mark.parametrize(
    ("group", "fp8", "wrong_length", "route"),
    [
        (8, False, False, "asm"),
        (8, False, True, "hip"),
        (16, False, False, "asm"),
        (17, False, False, "hip"),
        (8, True, False, "asm"),
        (9, True, False, "hip"),  # only the precision that loses short contexts has a kernel for it
        (8, True, True, "hip"),
    ],
)
def test_the_asm_kernel_is_kept_from_what_it_gets_wrong(group: int, fp8: bool, wrong_length: bool, route: str) -> None:
    got = common_route(64, 32, 128, 304, group=group, fp8_kv=fp8, any_wrong_length=wrong_length)
    assert got == route
    assert asm_possible(group, fp8) or got == "hip"


def test_wrong_lengths_are_those_of_one_tile_that_is_not_full() -> None:
    wrong = [length for length in range(1, 600) if has_wrong_length(np.array([length]))]
    assert wrong == list(range(241, 256))
    assert has_wrong_length(np.array([1, 300, 250]))
    assert not has_wrong_length(np.array([1, 300, 256]))
    assert has_wrong_length(None), "a captured step may meet any length"


def test_high_precision_forces_asm_only_where_it_is_meant() -> None:
    assert [high_precision(route, fp8) for route in ("asm", "hip") for fp8 in (False, True)] == [1, 2, 1, 1]  # type: ignore[arg-type]


def test_the_switch_is_told_in_batches() -> None:
    spec = AttentionSpec(16, 8, 128, 128**-0.5, torch.bfloat16, torch.bfloat16)
    assert "from batch 39 (39 x 16 heads > 608) ASM, below HIP" in describe_decode(
        "paged_attention_common", spec, MI300X
    )
    assert "from batch 33 (33 x 16 heads > 512) ASM" in describe_decode("paged_attention_common", spec, MI355X)
    assert describe_decode("paged_attention_rocm", spec, MI300X).endswith("HIP at any batch")
    many = AttentionSpec(64, 4, 128, 128**-0.5, torch.bfloat16, torch.float8_e4m3fn)
    assert "HIP at any batch" in describe_decode("paged_attention_common", many, MI355X)


def test_who_writes_is_told() -> None:
    routes = [LayerRoute("", "E", "P", write) for write in ("triton rope_and_write", "reshape_and_cache", "")]
    assert [describe_chunks(route) for route in routes] == [
        "prefill by P, with context E; rope with cache write by triton rope_and_write",
        "prefill by P, with context E; cache write by reshape_and_cache",
        "prefill by P, with context E",
    ]
    assert [fuses_rope([routes[0], route]) for route in routes] == [True, False, False]


def test_windows_and_dtypes_as_aiter_takes_them() -> None:
    assert [window_pair(window) for window in (None, 1, 128)] == [(-1, -1), (0, 0), (127, 0)]
    dtypes = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    assert [kv_cache_dtype(dtype) for dtype in dtypes] == ["auto", "auto", "fp8", "fp8"]
