"""Decode over pages: the numbers against a formula written out, each refusal, each reproduced fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from aiter_naive import Paged, attend, error, paged, plane
from aiter_standin import installed

from miniserve.attention.formula import attention_by_formula

LENS = [1, 15, 16, 17, 240, 256, 257, 300]
ONE = torch.ones(1)


@pytest.fixture(scope="module")
def aiter() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def want(step: Paged, scale: float, **options: Any) -> torch.Tensor:
    return torch.cat([attend(step.q[i : i + 1], *step.tokens(i), scale, **options) for i in range(len(step.lens))])


def v1(aiter: ModuleType, step: Paged, layout: str = "linear", **changes: Any) -> torch.Tensor:
    longest = int(step.lens.max())
    size = step.q.shape[0] * step.q.shape[1] * math.ceil(longest / 256) * (step.q.shape[2] * 2 + 8)
    arguments = {
        "out": torch.zeros_like(step.q),
        "workspace_buffer": torch.zeros(size, dtype=torch.uint8),
        "query": step.q,
        "key_cache": plane(layout, step.k),
        "value_cache": plane(layout, step.v),
        "scale": 0.3,
        "block_tables": step.tables,
        "cu_query_lens": None,
        "context_lens": step.lens,
        "max_context_len": longest,
        "alibi_slopes": None,
        "kv_cache_dtype": "auto" if step.k.element_size() == 2 else "fp8",
        "kv_cache_layout": "HND" if layout == "hnd" else "NHD",
        "logits_soft_cap": 0.0,
        "k_scale": ONE,
        "v_scale": ONE,
    }
    return aiter.paged_attention_v1(**(arguments | changes))


def rocm(aiter: ModuleType, step: Paged, value: str = "shuffled", **changes: Any) -> torch.Tensor:
    arguments = step.scratch | {
        "out": torch.zeros_like(step.q),
        "query": step.q,
        "key_cache": plane("packed", step.k),
        "value_cache": plane(value, step.v),
        "num_kv_heads": step.k.shape[2],
        "scale": 0.3,
        "block_tables": step.tables,
        "context_lens": step.lens,
        "block_size": step.k.shape[1],
        "max_context_len": int(step.lens.max()),
        "alibi_slopes": None,
        "kv_cache_dtype": "auto" if step.k.element_size() == 2 else "fp8",
        "k_scale": ONE,
        "v_scale": ONE,
    }
    return aiter.paged_attention_rocm(**(arguments | changes))


def common(aiter: ModuleType, step: Paged, **changes: Any) -> torch.Tensor:
    arguments = step.scratch | {
        "Q": step.q,
        "K": plane("packed", step.k),
        "V": plane("shuffled", step.v),
        "block_tables": step.tables,
        "context_lens": step.lens,
        "block_tables_stride0": step.tables.stride(0),
        "scale": step.q.shape[2] ** -0.5,
        "max_seq_len": int(step.lens.max()),
        "K_QScale_hip": ONE,
        "V_QScale_hip": ONE,
        "kv_cache_dtype": "auto" if step.k.element_size() == 2 else "fp8",
    }
    return aiter.paged_attention_common(**(arguments | changes))


def asm(aiter: ModuleType, step: Paged, **changes: Any) -> torch.Tensor:
    arguments = {
        "Q": step.q,
        "K": plane("packed", step.k),
        "V": plane("shuffled", step.v),
        "block_tables": step.tables,
        "context_lens": step.lens,
        "block_tables_stride0": step.tables.stride(0),
    }
    return aiter.pa_fwd_asm(**(arguments | changes))


def gluon(aiter: ModuleType, step: Paged, **changes: Any) -> torch.Tensor:
    arguments = {
        "output": torch.zeros_like(step.q),
        "query": step.q,
        "key_cache": plane("packed", step.k),
        "value_cache": plane("shuffled", step.v),
        "context_lengths": step.lens,
        "block_tables": step.tables,
        "softmax_scale": 0.3,
        "query_length": 1,
        "max_context_partition_num": 2,
    } | changes
    aiter.pa_decode_gluon(**arguments)
    return arguments["output"]


def test_v1_options(aiter: ModuleType) -> None:
    step, slopes = paged(LENS), torch.tensor([0.5, 0.25, 0.1, 0.05])
    for layout, given, options in (
        ("linear", {}, {}),
        ("hnd", {}, {}),
        ("linear", {"sliding_window": 5}, {"window": 5}),
        ("linear", {"logits_soft_cap": 2.0, "alibi_slopes": slopes}, {"softcap": 2.0, "alibi": slopes}),
    ):
        assert error(v1(aiter, step, layout, **given), want(step, 0.3, **options)) < 5e-3


def multiplied_in_fp8(step: Paged, row: int, scale: float) -> torch.Tensor:
    """As the engine's self-check says that these kernels compute."""
    k, v = step.tokens(row)
    visible = torch.ones(1, len(k), dtype=torch.bool)
    terms = {"scale": scale, "softcap": None, "sinks": None}
    return attention_by_formula(step.q[row : row + 1], k, v, visible, **terms, fp8=step.k.dtype)


def test_nan_beyond_a_length_spreads(aiter: ModuleType) -> None:
    """In a row's last block alone, and from values alone."""
    step = paged([17, 40])
    last = int(step.tables[0, 17 // step.k.shape[1]])
    for cache, spreads in ((step.k, False), (step.v, True)):
        before = cache[last, -1].clone()
        cache[last, -1] = math.nan
        for got in (v1(aiter, step), rocm(aiter, step)):
            assert [bool(row.isnan().any()) for row in got] == [spreads, False]
        cache[last, -1] = before


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_fp8_is_the_archs_own_and_takes_its_scale(aiter: ModuleType, arch: str) -> None:
    with aiter._standin.emulate(arch=arch):
        step = paged([17, 257, 600], kv_dtype=aiter.dtypes.fp8)
        expected = torch.cat([multiplied_in_fp8(step, row, 0.3 * 0.5) for row in range(3)]) * 2.0
        assert error(expected, want(step, 0.3 * 0.5) * 2.0) > 4e-2
        scales = {"k_scale": torch.tensor([0.5]), "v_scale": torch.tensor([2.0])}
        for got in (v1(aiter, step, **scales), rocm(aiter, step, **scales)):
            assert error(got, expected) < 5e-3
    with aiter._standin.emulate(arch="gfx950" if arch == "gfx942" else "gfx942"):
        for call in (v1, rocm):
            with pytest.raises(aiter._standin.ContractViolation, match="fp8 on"):
                call(aiter, step)


def test_v1_skips_longer_queries_and_poisons_their_rows(aiter: ModuleType) -> None:
    step = paged([40, 40, 40])
    rows = torch.cat([step.q[:1], step.q[1:2].expand(3, -1, -1), step.q[2:]])
    starts = torch.tensor([0, 1, 4, 5], dtype=torch.int32)
    out = v1(aiter, step, query=rows, out=torch.zeros_like(rows), cu_query_lens=starts[:3])  # a view: storage goes on
    assert out[1:4].isnan().all()
    assert error(out[[0, 4]], want(step, 0.3)[[0, 2]]) < 5e-3
    with pytest.raises(aiter._standin.ContractViolation, match="without a query"):
        v1(aiter, step, cu_query_lens=torch.tensor([0, 1, 1, 2], dtype=torch.int32))


@pytest.mark.parametrize("value", ["v0", "shuffled"])
@pytest.mark.parametrize(("dim", "block_size", "dtype"), [(64, 16, torch.float16), (128, 48, torch.bfloat16)])
def test_rocm_values_of_either_kind(
    aiter: ModuleType, value: str, dim: int, block_size: int, dtype: torch.dtype
) -> None:
    step = paged([1, 47, 48, 257], dim=dim, block_size=block_size, dtype=dtype)
    scratch = step.scratch
    assert error(rocm(aiter, step, value, **scratch), want(step, 0.3)) < 5e-3
    assert all(t.isnan().all() for t in scratch.values())


V1_REFUSALS: list[tuple[Callable[[], Paged], dict[str, Any], type[Exception], str]] = [
    (lambda: paged([9], dim=32), {}, AssertionError, "head_dim 32"),
    (lambda: paged([9], dim=96), {}, AssertionError, "head_dim 96"),
    (lambda: paged([9], heads=34), {}, AssertionError, "17 query heads"),
    (lambda: paged([9], block_size=24), {}, AssertionError, "block size 24"),
    (lambda: paged([9], block_size=64), {}, RuntimeError, "BLOCK_SIZE <= 32"),
    (lambda: paged([9], dtype=torch.float32), {}, ValueError, "Unsupported data type"),
    (lambda: paged([40]), {"max_context_len": 8}, AssertionError, "exceeds max_context_len"),
    (lambda: paged([40]), {"max_context_len": 99}, ValueError, "block_tables.size"),
    (lambda: paged([40]), {"workspace_buffer": torch.zeros(9)}, ValueError, "workspace_buffer is too small"),
    (lambda: paged([40]), {"context_lens": torch.tensor([40, 1])}, ValueError, "must match"),
    (lambda: paged([40]), {"context_lens": torch.tensor([40])}, AssertionError, "context_lens must be int32"),
    (lambda: paged([40]), {"kv_cache_dtype": "fp8_e5m2"}, ValueError, "Unsupported kv_cache_dtype"),
    (lambda: paged([40]), {"kv_cache_dtype": "fp8"}, AssertionError, "fp8 on gfx942"),
    (lambda: paged([40]), {"k_scale": None}, AssertionError, "even for 'auto'"),
    (lambda: paged([40]), {"query": torch.zeros(1, 4, 256)[..., :128].bfloat16()}, AssertionError, "workspace|dense"),
    (
        lambda: paged([9]),
        {"block_tables": torch.tensor([[77]], dtype=torch.int32)},
        AssertionError,
        "outside the cache",
    ),
]


@pytest.mark.parametrize(("step", "changes", "error_class", "words"), V1_REFUSALS)
def test_v1_refusals(
    aiter: ModuleType, step: Callable[[], Paged], changes: dict[str, Any], error_class: type[Exception], words: str
) -> None:
    if "query" in changes:
        changes = {"query": torch.zeros(1, 4, 256).bfloat16()[..., :128]}
    with pytest.raises(error_class, match=words):
        v1(aiter, step(), **changes)


def test_kernels_take_no_stride_of_the_block_table_and_one_for_both_planes(aiter: ModuleType) -> None:
    step = paged([9, 20])
    wide = torch.zeros(2, 9, dtype=torch.int32)
    wide[:, :2] = step.tables[:, :2].clamp(min=0)
    packed, double = plane("shuffled", step.v), plane("linear", step.v).repeat(2, 1, 1, 1)[::2]
    spread = torch.stack([packed, packed], dim=1)[:, 0]
    for call, changes in (
        (v1, {"block_tables": wide[:, :2]}),
        (rocm, {"block_tables": wide[:, :2]}),
        (v1, {"value_cache": double}),
        (rocm, {"value_cache": spread}),
        (asm, {"V": spread}),
    ):
        with pytest.raises(aiter._standin.ContractViolation, match=r"contiguous|strides"):
            call(aiter, step, **changes)


ROCM_REFUSALS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"dim": 192, "kv_dtype": torch.float8_e4m3fnuz}, {}, AssertionError, "head_dim 192"),
    ({"heads": 34}, {}, AssertionError, "17 query heads"),
    ({}, {"exp_sums": torch.zeros(4)}, ValueError, "exp_sums must have shape"),
    ({}, {"tmp_out": torch.zeros(1, 4, 0, 128)}, ValueError, "tmp_out.size.2.=0 is too small"),
    ({}, {"tmp_out": torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16)}, AssertionError, "tmp_out has 128 elements"),
    ({}, {"tmp_out": torch.zeros(1, 4, 1, 128)}, AssertionError, "tmp_out must be torch.bfloat16"),
    ({}, {"block_size": 32}, AssertionError, "block_size 32"),
    ({}, {"k_scale": torch.ones(4 * 16 * 2)}, AssertionError, "one element"),
    ({"kv_dtype": torch.uint8}, {}, KeyError, "uint8"),
]


@pytest.mark.parametrize(("shape", "changes", "error_class", "words"), ROCM_REFUSALS)
def test_rocm_refusals(
    aiter: ModuleType, shape: dict[str, Any], changes: dict[str, Any], error_class: type[Exception], words: str
) -> None:
    kv_dtype = shape.get("kv_dtype")
    step = paged([40], **(shape | {"kv_dtype": None if kv_dtype == torch.uint8 else kv_dtype}))
    if kv_dtype == torch.uint8:
        step = replace(step, k=step.k.to(torch.uint8), v=step.v.to(torch.uint8))
    with pytest.raises(error_class, match=words):
        rocm(aiter, step, **changes)


def test_common_routes_by_rows_times_heads(aiter: ModuleType) -> None:
    step = paged(LENS)
    for heads_per_cu, route in ((16, "hip"), (15, "asm")):  # 8 sequences x 4 heads = 32: over 2 x 15
        with aiter._standin.emulate(cu_num=heads_per_cu) as calls:
            got = common(aiter, step)
            assert [call.route for call in calls] == [route, route]
        assert error(got, want(step, 128**-0.5)) < 5e-3
    with aiter._standin.emulate(cu_num=1) as calls:
        common(aiter, paged(LENS, dim=64))
        assert calls[-1].function == "paged_attention_rocm"
    assert not aiter.ops.attention._should_use_asm_kernel(38, 16, 128, torch.bfloat16, 1)  # 608 is not over 608
    assert aiter.ops.attention._should_use_asm_kernel(39, 16, 128, torch.bfloat16, 1)


def test_asm_ignores_the_scale_that_hip_uses(aiter: ModuleType) -> None:
    step = paged([100, 200])
    with aiter._standin.emulate(cu_num=1):
        assert error(common(aiter, step, scale=0.3), want(step, 128**-0.5)) < 5e-3
    assert error(common(aiter, step, scale=0.3), want(step, 0.3)) < 5e-3


@pytest.mark.parametrize("length", range(238, 259))
def test_asm_counts_its_first_tile_twice_from_241_to_255(aiter: ModuleType, length: int) -> None:
    step = paged([length], heads=2)
    wrong = error(asm(aiter, step), want(step, 128**-0.5))
    assert (wrong > 5e-3) == (241 <= length <= 255)
    with aiter._standin.emulate(tile_bug=False):
        assert error(asm(aiter, step), want(step, 128**-0.5)) < 5e-3


def test_the_twice_counted_tile_reads_stale_slots(aiter: ModuleType) -> None:
    step = paged([241], heads=2)
    k, v = (t[step.tables[0, :16].long()].flatten(0, 1) for t in (step.k, step.v))
    full = torch.cat([k, k[:241]]), torch.cat([v, v[:241]])
    assert error(asm(aiter, step), attend(step.q, *full, 128**-0.5)) < 5e-3


def test_asm_quantised(aiter: ModuleType) -> None:
    step = paged([16, 17, 245], kv_dtype=torch.float8_e4m3fnuz)
    tables = [torch.full((step.k.shape[0], 2, 16), factor) for factor in (0.5, 2.0)]
    scales = {"K_QScale": tables[0], "V_QScale": tables[1]}
    with aiter._standin.emulate(tile_bug=False):
        expected = want(step, 128**-0.5 * 0.5) * 2
        assert error(asm(aiter, step, high_precision=2, **scales), expected) < 5e-3
        assert (asm(aiter, step, **scales) == 0).all()  # precision 1 may pick the kernel that gives 0
    wide = paged([16, 245], heads=32, kv_dtype=torch.float8_e4m3fnuz)
    tables = [torch.ones(wide.k.shape[0], 2, 16)] * 2
    got = asm(aiter, wide, K_QScale=tables[0], V_QScale=tables[1])
    assert (got[0] == 0).all() and got[1].isnan().all()  # GQA 16 has no other kernel
    with pytest.raises(RuntimeError, match=r"cannot get heuristic kernel!.*gqa:16.*hp:2"):
        asm(aiter, wide, high_precision=2, K_QScale=tables[0], V_QScale=tables[1])
    for broken, words in (({"K_QScale": tables[0]}, "both or for neither"), ({}, "both scale tables")):
        with pytest.raises(aiter._standin.ContractViolation, match=words):
            asm(aiter, wide, **broken)


ASM_REFUSALS: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    ({"dim": 64}, {}, RuntimeError, "only supports head_size=128"),
    ({"block_size": 32}, {}, RuntimeError, "cannot get heuristic kernel!.*block_size:32"),
    ({"heads": 34}, {}, RuntimeError, "cannot get heuristic kernel!.*gqa:17"),
    ({"dtype": torch.float16, "kv_dtype": torch.bfloat16}, {}, RuntimeError, "q_type:fp16 kv_type:bf16"),
    ({"dtype": torch.float32}, {}, RuntimeError, "unsupport Q dtype"),
    ({}, {"high_precision": 2}, RuntimeError, "hp:2"),
    ({}, {"max_qlen": 2}, AssertionError, "one query"),
    ({}, {"V": torch.zeros(4, 2, 128, 16, dtype=torch.bfloat16)}, AssertionError, "reads V as"),
    ({}, {"block_tables_stride0": 7}, AssertionError, "block_tables_stride0"),
]


@pytest.mark.parametrize(("shape", "changes", "error_class", "words"), ASM_REFUSALS)
def test_asm_refusals(
    aiter: ModuleType, shape: dict[str, Any], changes: dict[str, Any], error_class: type[Exception], words: str
) -> None:
    with pytest.raises(error_class, match=words):
        asm(aiter, paged([40], **shape), **changes)


def test_asm_of_old_versions_misreads_beyond_two_gib(aiter: ModuleType) -> None:
    huge = torch.empty(65540, 8, 16, 16, 8, dtype=torch.bfloat16)  # 2 GiB of address space, three pages of it touched
    value = huge.view(65540, 8, 2, 128, 8)
    huge[[1, 65536]] = 1.0
    call = {"block_tables_stride0": 1, "context_lens": torch.tensor([3], dtype=torch.int32)}
    for version, block, works in (("0.1.17", 65536, True), ("0.1.16.post2", 65536, False), ("0.1.16", 1, True)):
        table = torch.tensor([[block]], dtype=torch.int32)
        with aiter._standin.emulate(version=version):
            try:
                got = aiter.pa_fwd_asm(torch.ones(1, 8, 128).bfloat16(), huge, value, table, **call)
                assert works and (got == 1.0).all()
            except aiter._standin.ContractViolation as refusal:
                assert not works and "2 GiB" in str(refusal)


def test_gluon_takes_what_the_others_cannot(aiter: ModuleType) -> None:
    step, sinks = paged(LENS), torch.tensor([1.0, -1.0, 3.0, 0.0])
    got = gluon(aiter, step, sinks=sinks, sliding_window=8)
    assert error(got, want(step, 0.3, sinks=sinks, window=7)) < 5e-3  # it counts a token after the last
    with pytest.raises(AssertionError, match="a window of 1 sees no key"):
        gluon(aiter, step, sliding_window=1)
    rows = step.q.repeat_interleave(2, 0)
    two = gluon(aiter, step, query=rows, output=torch.zeros_like(rows), query_length=2)
    assert error(two[2:4], attend(rows[2:4], *step.tokens(1), 0.3)) < 5e-3
    with pytest.raises(AssertionError, match="every sequence must have query_length = 2"):
        gluon(aiter, step, query=rows[1:], output=torch.zeros_like(rows[1:]), query_length=2)
    with pytest.raises(AssertionError, match="kv_block_size == 32"):
        gluon(aiter, paged([9], block_size=32))
    with pytest.raises(AssertionError, match="exceeds maximum of 64"):
        gluon(aiter, paged([9], heads=130))


def test_an_empty_sequence_leaves_its_row_unwritten(aiter: ModuleType) -> None:
    step = paged([5, 9])
    step = replace(step, lens=torch.tensor([0, 9], dtype=torch.int32))
    for call in (v1, rocm, common, asm, gluon):
        got = call(aiter, step)
        assert got[0].isnan().all() and not got[1].isnan().any()
