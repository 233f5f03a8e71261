# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Decode attention over a paged cache: one query token per row, its keys shared among `num_splits` programs."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.common import (
    capped,
    finite,
    key_tile,
    paged_arguments,
    platform,
    running_softmax,
    value_tile,
)
from miniserve.kernels.triton.launch import HELD_EARLY, Launch, cdiv, decode_launch, next_power_of_2
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import quick
from miniserve.kernels.triton.split_kv import (
    DecodeScratch,
    fuses_merge,
    last_to_arrive,
    merge_splits,
    merge_tile,
    scratch_arrays,
    share_of,
)

_FUSED_MERGE_VALUES = 16384  # measured on an H100
# Programs up to which each holds its first tile in registers, on an H200, and the registers of a thread with two warps:
# so a multiprocessor has room for `HELD_EARLY` programs, else for eight. If it had room for more than it gets on
# average, some would get more than others. Merging more values of a thread at once would take more registers.
_EARLY_PROGRAMS, _EARLY_REGISTERS, _REGISTERS = 132 * HELD_EARLY, 168, 128
_EARLY_VALUES, _VALUES = 64, 32


def paged_decode(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    num_kv_heads: int,
    block_size: int,
    shuffled: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    num_splits: int = 1,
    fresh: int | None = None,
    scratch: DecodeScratch | None = None,
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
    fused_merge: bool | None = None,
) -> torch.Tensor:
    """Attention of each row's one query over its cached keys, including that of its own token.

    q [rows, num_heads, head_dim], last dimension dense; key_cache, value_cache: planes of the layout (see
    `attention/layouts.py`); block_tables int32 [rows, width]; seq_lens int32 [rows], 0 for a padding row, which reads
    nothing and gets zeros. window W: only the last W keys; softcap c: c·tanh(score/c); sinks float32 [num_heads]: a
    logit per head that joins the softmax's sum. k_scale, v_scale float32 [1]: factors of an fp8 cache's codes.
    num_splits > 1 needs `scratch`. fresh: how many of a row's last tokens this step computes, at most; older ones,
    block_tables and seq_lens may then be read before earlier kernels are done (see `pdl.py`). None: nothing may.
    launch: by default one for few rows. `fused_merge` overrides the default (for measurements). Returns out [rows,
    num_heads, head_dim], q's dtype.
    """
    rows, num_heads, head_dim = q.shape
    if out is None:
        out = torch.empty((rows, num_heads, head_dim), dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    arrays = scratch_arrays(scratch, num_splits)
    group, on = num_heads // num_kv_heads, platform()
    launch = launch or decode_launch(on, head_dim, key_cache.element_size(), group)
    single, settled = num_splits == 1, fresh is not None and on == "cuda"
    if fused_merge is None:
        fused_merge = fuses_merge(on, min(launch.block_m, group), head_dim, num_splits, _FUSED_MERGE_VALUES)
    values, constants = paged_arguments(
        q, (key_cache, value_cache), block_tables, out, launch, num_kv_heads=num_kv_heads, block_size=block_size,
        shuffled=shuffled, scale=scale, window=window, softcap=softcap, num_splits=num_splits,
    )  # fmt: skip
    grid = (num_kv_heads * cdiv(group, launch.block_m), num_splits, rows)
    early = settled and math.prod(grid) <= _EARLY_PROGRAMS
    registers, values_at_once = (_EARLY_REGISTERS, _EARLY_VALUES) if early else (_REGISTERS, _VALUES)
    limit = {"maxnreg": registers} if on == "cuda" and launch.num_warps == 2 else {}
    _decode_kernel[grid](
        q, key_cache, value_cache, block_tables, seq_lens, sinks, k_scale, v_scale, out, *arrays, *values,
        fresh or 0, KV_HEADS=num_kv_heads, SINGLE=single, MERGE_M=next_power_of_2(min(group, launch.block_m)),
        MERGE_VALUES=values_at_once * 32 * launch.num_warps, FUSED_MERGE=fused_merge and not single, SETTLED=settled,
        EARLY=early, **constants, **limit, **launch_options(q.device),
    )  # fmt: skip
    if not single and not fused_merge and scratch is not None:
        merge_splits(
            scratch, seq_lens, out, block_n=launch.block_n, num_splits=num_splits, window=window, settled=settled
        )
    return out


@quick
@triton.jit(do_not_specialize=["table_row", "window", "num_splits", "fresh"])
def _decode_kernel(
    q, key_cache, value_cache, block_tables, seq_lens, sinks, k_scale, v_scale, out, partial, lse, arrivals,
    q_row, q_head, k_block, k_token, k_head, v_block, v_token, v_head, table_row, out_row, out_head,
    qk_scale, window, softcap, num_splits, fresh,
    GROUP: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SINGLE: tl.constexpr, MERGE_M: tl.constexpr, MERGE_VALUES: tl.constexpr,
    FUSED_MERGE: tl.constexpr, SETTLED: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one row, one split of its keys, up to BLOCK_M query heads of one kv head. Scores are base 2."""
    head_tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    HEADS: tl.constexpr = GROUP * KV_HEADS
    kv_head = head_tile // TILES
    member = head_tile % TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    head = kv_head * GROUP + member
    d = tl.arange(0, BLOCK_D)
    mine = (member < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    out_at = out + row.to(tl.int64) * out_row + head[:, None] * out_head + d[None, :]

    if not SETTLED:
        wait(PDL)
    seq_len = tl.load(seq_lens + row)
    low, begin, end, splits = share_of(split, seq_len, window, num_splits, BLOCK_N, HAS_WINDOW)
    if begin >= end:
        if SETTLED:
            wait(PDL)
        if split == 0:
            tl.store(out_at, tl.zeros([BLOCK_M, BLOCK_D], out.dtype.element_ty), mask=mine)
        return

    if k_scale is not None:
        qk_scale *= tl.load(k_scale)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=member < GROUP, other=0.0) * 1.4426950408889634
        best = tl.maximum(best, sink)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over the keys once, after the loop
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    table = block_tables + row.to(tl.int64) * table_row
    VALUE_STEP: tl.constexpr = X if X > 0 else 1
    k_pos = begin * BLOCK_N + tl.arange(0, BLOCK_N)
    v_pos = begin * BLOCK_N + tl.arange(0, BLOCK_N // VALUE_STEP) * VALUE_STEP
    # Block ids are read one tile ahead, so that a tile's keys never wait for them.
    k_ids = tl.load(table + k_pos // BLOCK_SIZE, mask=k_pos < seq_len, other=0)
    v_ids = tl.load(table + v_pos // BLOCK_SIZE, mask=v_pos < seq_len, other=0)
    if EARLY:
        # The first tile as well, if all of it is older than the step, and the next one's block ids.
        old = (begin + 1) * BLOCK_N <= seq_len - fresh
        visible = (k_pos >= low) & old
        k = key_tile(
            key_cache, k_ids, k_pos, visible, k_block, k_token, kv_head * k_head,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X,
        )  # fmt: skip
        v = value_tile(
            value_cache, v_ids, v_pos, low, tl.where(old, seq_len, 0), v_block, v_token, kv_head * v_head,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X,
        )  # fmt: skip
        begin += old.to(tl.int32)
        k_pos += old.to(tl.int32) * BLOCK_N
        v_pos += old.to(tl.int32) * BLOCK_N
        k_ids = tl.load(table + k_pos // BLOCK_SIZE, mask=k_pos < seq_len, other=0)
        v_ids = tl.load(table + v_pos // BLOCK_SIZE, mask=v_pos < seq_len, other=0)
    if SETTLED:
        wait(PDL)
    query = tl.load(q + row.to(tl.int64) * q_row + head[:, None] * q_head + d[None, :], mask=mine, other=0.0)
    # While many keys and values are being read the next product should not fetch its weights yet; a few leave the
    # memory idle. A separate merge would pass the start on too early.
    few_keys = (end - begin) * BLOCK_N <= 256
    if SINGLE or FUSED_MERGE:  # noqa: SIM102 - the outer test is for the compiler, the inner one for the device
        if few_keys:
            start(PDL)
    if EARLY:  # noqa: SIM102 - the outer test is for the compiler, the inner one for the device
        if old:
            best, total, acc = _absorb(
                query, k, v, visible, best, total, acc, qk_scale, softcap, HAS_SOFTCAP, X, PRECISION
            )
    for _ in range(begin, end):
        visible = k_pos < seq_len
        if HAS_WINDOW:
            visible = visible & (k_pos >= low)
        k = key_tile(
            key_cache, k_ids, k_pos, visible, k_block, k_token, kv_head * k_head,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X,
        )  # fmt: skip
        v = value_tile(
            value_cache, v_ids, v_pos, low, seq_len, v_block, v_token, kv_head * v_head,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X,
        )  # fmt: skip
        k_pos += BLOCK_N
        v_pos += BLOCK_N
        k_ids = tl.load(table + k_pos // BLOCK_SIZE, mask=k_pos < seq_len, other=0)
        v_ids = tl.load(table + v_pos // BLOCK_SIZE, mask=v_pos < seq_len, other=0)
        best, total, acc = _absorb(query, k, v, visible, best, total, acc, qk_scale, softcap, HAS_SOFTCAP, X, PRECISION)

    start(PDL)
    denominator = tl.sum(total, 1)
    if sinks is not None:
        denominator += tl.where(split == 0, tl.exp2(sink - best), 0.0)  # a sink counts once, in the first split
    acc = acc / denominator[:, None]
    if v_scale is not None:
        acc *= tl.load(v_scale)
    if SINGLE:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=mine)
    else:
        entry = (row * HEADS + head).to(tl.int64) * num_splits
        tl.store(partial + (entry + split)[:, None] * HEAD_DIM + d[None, :], acc, mask=mine)
        tl.store(lse + entry + split, best + tl.log2(denominator), mask=member < GROUP)
        if FUSED_MERGE:  # noqa: SIM102 - the outer test is for the compiler, the inner one for the device
            if last_to_arrive(arrivals + row * tl.num_programs(0) + head_tile, splits):
                few = head_tile % TILES * BLOCK_M + tl.arange(0, MERGE_M)
                merge_tile(
                    partial, lse, out, row, kv_head * GROUP + few, few < GROUP, splits, num_splits,
                    out_row, out_head, HEADS, HEAD_DIM, BLOCK_D, MERGE_M, MERGE_VALUES,
                )  # fmt: skip


@triton.jit
def _absorb(
    query, k, v, visible, best, total, acc, qk_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, X: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys and values to the running softmax's maximum, sums and weighted values."""
    scores = tl.dot(query, k.to(query.dtype), input_precision=PRECISION) * qk_scale
    if HAS_SOFTCAP:
        scores = capped(scores, softcap)
    weights, decay, best, total = running_softmax(scores, visible, best, total)
    v = v.to(query.dtype)
    if X > 0:
        v = finite(v)
    acc = acc * decay[:, None]
    acc = tl.dot(weights.to(query.dtype), v, acc, input_precision=PRECISION)
    return best, total, acc
