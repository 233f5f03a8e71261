"""Prefill, paged prefill and unified attention: numbers, routes, and the two bugs of `flash_attn_varlen_func`."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from aiter_naive import Paged, attend, error, paged, plane
from aiter_standin import installed

QLENS, KLENS = [3, 1, 5], [3, 9, 20]
SINKS = torch.tensor([2.0, -1.0, 0.5, 3.0])


@pytest.fixture(scope="module")
def aiter() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def starts(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).int()


def batch(dim: int, dim_v: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    shapes = {"q": (sum(QLENS), 4, dim), "k": (sum(KLENS), 2, dim), "v": (sum(KLENS), 2, dim_v)}
    tensors = {name: torch.randn(*shape, generator=random).to(dtype) for name, shape in shapes.items()}
    lens = {"cu_seqlens_q": starts(QLENS), "cu_seqlens_k": starts(KLENS), "max_seqlen_q": 5, "max_seqlen_k": 20}
    return tensors | lens | {"softmax_scale": 0.2}


def want(given: dict[str, Any], **options: Any) -> torch.Tensor:
    parts = zip(given["q"].split(QLENS), given["k"].split(KLENS), given["v"].split(KLENS), strict=True)
    return torch.cat([attend(q, k, v, 0.2, **options) for q, k, v in parts])


@pytest.mark.parametrize(
    ("options", "naive"),
    [
        ({"causal": True}, {}),
        ({"causal": False}, {"causal": False}),
        ({"causal": True, "window_size": (3, 0)}, {"window": 4}),
        ({"causal": True, "logits_soft_cap": 1.5}, {"softcap": 1.5}),
    ],
)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128)])
def test_varlen(aiter: ModuleType, dims: tuple[int, int], options: dict[str, Any], naive: dict[str, Any]) -> None:
    given = batch(*dims)
    assert error(aiter.flash_attn_varlen_func(**given, **options), want(given, **naive)) < 5e-3


def test_lse_merges_two_parts_into_the_whole(aiter: ModuleType) -> None:
    given = batch(128, 128)
    parts = []
    for first in (True, False):  # each sequence's keys cut in two
        cut = [k[:2] if first else k[2:] for k in given["k"].split(KLENS)]
        values = [v[:2] if first else v[2:] for v in given["v"].split(KLENS)]
        lens = starts([len(k) for k in cut])
        call = given | {"k": torch.cat(cut), "v": torch.cat(values), "cu_seqlens_k": lens}
        out, lse = aiter.flash_attn_varlen_func(**call, return_lse=True)
        assert lse.shape == (4, sum(QLENS)) and lse.dtype == torch.float32
        parts.append((out.double(), lse.T[..., None].double()))
    total = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * torch.exp(lse - total) for out, lse in parts)
    assert error(merged, want(given, causal=False)) < 5e-3


def test_rows_without_keys_are_zero(aiter: ModuleType) -> None:
    given = batch(64, 64) | {"k": torch.zeros(0, 2, 64).bfloat16(), "v": torch.zeros(0, 2, 64).bfloat16()}
    out, lse = aiter.flash_attn_varlen_func(**(given | {"cu_seqlens_k": starts([0, 0, 0])}), return_lse=True)
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_sinks_are_dropped_by_fmha_v3_and_kept_by_ck(aiter: ModuleType) -> None:
    for dim, dtype, route in ((128, torch.bfloat16, "fmha_v3"), (128, torch.float16, "ck"), (64, torch.bfloat16, "ck")):
        given = batch(dim, dim, dtype)
        with aiter._standin.emulate() as calls:
            got = aiter.flash_attn_varlen_func(**given, causal=True, sink_ptr=SINKS)
            assert calls == [("flash_attn_varlen_func", route)]
        assert error(got, want(given, **({} if route == "fmha_v3" else {"sinks": SINKS}))) < 5e-3
    with aiter._standin.emulate(arch="gfx950") as calls:
        aiter.flash_attn_varlen_func(**batch(192, 128), causal=True)
        assert calls[0].route == "opus"


VARLEN_REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"window_size": None}, TypeError, "NoneType"),
    ({"block_table": torch.zeros(3, 2), "window_size": (4, 0)}, UnboundLocalError, "filter_fwd"),
    ({"block_table": torch.zeros(3, 2)}, AssertionError, "fmha_v3 faults"),
    ({"sink_ptr": SINKS[:3]}, AssertionError, "sink_ptr has incorrect shape"),
    ({"sink_ptr": SINKS, "return_lse": True}, AssertionError, "not established"),
    ({"cu_seqlens_q": starts(QLENS).long()}, AssertionError, "must be torch.int32"),
    ({"cu_seqlens_q": starts([3, 1, 6])}, AssertionError, "ends at 10"),
    ({"max_seqlen_q": 4}, AssertionError, "max_seqlen_q 4 is below 5"),
    ({"max_seqlen_k": 19}, AssertionError, "max_seqlen_k 19 is below 20"),
    ({"q": torch.zeros(9, 4, 128)}, RuntimeError, "only support fp16 and bf16"),
]


@pytest.mark.parametrize(("changes", "error_class", "words"), VARLEN_REFUSALS)
def test_varlen_refusals(aiter: ModuleType, changes: dict[str, Any], error_class: type[Exception], words: str) -> None:
    with pytest.raises(error_class, match=words):
        aiter.flash_attn_varlen_func(**(batch(128, 128) | changes))


def step_of(step: Paged, qlens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries for several tokens a sequence, and their starts."""
    random = torch.Generator().manual_seed(3)
    return torch.randn(sum(qlens), *step.q.shape[1:], generator=random).to(step.q.dtype), starts(qlens)


def unified(aiter: ModuleType, step: Paged, qlens: list[int], shuffled: bool, **changes: Any) -> torch.Tensor:
    q, cu = step_of(step, qlens)
    names = ("packed", "shuffled") if shuffled else ("linear", "linear")
    arguments = {
        "q": q,
        "k": plane(names[0], step.k),
        "v": plane(names[1], step.v),
        "out": torch.zeros_like(q),
        "cu_seqlens_q": cu,
        "max_seqlen_q": max(qlens),
        "seqused_k": step.lens,
        "max_seqlen_k": int(step.lens.max()),
        "softmax_scale": 0.2,
        "causal": True,
        "window_size": (-1, -1),
        "block_table": step.tables,
        "softcap": 0.0,
        "q_descale": None,
        "k_descale": None,
        "v_descale": None,
        "shuffled_kv_cache": shuffled,
    }
    from aiter.ops.triton.attention.unified_attention import unified_attention

    return unified_attention(**(arguments | changes))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("qlens", [[1, 1, 1], [3, 1, 20]])
def test_unified(aiter: ModuleType, qlens: list[int], shuffled: bool) -> None:
    step = paged([3, 40, 20])
    q, _ = step_of(step, qlens)
    for given, naive in (
        ({}, {}),
        ({"window_size": (4, 0)}, {"window": 5}),
        ({"sinks": SINKS, "softcap": 3.0}, {"sinks": SINKS, "softcap": 3.0}),
    ):
        got = unified(aiter, step, qlens, shuffled, **given)
        parts = [attend(rows, *step.tokens(i), 0.2, **naive) for i, rows in enumerate(q.split(qlens))]
        assert error(got, torch.cat(parts)) < 5e-3


UNIFIED_REFUSALS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"causal": False}, "Only causal"),
    ({"block_size": 24, "lens": [600]}, {}, "divisible by block_size"),
    ({"dim": 96}, {"shuffled_kv_cache": True}, "gives garbage"),
    ({}, {"max_seqlen_q": 1}, "below a query's length"),
    ({}, {"max_seqlen_k": 30}, "exceeds max_context_len"),
    ({}, {"sinks": SINKS[:1]}, "Sinks must be"),
    ({"kv_dtype": torch.float8_e4m3fn}, {}, "fp8 here"),
    ({"kv_dtype": torch.float8_e4m3fnuz}, {}, "needs k_descale"),
]


@pytest.mark.parametrize(("shape", "changes", "words"), UNIFIED_REFUSALS)
def test_unified_refusals(aiter: ModuleType, shape: dict[str, Any], changes: dict[str, Any], words: str) -> None:
    step = paged(**({"lens": [40]} | shape))
    with pytest.raises(AssertionError, match=words):
        unified(aiter, step, [2], changes.get("shuffled_kv_cache", False), **changes)


def test_unified_poisons_rows_outside_the_batch_and_tells_its_route(aiter: ModuleType) -> None:
    step = paged([600])
    q = torch.zeros(3, 4, 128).bfloat16()
    with aiter._standin.emulate() as calls:
        out = unified(aiter, step, [1], False, q=q, out=torch.zeros_like(q))
        unified(aiter, step, [1], False, window_size=(9, 0))
        assert [call.route for call in calls] == ["3d", "2d"]
    assert out[1:].isnan().all() and not out[0].isnan().any()


@pytest.mark.parametrize("kind", ["shuffled", "linear"])
def test_batch_prefill_reads_pages(aiter: ModuleType, kind: str) -> None:
    step, qlens = paged([3, 40, 20]), [3, 1, 20]
    q, cu = step_of(step, qlens)
    pages = -(-step.lens // 16)
    ids = torch.cat([row[:n] for row, n in zip(step.tables, pages.tolist(), strict=True)])
    k, v = plane("packed" if kind == "shuffled" else "linear", step.k), plane(kind, step.v)
    got = aiter.mha_batch_prefill_func(
        q, k, v, cu, starts(pages.tolist()), ids, 20, 40, softmax_scale=0.2, causal=True,
        kv_last_page_lens=(step.lens - 1) % 16 + 1,
    )  # fmt: skip
    assert error(got, torch.cat([attend(r, *step.tokens(i), 0.2) for i, r in enumerate(q.split(qlens))])) < 5e-3
    with pytest.raises(ValueError, match="5D vectorized, 4D linear"):
        aiter.mha_batch_prefill_func(q, k, v[0], cu, starts(pages.tolist()), ids, 20, 40)
