"""aiter's HIP/ASM switch mirrored, table by table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from miniserve.attention.metadata import QueryRows, decode_rows
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.routes import (
    describe_decode,
    describe_route,
    fuses_rope,
    has_wrong_length,
    kv_cache_dtype,
    least_asm_rows,
    window_pair,
)
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import LayerRoute

MI300X, MI355X = NAMED_PLATFORMS["mi300x"], NAMED_PLATFORMS["mi355x"]


@pytest.mark.parametrize(
    ("heads", "head_dim", "compute_units", "least"),
    [
        (16, 128, 304, 39),  # 608 is not above 608
        (16, 128, 256, 33),
        (64, 128, 304, 10),
        (608, 128, 304, 2),
        (609, 128, 304, 1),
        (64, 64, 304, None),
        (64, 256, 304, None),
        (64, 192, 256, None),
    ],
)
def test_the_switch_counts_rows_times_heads(heads: int, head_dim: int, compute_units: int, least: int | None) -> None:
    spec = AttentionSpec(heads, heads, head_dim, 0.1, torch.bfloat16, torch.bfloat16)
    assert least_asm_rows(spec, compute_units) == least


@pytest.mark.parametrize(
    ("group", "kv_dtype", "trusted"),
    [
        (8, torch.bfloat16, True),
        (16, torch.bfloat16, True),
        (17, torch.bfloat16, False),
        (8, torch.float8_e4m3fn, True),
        (9, torch.float8_e4m3fn, False),  # only the precision that loses short contexts has a kernel for it
    ],
)
def test_the_asm_kernel_is_kept_from_what_it_gets_wrong(group: int, kv_dtype: torch.dtype, trusted: bool) -> None:
    spec = AttentionSpec(2 * group, 2, 128, 0.1, torch.bfloat16, kv_dtype)
    assert (least_asm_rows(spec, 304) is not None) == trusted


def test_wrong_lengths_are_those_of_one_tile_that_is_not_full() -> None:
    wrong = [length for length in range(1, 600) if has_wrong_length(rows_of([length]))]
    assert wrong == list(range(241, 256))
    assert has_wrong_length(rows_of([1, 300, 250]))
    assert not has_wrong_length(rows_of([1, 300, 256]))
    captured = [replace(rows_of([1]), host_seq_lens=None, max_seq_len=longest) for longest in (240, 241, 4096)]
    assert [has_wrong_length(rows) for rows in captured] == [False, True, True], (
        "it may meet any length up to the longest"
    )


def rows_of(lens: list[int]) -> QueryRows:
    return decode_rows(torch.empty(0), torch.tensor(lens), max(lens), np.array(lens))


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
    spec = AttentionSpec(16, 8, 128, 128**-0.5, torch.bfloat16, torch.bfloat16)
    routes = [LayerRoute("D", "P", write) for write in ("triton rope_and_write", "triton write_kv", "")]
    assert [describe_route(route, spec, MI300X) for route in routes] == [
        "decode by D; prefill by P; rope with cache write by triton rope_and_write",
        "decode by D; prefill by P; cache write by triton write_kv",
        "decode by D; prefill by P",
    ]
    assert [fuses_rope([routes[0], route]) for route in routes] == [True, False, False]


def test_windows_and_dtypes_as_aiter_takes_them() -> None:
    assert [window_pair(window) for window in (None, 1, 128)] == [(-1, -1), (0, 0), (127, 0)]
    dtypes = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    assert [kv_cache_dtype(dtype) for dtype in dtypes] == ["auto", "auto", "fp8", "fp8"]
