"""MLA decode: numbers, the table of heads x dtypes x query lengths, the six buffers, the traps."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from aiter_naive import attend, error
from aiter_standin import installed

ONE = torch.ones(1)
BF16, SCALE = torch.bfloat16, 192**-0.5
LENS = [1, 40, 300]
ALL = frozenset(range(1, 9))
UP_TO_4 = frozenset(range(1, 5))


@pytest.fixture(scope="module")
def aiter() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def starts(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).int()


def step(
    lens: list[int], heads: int = 16, qlen: int = 1, q_dtype: torch.dtype = BF16, kv_dtype: torch.dtype = BF16
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    total = sum(lens)
    return (
        {
            "q": torch.randn(len(lens) * qlen, heads, 576, generator=random).to(q_dtype),
            "kv_buffer": torch.randn(total + 5, 1, 1, 576, generator=random).to(kv_dtype),
            "o": torch.zeros(len(lens) * qlen, heads, 512, dtype=BF16),
            "qo_indptr": starts([qlen] * len(lens)),
            "kv_indptr": starts(lens),
            "kv_indices": torch.randperm(total + 5, generator=random)[:total].int(),
            "kv_last_page_lens": torch.ones(len(lens), dtype=torch.int32),
            "max_seqlen_q": qlen,
            "sm_scale": SCALE,
        }
        | ({"kv_scale": torch.tensor([0.5])} if kv_dtype != BF16 else {})
        | ({"q_scale": ONE * 2} if q_dtype != BF16 else {})
    )


def plan(aiter: ModuleType, call: dict[str, Any], room: int = 8, **changes: Any) -> dict[str, torch.Tensor]:
    """The six buffers, allocated for `room` sequences and filled for this step."""
    heads, dtypes = call["q"].shape[1], (call["q"].dtype, call["kv_buffer"].dtype)
    info = aiter.get_mla_metadata_info_v1(room, call["max_seqlen_q"], heads, *dtypes, False)
    names = (
        "work_metadata_ptrs",
        "work_indptr",
        "work_info_set",
        "reduce_indptr",
        "reduce_final_map",
        "reduce_partial_map",
    )
    buffers = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in zip(names, info, strict=True)}
    arguments = {
        "seqlens_qo_indptr": call["qo_indptr"],
        "seqlens_kv_indptr": call["kv_indptr"],
        "kv_last_page_lens": call["kv_last_page_lens"],
        "num_heads_per_head_k": heads,
        "num_heads_k": 1,
        "is_causal": True,
        "max_seqlen_qo": call["max_seqlen_q"],
        "uni_seqlen_qo": call["max_seqlen_q"],
        "dtype_q": dtypes[0],
        "dtype_kv": dtypes[1],
    }
    aiter.get_mla_metadata_v1(**(arguments | buffers | changes))
    return {"work_meta_data": buffers.pop("work_metadata_ptrs"), **buffers}


def want(call: dict[str, Any], scale: float = SCALE) -> torch.Tensor:
    keys = call["kv_buffer"].float().view(-1, 1, 576)[call["kv_indices"].long()] * float(call.get("kv_scale", ONE))
    parts = keys.split(call["kv_indptr"].diff().tolist())
    queries = (call["q"].float() * float(call.get("q_scale", ONE))).split(call["qo_indptr"].diff().tolist())
    return torch.cat([attend(q, k, k[..., :512], scale) for q, k in zip(queries, parts, strict=True)])


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("heads", "qlen"), [(16, 1), (16, 3), (32, 1), (48, 2), (128, 1)])
def test_persistent(aiter: ModuleType, arch: str, heads: int, qlen: int) -> None:
    with aiter._standin.emulate(arch=arch) as calls:
        fp8 = aiter.dtypes.fp8
        for q_dtype, kv_dtype in ((BF16, BF16), (BF16, fp8), (fp8, fp8)):
            call = step([qlen, 40, 300], heads, qlen, q_dtype, kv_dtype)
            aiter.mla.mla_decode_fwd(**call, **plan(aiter, call))
            assert error(call["o"], want(call)) < 5e-3
            assert calls[-1].route == "persistent"


def test_not_persistent_and_log_sum_exp(aiter: ModuleType) -> None:
    call = step(LENS)
    _, lse = aiter.mla.mla_decode_fwd(**call, return_lse=True)
    assert error(call["o"], want(call)) < 5e-3 and lse.shape == (3, 16)
    scores = call["q"][0].float() @ call["kv_buffer"].float().view(-1, 576)[call["kv_indices"][0].long()] * SCALE
    assert torch.allclose(lse[0], scores, atol=1e-2)  # one key: its own score


NONE, ONLY = frozenset[int](), tuple(frozenset({n}) for n in range(9))
FOLDED = (32, 48, 64, 80, 96, 112, 128)
# Heads -> the query lengths of 1…8 that work: read off aiter's dispatch, less what is known to fault.
TABLE: dict[tuple[str, str, bool], dict[int, frozenset[int]]] = {
    ("gfx942", "bf16 bf16", False): {8: ONLY[1], 24: NONE, 48: NONE, 64: NONE} | dict.fromkeys((16, 32, 128), UP_TO_4),
    ("gfx950", "bf16 bf16", False): {8: frozenset({1, 2}), 16: ALL, 24: NONE, 32: ALL, 48: NONE, 64: ONLY[1], 128: ALL},
    ("gfx942", "bf16 bf16", True): {8: ONLY[2], 16: UP_TO_4, 24: NONE} | dict.fromkeys(FOLDED, UP_TO_4),
    ("gfx950", "bf16 bf16", True): {8: ONLY[8], 16: ALL, 24: ALL} | dict.fromkeys(FOLDED, ALL),
    ("gfx942", "bf16 fp8", False): dict.fromkeys((8, 16, 32, 64, 128), NONE),
    ("gfx950", "bf16 fp8", False): dict.fromkeys((8, 16, 32, 64, 128), NONE),
    ("gfx942", "bf16 fp8", True): {8: NONE, 16: UP_TO_4} | dict.fromkeys(FOLDED, UP_TO_4),
    ("gfx950", "bf16 fp8", True): {8: NONE, 16: UP_TO_4} | dict.fromkeys(FOLDED, UP_TO_4),
    ("gfx942", "fp8 fp8", False): {8: ONLY[1], 16: UP_TO_4, 32: NONE, 64: NONE, 128: UP_TO_4},
    ("gfx950", "fp8 fp8", False): {8: ONLY[1], 16: UP_TO_4, 32: NONE, 64: NONE, 128: UP_TO_4},
    ("gfx942", "fp8 fp8", True): {8: NONE, 16: UP_TO_4}
    | dict.fromkeys(FOLDED, UP_TO_4)
    | {64: UP_TO_4 - {1}, 128: ALL},
    ("gfx950", "fp8 fp8", True): {4: NONE, 8: ONLY[4], 12: NONE, 16: ALL} | dict.fromkeys(FOLDED, ALL),
}


@pytest.mark.parametrize(("arch", "kinds", "persistent"), list(TABLE))
def test_heads_and_query_lengths(aiter: ModuleType, arch: str, kinds: str, persistent: bool) -> None:
    with aiter._standin.emulate(arch=arch):
        dtypes = [aiter.dtypes.fp8 if kind == "fp8" else BF16 for kind in kinds.split()]
        for heads, works in TABLE[arch, kinds, persistent].items():
            for qlen in ALL:
                call = step([qlen], heads, qlen, dtypes[0], dtypes[1])
                try:
                    aiter.mla.mla_decode_fwd(**call, **(plan(aiter, call) if persistent else {}))
                    assert qlen in works, (heads, qlen)
                except (AssertionError, RuntimeError, KeyError) as refusal:
                    assert qlen not in works, (heads, qlen, refusal)


def test_a_log_sum_exp_of_persistent_kernels_is_rare_on_gfx942(aiter: ModuleType) -> None:
    call = step(LENS)
    with pytest.raises(RuntimeError, match="lse:1"):
        aiter.mla.mla_decode_fwd(**call, **plan(aiter, call), return_lse=True)
    with aiter._standin.emulate(arch="gfx950"):
        assert aiter.mla.mla_decode_fwd(**call, **plan(aiter, call), return_lse=True)[1].shape == (3, 16)


def test_buffer_sizes(aiter: ModuleType) -> None:
    info = aiter.get_mla_metadata_info_v1
    sizes = [shape for shape, _ in info(10, 1, 16, BF16, BF16, False)]
    assert sizes == [2, 305, (313, 8), 11, (10, 2), 313]
    assert [shape for shape, _ in info(10, 2, 48, BF16, BF16, False)][2:4] == [(313 * 6, 8), 61]
    with aiter._standin.emulate(arch="gfx950"):
        for heads, qlen, tiles in ((48, 2, 2), (32, 2, 1), (128, 1, 1), (128, 3, 3), (24, 1, 2)):
            work = info(10, qlen, heads, BF16, BF16, False)[2][0]
            assert work == ((10 + 255) * tiles, 8), (heads, qlen)
    with pytest.raises(AssertionError):
        info(10, 1, 12, BF16, BF16, False)


def test_the_default_scale_is_of_576_dims(aiter: ModuleType) -> None:
    call = step(LENS) | {"sm_scale": None}
    aiter.mla.mla_decode_fwd(**call)
    assert error(call["o"], want(call, 576**-0.5)) < 5e-3


def test_gfx950_leaves_the_persistent_kernel_at_32_sequences(aiter: ModuleType) -> None:
    with aiter._standin.emulate(arch="gfx950") as calls:
        for batch, route in ((31, "persistent"), (32, "non_persistent")):
            call = step([2] * batch)
            aiter.mla.mla_decode_fwd(**call, **plan(aiter, call, batch))
            assert calls[-1].route == route


def test_folding_several_queries_moves_o_to_a_new_storage(aiter: ModuleType) -> None:
    call = step([5, 9], heads=32, qlen=2)
    base = torch.zeros(9, 32, 512, dtype=BF16)
    call["o"] = base[:4]
    aiter.mla.mla_decode_fwd(**call, **plan(aiter, call))
    assert error(call["o"], want(call)) < 5e-3
    assert call["o"].data_ptr() != base.data_ptr() and error(base[:4], want(call)) > 0.5


def test_the_plan_must_be_this_steps(aiter: ModuleType) -> None:
    call = step(LENS)
    violation, six = aiter._standin.ContractViolation, plan(aiter, call)
    for name in six:
        with pytest.raises(violation, match=f"all six buffers or none; {name} not given"):
            aiter.mla.mla_decode_fwd(**call, **(six | {name: None}))
    with pytest.raises(violation, match="plan of another step"):
        aiter.mla.mla_decode_fwd(**step([1, 40, 299]), **six)
    with pytest.raises(violation, match="this batch, heads"):
        aiter.mla.mla_decode_fwd(**step(LENS, heads=128), **six)
    with pytest.raises(violation, match="points at other buffers"):
        aiter.mla.mla_decode_fwd(**call, **(six | {"work_indptr": six["work_indptr"].clone()}))
    with pytest.raises(violation, match="work_indptr must be"):
        plan(aiter, call, work_indptr=torch.empty(400, dtype=torch.int32))
    with pytest.raises(violation, match="work_info_set is"):
        plan(aiter, call, room=8, work_info_set=torch.empty(2, 8, dtype=torch.int32))
    swapped = {"work_info_set": six["work_indptr"], "work_indptr": six["work_info_set"]}
    with pytest.raises(violation, match=r"work_indptr|work_info_set"):
        plan(aiter, call, **swapped)
    fp8 = step(LENS, q_dtype=aiter.dtypes.fp8, kv_dtype=aiter.dtypes.fp8)
    with pytest.raises(violation, match="plan of another step"):
        aiter.mla.mla_decode_fwd(**fp8, **plan(aiter, fp8, dtype_q=None, dtype_kv=None))


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"logit_cap": 1.0}, AssertionError, "logit_cap"),
    ({"page_size": 64}, AssertionError, "page size 1"),
    ({"q": torch.zeros(3, 16, 576).half()}, RuntimeError, "unsupport Q dtype"),
    ({"q": torch.zeros(3, 16, 600).bfloat16()[..., :576]}, RuntimeError, "is_contiguous"),
    ({"kv_buffer": torch.zeros(400, 576).bfloat16()}, ValueError, "not enough values"),
    ({"kv_buffer": torch.zeros(400, 1, 1, 576).to(torch.float8_e4m3fnuz)}, AssertionError, "needs kv_scale"),
    ({"kv_buffer": torch.zeros(400, 1, 1, 576).to(torch.float8_e4m3fn), "kv_scale": ONE}, RuntimeError, "KV dtype"),
    ({"o": torch.zeros(3, 16, 512)}, AssertionError, "o must be torch.bfloat16"),
    ({"kv_indices": torch.zeros(7, dtype=torch.int32)}, AssertionError, "past kv_indices"),
    ({"kv_indices": torch.full((341,), 400, dtype=torch.int32)}, AssertionError, "outside the cache"),
    ({"kv_indptr": starts(LENS).long()}, AssertionError, "must be torch.int32"),
    ({"kv_last_page_lens": torch.full((3,), 16, dtype=torch.int32)}, AssertionError, "of a page of one"),
]


@pytest.mark.parametrize(("changes", "error_class", "words"), REFUSALS)
def test_refusals(aiter: ModuleType, changes: dict[str, Any], error_class: type[Exception], words: str) -> None:
    with pytest.raises(error_class, match=words):
        aiter.mla.mla_decode_fwd(**(step(LENS) | changes))


def test_fp8_queries_need_both_scales_and_known_tiles(aiter: ModuleType) -> None:
    fp8 = aiter.dtypes.fp8
    with pytest.raises(RuntimeError, match="requires q_scale and kv_scale"):
        aiter.mla.mla_decode_fwd(**(step(LENS, q_dtype=fp8, kv_dtype=fp8) | {"q_scale": None}))
    with pytest.raises(KeyError):
        aiter.mla.mla_decode_fwd(**step([9], heads=80, q_dtype=fp8, kv_dtype=fp8))


def test_metadata_refusals(aiter: ModuleType) -> None:
    call = step(LENS)
    for changes, words in (
        ({"kv_granularity": 24}, "kv_granularity Must be power of 2"),
        ({"seqlens_kv_indptr": starts(LENS).long()}, "element type should be int"),
        ({"num_heads_per_head_k": 24}, "only supports #heads"),
    ):
        with pytest.raises(RuntimeError, match=words):
            plan(aiter, call, **changes)
    with pytest.raises(aiter._standin.ContractViolation, match="max_seqlen_qo must be given"):
        plan(aiter, call, max_seqlen_qo=-1)
    with pytest.raises(aiter._standin.ContractViolation, match=r"uni_seqlen_qo is 2, rows have \{1\}"):
        plan(aiter, call, uni_seqlen_qo=2)
    with pytest.raises(aiter._standin.ContractViolation, match="32 heads of 1 queries need uni_seqlen_qo"):
        plan(aiter, step(LENS, heads=32), uni_seqlen_qo=-1)


def test_a_mask_left_out_has_no_kernel_on_gfx942(aiter: ModuleType) -> None:
    for qlen in (1, 2):
        call = step([9, 40], qlen=qlen)
        six = plan(aiter, call)
        if qlen == 1:
            aiter.mla.mla_decode_fwd(**call, **six, causal=False)  # one query: the mask hides nothing
            assert error(call["o"], want(call)) < 5e-3
            continue
        with pytest.raises(RuntimeError, match="causal:0 qseqlen:4"):
            aiter.mla.mla_decode_fwd(**call, **six, causal=False)


@pytest.mark.parametrize(("arch", "heads", "qlen"), [("gfx942", 16, 1), ("gfx942", 48, 1), ("gfx942", 32, 3)])
def test_split_rows_are_summed(aiter: ModuleType, arch: str, heads: int, qlen: int) -> None:
    """Several workgroups share a long row; max_split_per_batch makes their shares larger."""
    parts = []
    with aiter._standin.emulate(arch=arch, cu_num=64):
        call = step([900, qlen, 40], heads, qlen)
        for most in (-1, 1):
            six = plan(aiter, call, max_split_per_batch=most)
            parts.append(int(six["reduce_indptr"][-1]))
            aiter.mla.mla_decode_fwd(**call, **six)
            assert error(call["o"], want(call)) < 5e-3
    assert parts[0] > parts[1]


def test_tiles_of_query_rows_end_at_their_last_querys_keys(aiter: ModuleType) -> None:
    for heads, qlen, tiles in ((128, 3, 3), (64, 3, 2), (48, 2, 2)):
        with aiter._standin.emulate(arch="gfx950", cu_num=1):
            call = step([300, 9, qlen], heads, qlen)
            six = plan(aiter, call)
            aiter.mla.mla_decode_fwd(**call, **six)
            assert error(call["o"], want(call)) < 5e-3
            assert int(six["work_indptr"][-1]) == 3 * tiles


@pytest.mark.parametrize(
    ("workgroups", "works", "missing"),
    [(1, [4], [1, 2, 3]), (2, [2, 2], [1]), (8, [1, 1, 1], [1])],
)
def test_a_row_without_keys_spoils_what_its_workgroup_does_after_it(
    aiter: ModuleType, workgroups: int, works: list[int], missing: list[int]
) -> None:
    """Where its workgroup is full it gets no work at all; without a plan it spoils itself alone."""
    with aiter._standin.emulate(cu_num=workgroups):
        call = step([40, 0, 9, 17])
        six = plan(aiter, call)
        assert [count for count in six["work_indptr"].diff().tolist() if count] == works
        for buffers, bad in ((six, missing), ({}, [1])):
            aiter.mla.mla_decode_fwd(**call, **buffers)
            assert call["o"].isnan().any((1, 2)).nonzero().flatten().tolist() == bad
