# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Prefill and extend attention over a paged cache, which already holds the new tokens.

Flash attention (Dao 2023) with the cache's pages as keys. A tile's rows are (token, query head) pairs of one kv head,
so that the heads of a group share the keys they read and short queries still fill a tile. Where tiles are too few to
fill the device, several programs share a tile's keys, as in `split_kv`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.common import capped, finite, key_tile, paged_arguments, platform, value_tile
from miniserve.kernels.triton.launch import Launch, cdiv, extend_launch, next_power_of_2
from miniserve.kernels.triton.quick_launch import quick
from miniserve.kernels.triton.split_kv import merge_tile

_MERGED_HEADS = 8  # of a token, by one program


def paged_extend(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    max_query_len: int,
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
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """Causal attention of each request's new tokens over its cached ones, the new ones included.

    q [num_tokens, num_heads, head_dim], last dimension dense: the requests' tokens one after another, request r's at
    cu_query_lens[r] … cu_query_lens[r + 1] (int32 [requests + 1], device), none longer than max_query_len (host);
    seq_lens int32 [requests]: cached tokens including the new ones, so the last query sees seq_len keys. num_splits:
    how many programs share a tile's keys. The rest as `paged_decode`. Results of tokens outside all requests are
    undefined. Returns out [num_tokens, num_heads, head_dim], q's dtype.
    """
    num_heads, head_dim = q.shape[1:]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    requests = seq_lens.shape[0]
    if requests == 0 or max_query_len == 0:
        return out
    group = num_heads // num_kv_heads
    launch = launch or extend_launch(platform(), head_dim, key_cache.element_size(), max_query_len * group)
    tiles = cdiv(max_query_len * group, launch.block_m)
    partial = lse = None
    if num_splits > 1:
        partial = torch.empty((*q.shape[:2], num_splits, head_dim), dtype=torch.float32, device=q.device)
        lse = torch.empty(partial.shape[:3], dtype=torch.float32, device=q.device)
    values, constants = paged_arguments(
        q, (key_cache, value_cache), block_tables, out, launch, num_kv_heads=num_kv_heads, block_size=block_size,
        shuffled=shuffled, scale=scale, window=window, softcap=softcap, num_splits=num_splits,
    )  # fmt: skip
    _extend_kernel[(num_kv_heads, tiles * num_splits, requests)](
        q, key_cache, value_cache, block_tables, cu_query_lens, seq_lens, sinks, k_scale, v_scale, out, partial, lse,
        *values,
        **constants,
    )  # fmt: skip
    if num_splits > 1:
        heads = min(_MERGED_HEADS, next_power_of_2(num_heads))
        _merge_kernel[(cdiv(num_heads, heads), q.shape[0])](
            partial, lse, out, *out.stride()[:2], num_splits,
            HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), MERGE_M=heads,
        )  # fmt: skip
    return out


# A table is as wide as the step needs: it must not be compiled for.
@quick
@triton.jit(do_not_specialize=["table_row", "window", "num_splits"])
def _extend_kernel(
    q, key_cache, value_cache, block_tables, cu_query_lens, seq_lens, sinks, k_scale, v_scale, out, partial, lse,
    q_row, q_head, k_block, k_token, k_head, v_block, v_token, v_head, table_row, out_row, out_head,
    qk_scale, window, softcap, num_splits,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, X: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M (token, head) pairs of one request and kv head, and a share of their keys."""
    kv_head = tl.program_id(0)
    request = tl.program_id(2)
    first_token = tl.load(cu_query_lens + request)
    query_len = tl.load(cu_query_lens + request + 1) - first_token
    # The last tiles see the most keys: they start first.
    index = tl.num_programs(1) - 1 - tl.program_id(1)
    start = index // num_splits * BLOCK_M
    split = index % num_splits
    if start >= query_len * GROUP:
        return
    seq_len = tl.load(seq_lens + request)
    context = seq_len - query_len
    pair = start + tl.arange(0, BLOCK_M)
    token = pair // GROUP
    head = kv_head * GROUP + pair % GROUP
    d = tl.arange(0, BLOCK_D)
    mine = (token < query_len)[:, None] & (d < HEAD_DIM)[None, :]
    row = (first_token + token).to(tl.int64)
    query = tl.load(q + (row * q_row + head * q_head)[:, None] + d[None, :], mask=mine, other=0.0)
    query_pos = context + tl.minimum(token, query_len - 1)

    if k_scale is not None:
        qk_scale *= tl.load(k_scale)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks is not None:
        first = split == 0  # the sink counts once
        best = tl.where(first, tl.load(sinks + head) * 1.4426950408889634, float("-inf"))
        total += tl.where(first, 1.0, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Keys [low, high) are seen by some row of the tile, those below `full` by every row (without a window).
    low = tl.maximum(context + start // GROUP - window + 1, 0) if HAS_WINDOW else 0
    high = context + tl.minimum((start + BLOCK_M - 1) // GROUP + 1, query_len)
    full = low // BLOCK_N * BLOCK_N
    if not HAS_WINDOW:
        full = (context + start // GROUP + 1) // BLOCK_N * BLOCK_N
    begin = low // BLOCK_N * BLOCK_N
    end = high
    if partial is not None:
        share = tl.cdiv(tl.cdiv(high, BLOCK_N) - begin // BLOCK_N, num_splits) * BLOCK_N
        begin += split * share
        end = tl.minimum(begin + share, high)
    table = block_tables + request.to(tl.int64) * table_row
    best, total, acc = _attend(
        query, query_pos, best, total, acc, key_cache, value_cache, table, begin, tl.minimum(full, end), low, high,
        k_block, k_token, kv_head * k_head, v_block, v_token, kv_head * v_head, qk_scale, window, softcap,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X, False, HAS_WINDOW, False, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    best, total, acc = _attend(
        query, query_pos, best, total, acc, key_cache, value_cache, table, tl.maximum(full, begin), end, low, high,
        k_block, k_token, kv_head * k_head, v_block, v_token, kv_head * v_head, qk_scale, window, softcap,
        HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X, True, HAS_WINDOW, partial is not None, HAS_SOFTCAP, PRECISION,
    )  # fmt: skip
    if partial is not None:
        # A row may see none of these keys: then it stores zeros, with no weight.
        found = total > 0.0
        total = tl.where(found, total, 1.0)
    acc = acc / total[:, None]
    if v_scale is not None:
        acc *= tl.load(v_scale)
    if partial is None:
        to = out + (row * out_row + head * out_head)[:, None] + d[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=mine)
    else:
        entry = ((row * tl.num_programs(0) * GROUP + head) * num_splits + split).to(tl.int64)
        tl.store(lse + entry, tl.where(found, best + tl.log2(total), float("-inf")), mask=token < query_len)
        tl.store(partial + entry[:, None] * HEAD_DIM + d[None, :], acc, mask=mine)


@triton.jit
def _attend(
    query, query_pos, best, total, acc, key_cache, value_cache, table, begin, end, low, high,
    k_block, k_token, k_offset, v_block, v_token, v_offset, qk_scale, window, softcap,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr,
    MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, SPLIT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Continue with the keys from `begin` to `end`; not MASKED: every row sees them all."""
    VALUE_STEP: tl.constexpr = X if X > 0 else 1
    k_pos = begin + tl.arange(0, BLOCK_N)
    v_pos = begin + tl.arange(0, BLOCK_N // VALUE_STEP) * VALUE_STEP
    k_ids = tl.load(table + k_pos // BLOCK_SIZE, mask=k_pos < high, other=0)
    v_ids = tl.load(table + v_pos // BLOCK_SIZE, mask=v_pos < high, other=0)
    for _ in range(begin, end, BLOCK_N):
        k = key_tile(
            key_cache, k_ids, k_pos, (k_pos >= low) & (k_pos < high), k_block, k_token, k_offset,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X,
        )  # fmt: skip
        v = value_tile(
            value_cache, v_ids, v_pos, low, high, v_block, v_token, v_offset,
            HEAD_DIM, BLOCK_D, BLOCK_N, BLOCK_SIZE, X,
        )  # fmt: skip
        scores = tl.dot(query, k.to(query.dtype), input_precision=PRECISION) * qk_scale
        if HAS_SOFTCAP:
            scores = capped(scores, softcap)
        if MASKED:
            distance = query_pos[:, None] - k_pos[None, :]
            seen = distance >= 0
            if HAS_WINDOW:
                seen = seen & (distance < window)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        if HAS_WINDOW or SPLIT:
            # A row may see no key of the first tiles: avoid the difference of two infinities.
            higher = tl.maximum(higher, -1.0e30)
        decay = tl.exp2(best - higher)
        weights = tl.exp2(scores - higher[:, None])
        total = total * decay + tl.sum(weights, 1)
        best = higher
        v = v.to(query.dtype)
        if MASKED and X > 0:
            v = finite(v)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(query.dtype), v, acc, input_precision=PRECISION)
        k_pos += BLOCK_N
        v_pos += BLOCK_N
        k_ids = tl.load(table + k_pos // BLOCK_SIZE, mask=k_pos < high, other=0)
        v_ids = tl.load(table + v_pos // BLOCK_SIZE, mask=v_pos < high, other=0)
    return best, total, acc


@quick
@triton.jit(do_not_specialize=["num_splits"])
def _merge_kernel(
    partial, lse, out, out_row, out_head, num_splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MERGE_M: tl.constexpr,
):  # fmt: skip
    """One program: MERGE_M heads of one token."""
    heads = tl.program_id(0) * MERGE_M + tl.arange(0, MERGE_M)
    merge_tile(
        partial, lse, out, tl.program_id(1), heads, heads < HEADS, num_splits, num_splits, out_row, out_head,
        HEADS, HEAD_DIM, BLOCK_D, MERGE_M,
    )  # fmt: skip
