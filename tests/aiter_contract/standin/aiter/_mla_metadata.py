"""Persistent MLA's metadata: the sizes of its six buffers, and their filling."""

from __future__ import annotations

import math

import torch

from aiter import _checks, _math, _mla_plan, _standin
from aiter._standin import check, record, require
from aiter.ops.enum import MlaVersion

NAMES = ("work_meta_data", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")


def kind(dtype: torch.dtype) -> str:
    return "fp8" if dtype == _standin.device.fp8 else str(dtype).removeprefix("torch.").replace("bfloat", "bf")


def _tiles(arch: str, heads: int, qlen: int, q: str, kv: str) -> int:
    """Tiles of query rows per sequence, as the python of `get_mla_metadata_info_v1` counts them."""
    packed, new = qlen * heads, arch == "gfx950"
    both_bf16, both_fp8 = (q, kv) == ("bf16", "bf16"), (q, kv) == ("fp8", "fp8")
    mid = new and both_bf16 and packed >= 64 and heads <= 64 and (packed < 128 or heads == 48)
    if mid or (new and both_fp8 and heads == 32 and qlen == 3):
        return qlen if heads * 2 > 64 else math.ceil(packed / 64)
    wide = both_fp8 and (heads == 128 or (heads == 64 and (new or qlen == 1)) or (new and heads == 32 and qlen == 4))
    if heads == 16 or wide:
        return math.ceil(packed / 128)
    if new and both_bf16 and (packed >= 128 or heads > 64) and heads != 48:
        return qlen if heads * 2 > 128 else math.ceil(packed / 128)
    return math.ceil(packed / 16)


def get_mla_metadata_info_v1(
    batch_size: int,
    max_seqlen_qo: int,
    num_head_qo: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    is_sparse: bool,
    fast_mode: bool = True,
    num_kv_splits: int = 32,
    intra_batch_mode: bool = False,
    max_split_per_batch: int = -1,
):
    """((shape, dtype), …) of work_metadata_ptrs, work_indptr, work_info_set, reduce_indptr, reduce_final_map and
    reduce_partial_map; shapes of one dimension are plain ints, as in the original."""
    assert num_head_qo % 8 == 0
    splits = _standin.device.cus
    qlen = 1 if is_sparse else max_seqlen_qo
    per_batch = _tiles(_standin.device.arch, num_head_qo, qlen, kind(q_dtype), kind(kv_dtype))
    batch = batch_size * max_seqlen_qo if is_sparse else batch_size
    tiles = batch * per_batch
    if intra_batch_mode:
        work = partial = tiles * num_kv_splits
    elif fast_mode:
        work = (batch + splits - 1) * per_batch
        partial = min(batch + splits - 1, (splits - 1) * 2) * per_batch
    else:
        work = partial = tiles * splits
    if max_split_per_batch > 0 and not intra_batch_mode:
        partial = max(partial, tiles + min(splits, max_split_per_batch * batch))
    return (
        ((2), torch.uint64),
        ((splits + 1), torch.int32),
        ((work, 8), torch.int32),
        ((tiles + 1), torch.int32),
        ((tiles, 2), torch.int32),
        (partial, torch.int32),
    )


def demand_buffers(
    buffers: tuple[torch.Tensor, ...], batch: int, qlen: int, heads: int, q: torch.dtype, kv: torch.dtype
) -> None:
    """Each buffer as `get_mla_metadata_info_v1` sizes it for at least this batch; work_indptr, which sets the grid,
    exactly."""
    info = get_mla_metadata_info_v1(batch, qlen, heads, q, kv, False)
    for name, buffer, (shape, dtype) in zip(NAMES, buffers, info, strict=True):
        shape = (shape,) if isinstance(shape, int) else shape
        _checks.tensor(name, buffer, dtype)
        enough = buffer.dim() == len(shape) and buffer.shape[0] >= shape[0] and buffer.shape[1:] == shape[1:]
        require(enough, f"{name} is {tuple(buffer.shape)}; this batch, heads, qlen and dtypes need {shape}")
        require(name != "work_indptr" or buffer.shape == shape, f"work_indptr must be {shape}: it sets the grid")


def get_mla_metadata_v1(
    seqlens_qo_indptr: torch.Tensor,
    seqlens_kv_indptr: torch.Tensor,
    kv_last_page_lens: torch.Tensor,
    num_heads_per_head_k: int,
    num_heads_k: int,
    is_causal: bool,
    work_metadata_ptrs: torch.Tensor,
    work_info_set: torch.Tensor,
    work_indptr: torch.Tensor,
    reduce_indptr: torch.Tensor,
    reduce_final_map: torch.Tensor,
    reduce_partial_map: torch.Tensor,
    page_size: int = 1,
    kv_granularity: int = 16,
    max_seqlen_qo: int = -1,
    uni_seqlen_qo: int = -1,
    fast_mode: bool = True,
    topk: int = -1,
    max_split_per_batch: int = -1,
    intra_batch_mode: bool = False,
    is_cp_round_robin: bool = False,
    mla_version: int = MlaVersion.V32.value,
    dtype_q_nope: torch.dtype | None = None,
    dtype_q_rope: torch.dtype | None = None,
    dtype_kv_nope: torch.dtype | None = None,
    dtype_kv_rope: torch.dtype | None = None,
    dtype_q: torch.dtype | None = None,
    dtype_kv: torch.dtype | None = None,
) -> None:
    """Write the plan that `_mla_plan` makes, as the original does; its last column, which the original leaves 0, holds
    the heads and dtypes, so that `mla_decode_fwd` can tell whether it was made for its call's. uni_seqlen_qo, where
    positive, is every row's number of queries. Without it folded heads are looked up past the rows, and the tiles of
    rows that have several are counted before their lengths are read: violations.
    """
    record("get_mla_metadata_v1")
    check(kv_granularity & (kv_granularity - 1) == 0, "get_mla_metadata_v1: kv_granularity Must be power of 2!")
    check(page_size & (page_size - 1) == 0, "get_mla_metadata_v1: page_size Must be power of 2!")
    inputs = {
        "seqlens_qo_indptr": seqlens_qo_indptr,
        "seqlens_kv_indptr": seqlens_kv_indptr,
        "kv_last_page_lens": kv_last_page_lens,
    }
    for name, t in inputs.items():
        check(t.stride(0) == 1, f"get_mla_metadata_v1: {name} should be continuous!")
        check(t.dtype == torch.int32, f"get_mla_metadata_v1: {name}'s element type should be int!")
    q, kv = (d or legacy or torch.bfloat16 for d, legacy in ((dtype_q_nope, dtype_q), (dtype_kv_nope, dtype_kv)))
    batch, heads = seqlens_kv_indptr.shape[0] - 1, num_heads_per_head_k * num_heads_k
    both_bf16 = kind(q) == kind(kv) == "bf16"
    few = (_standin.device.arch == "gfx950" and kind(q) == kind(kv) == "fp8" and max_seqlen_qo == 4) or (
        _standin.device.arch == "gfx942" and both_bf16 and max_seqlen_qo == 2
    )
    free = _standin.device.arch == "gfx950" and both_bf16
    check(heads % 16 == 0 or free or (heads == 8 and few), "get_mla_metadata_v1: only supports #heads in [16, 64, 128]")
    require(page_size == 1 and fast_mode and not intra_batch_mode, "the stand-in covers page size 1 in fast mode")
    require(num_heads_k == 1 and is_causal and topk == -1, "the stand-in covers dense causal MLA")
    require(max_seqlen_qo >= 1, "max_seqlen_qo must be given: the tiles are counted from it")
    buffers = (work_metadata_ptrs, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map)
    demand_buffers(buffers, batch, max_seqlen_qo, heads, q, kv)
    starts_q = torch.tensor(_checks.indptr("seqlens_qo_indptr", seqlens_qo_indptr))
    starts_kv = torch.tensor(_checks.indptr("seqlens_kv_indptr", seqlens_kv_indptr))
    require(len(starts_q) == batch + 1 and kv_last_page_lens.shape[0] >= batch, "the inputs differ in batch")
    qlens = starts_q.diff().tolist()
    require(
        all(1 <= n <= max_seqlen_qo for n in qlens),
        f"max_seqlen_qo is {max_seqlen_qo}, and rows have {set(qlens)} queries",
    )
    require(
        uni_seqlen_qo < 1 or {*qlens} <= {uni_seqlen_qo}, f"uni_seqlen_qo is {uni_seqlen_qo}, rows have {set(qlens)}"
    )
    fold = heads // folded_heads(_standin.device.arch, heads, max_seqlen_qo, kind(q), kind(kv))
    packed = _packed(heads // fold, max_seqlen_qo, kind(q), kind(kv))
    splits_q = max_seqlen_qo * num_heads_per_head_k > packed
    require(
        uni_seqlen_qo > 0 or (fold == 1 and not splits_q),
        f"{heads} heads of {max_seqlen_qo} queries need uni_seqlen_qo",
    )
    cus = _standin.device.cus
    made = _mla_plan.plan(
        _mla_plan.Step(
            q_spans=_mla_plan.folded_spans([n for n in qlens for _ in range(fold)], 1),
            kv_spans=_mla_plan.folded_spans(starts_kv.diff().tolist(), fold),
            heads=heads // fold,
            fold=fold,
            packed=packed,
            splits_q=splits_q,
            granularity=kv_granularity,
            max_qlen=max_seqlen_qo,
            causal=is_causal,
            workgroups=cus,
            num_splits=cus if max_split_per_batch < 0 else min(cus, max_split_per_batch * batch * fold),
        )
    )
    _math.poison(*buffers[1:])
    stamp = stamp_of(heads, q, kv)
    for buffer, values in (
        (work_info_set, [[*work, stamp] for work in made.works]),
        (work_indptr, made.work_indptr),
        (reduce_partial_map, made.partial_map),
        (reduce_indptr, made.reduce_indptr + [len(made.partial_map)] * (len(reduce_indptr) - len(made.reduce_indptr))),
    ):
        require(len(values) <= len(buffer), f"the plan needs {len(values)} rows of a buffer of {len(buffer)}")
        if values:
            buffer[: len(values)] = torch.tensor(values, dtype=torch.int32)
    for tile, span in made.final_map.items():
        reduce_final_map[tile] = torch.tensor(span)
    work_metadata_ptrs.view(torch.int64).copy_(torch.tensor([work_indptr.data_ptr(), work_info_set.data_ptr()]))


def stamp_of(heads: int, q: torch.dtype, kv: torch.dtype) -> int:
    return heads << 4 | (kind(q) == "fp8") << 1 | (kind(kv) == "fp8")


def folded_heads(arch: str, heads: int, qlen: int, q: str, kv: str) -> int:
    """The heads a persistent kernel sees: its own number, or 16 after folding; AssertionError where neither."""
    both_fp8, both_bf16 = (q, kv) == ("fp8", "fp8"), (q, kv) == ("bf16", "bf16")
    if arch == "gfx950":
        native = both_bf16 or (both_fp8 and (heads in (32, 64, 128) or (heads, qlen) == (8, 4)))
    else:
        native = (both_fp8 and (heads == 128 or (heads, qlen) == (64, 1))) or (both_bf16 and (heads, qlen) == (8, 2))
    if heads == 16 or native:
        return heads
    assert heads in range(32, 129, 16), f"nhead={heads} and max_seqlen_q={qlen} not supported"
    return 16


def _packed(heads: int, qlen: int, q: str, kv: str) -> int:
    """Query rows times heads of one tile."""
    new, rows = _standin.device.arch == "gfx950", qlen * heads
    few = q == kv == "bf16" and rows >= 64 and heads <= 64 and (rows < 128 or heads == 48)
    return 64 if new and (few or (q == kv == "fp8" and (heads, qlen) == (32, 3))) else 128
