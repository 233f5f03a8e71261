"""Every term of a kernel's contract, one at a time: kept, and broken with the sentence that says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from miniserve.attention.contracts import CONTRACTS
from miniserve.attention.platform import NAMED_PLATFORMS, Platform
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import BackendContract, KernelContract, Sizes

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
SPEC = AttentionSpec(32, 8, 128, 128**-0.5, BF16, BF16, sliding_window=64)
MI300X, MI355X = NAMED_PLATFORMS["mi300x"], NAMED_PLATFORMS["mi355x"]


def refusals(spec: AttentionSpec, tokens_a_block: int = 16, **terms: Any) -> list[str]:
    terms = {"dtypes": (BF16,)} | terms
    contract = KernelContract(name="KERNEL", layouts=("linear",), **terms)
    return list(contract.refusals(spec, tokens_a_block))


def test_open_terms_refuse_nothing() -> None:
    assert refusals(replace(SPEC, sinks=True, softcap=3.0, scale=1.0, head_dim=7), 5) == []


@pytest.mark.parametrize(
    ("terms", "change", "sentence"),
    [
        ({"dtypes": (torch.float16,)}, {}, "does not compute in bfloat16"),
        ({}, {"kv_dtype": FP8}, "does not read an fp8 KV cache"),
        ({}, {"kv_dtype": torch.float32}, "needs the KV cache in bfloat16, not float32"),
        ({"head_dim": Sizes(only=(64, 256))}, {}, "does not take head_dim 128"),
        ({"head_dim": Sizes(multiple=8)}, {"head_dim": 100}, "does not take head_dim 100"),
        ({"head_dim": Sizes(least=32)}, {"head_dim": 16}, "does not take head_dim 16"),
        ({"head_dim": Sizes(most=64)}, {}, "does not take head_dim 128"),
        ({"head_dim": Sizes(pow2=True)}, {"head_dim": 96}, "does not take head_dim 96"),
        ({"max_group": 3}, {}, "takes at most 3 query heads per KV head, not 4"),
        ({"block_size": Sizes(only=(32,))}, {}, "does not take block size 16"),
        ({"block_size": Sizes(multiple=32)}, {}, "does not take block size 16"),
        ({"min_window": None}, {}, "has no sliding window"),
        ({"min_window": 65}, {}, "has no sliding window of 64"),
        ({"softcap": False}, {"softcap": 1.0}, "has no softcap"),
        ({"sinks": False}, {"sinks": True}, "has no sinks"),
        ({"qk_norm": False}, {"qk_norm": True}, "has no norm of q and k"),
        ({"partial_rope": False}, {"rotary_dim": 32}, "turns whole heads, not 32 elements of 128"),
        ({"any_scale": False}, {"scale": 0.1}, "always scales by head_dim ** -0.5, not by 0.1"),
    ],
)
def test_a_broken_term_is_told(terms: Mapping[str, Any], change: Mapping[str, Any], sentence: str) -> None:
    assert refusals(replace(SPEC, **change), **terms) == [sentence]


def test_terms_of_blocks_and_caches() -> None:
    assert refusals(SPEC, 48, block_size=Sizes(pow2=True)) == ["does not take block size 48"]
    assert refusals(replace(SPEC, kv_dtype=FP8), fp8_kv=True) == []
    assert refusals(replace(SPEC, kv_dtype=torch.float32), any_kv=True) == []


def test_a_kernel_of_one_query_token_a_row_takes_no_chunks() -> None:
    """None of aiter's decode kernels is right for several tokens in every case."""
    one = KernelContract(name="ONE", layouts=("linear",), dtypes=(BF16,), one_query=True)
    backend = BackendContract(name="BACKEND", implementation="", layouts=("linear",), decode=(one,), chunks=(one,))
    assert backend.routes([SPEC], MI300X, "linear", 16) == ((), ["ONE takes one query token a row"])
    decode = {kernel for contract in CONTRACTS for kernel in contract.decode}
    assert {kernel.name for kernel in decode if kernel.one_query} == {
        "paged_attention_v1",
        "paged_attention_rocm",
        "paged_attention_common",
        "pa_decode_gluon",
        "mla_decode_fwd",
        "triton paged_decode",
    }


def test_the_table_is_in_the_order_that_people_know() -> None:
    names = [contract.name for contract in CONTRACTS if not contract.latent]
    assert names == [
        "ROCM_ATTN",
        "ROCM_AITER_FA",
        "ROCM_AITER_UNIFIED_ATTN",
        "ROCM_AITER_GLUON",
        "TRITON_ATTN",
        "CPU_ATTN",
        "TORCH_ATTN",
    ]
    # Latent ones come after all others, where a model without such layers never gets to.
    assert [contract.latent for contract in CONTRACTS] == sorted(contract.latent for contract in CONTRACTS)


def test_every_layout_has_a_kernel_for_each_part_of_a_step() -> None:
    for contract in CONTRACTS:
        for layout in contract.layouts:
            for options in (contract.decode, contract.chunks):
                assert any(layout in kernel.layouts for kernel in options), (contract.name, layout)


def test_an_aiter_below_what_a_backend_needs_is_refused() -> None:
    contract = replace(CONTRACTS[0], min_aiter=(0, 1, 20))
    assert list(contract.platform_refusals(Platform("gfx942", 304, (0, 1, 20)))) == []
    assert list(contract.platform_refusals(Platform("gfx942", 304, (0, 1, 19)))) == [
        "it needs aiter v0.1.20 or newer, not v0.1.19"
    ]


def test_a_dtype_is_served_where_the_kernels_are_for_it() -> None:
    rocm = CONTRACTS[0]
    for dtype, served in ((torch.float16, True), (BF16, True), (torch.float32, False)):
        spec = replace(SPEC, dtype=dtype, kv_dtype=dtype, sliding_window=None)
        routes, _ = rocm.routes([spec], MI300X, "shuffled", 16)
        assert bool(routes) == served
