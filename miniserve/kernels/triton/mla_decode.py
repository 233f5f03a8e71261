# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Decode of multi-head latent attention (DeepSeek-V2): all heads read the same latent, as key and as value.

With the up-projections absorbed into query and output, a cached token is one row kv_c ‖ k_pe, shared by all heads, and
its value is the row's first part. A tile of latents is therefore read once and used twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.common import LOG2E, dot_precision, platform, running_softmax
from miniserve.kernels.triton.launch import Launch, cdiv, mla_launch, next_power_of_2
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

_FUSED_MERGE_VALUES = 32768  # measured on an H100


def mla_decode(
    q: torch.Tensor,
    q_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    kv_scale: torch.Tensor | None = None,
    num_splits: int = 1,
    fresh: int | None = None,
    scratch: DecodeScratch | None = None,
    out: torch.Tensor | None = None,
    launch: Launch | None = None,
    fused_merge: bool | None = None,
) -> torch.Tensor:
    """Attention of each row's one query over its cached latents, including that of its own token.

    q [rows, num_heads, kv_lora_rank], the absorbed query, and q_pe [rows, num_heads, rope_dim], its rotated part, last
    dimensions dense; kv_cache [num_blocks, block_size, kv_lora_rank + rope_dim]; block_tables int32 [rows, width];
    seq_lens int32 [rows], 0 for a padding row, which reads nothing and gets zeros; kv_scale float32 [1]: factor of an
    fp8 cache's codes. num_splits, fresh and scratch (for head_dim = kv_lora_rank) as in `paged_decode`. Returns out
    [rows, num_heads, kv_lora_rank].
    """
    rows, num_heads, rank = q.shape
    rope = q_pe.shape[2]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if rows == 0:
        return out
    arrays = scratch_arrays(scratch, num_splits)
    on = platform()
    launch = launch or mla_launch(on, num_heads, kv_cache.element_size())
    single, settled = num_splits == 1, fresh is not None and on == "cuda"
    if fused_merge is None:
        fused_merge = fuses_merge(on, min(launch.block_m, num_heads), rank, num_splits, _FUSED_MERGE_VALUES)
    _mla_kernel[(cdiv(num_heads, launch.block_m), num_splits, rows)](
        q, q_pe, kv_cache, block_tables, seq_lens, kv_scale, out, *arrays, *q.stride()[:2], *q_pe.stride()[:2],
        *kv_cache.stride()[:2], block_tables.stride(0), *out.stride()[:2], scale * LOG2E, num_splits,
        HEADS=num_heads, RANK=rank, ROPE=rope, BLOCK_R=next_power_of_2(rank), BLOCK_P=max(16, next_power_of_2(rope)),
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_SIZE=kv_cache.shape[1], SINGLE=single,
        MERGE_M=min(launch.block_m, next_power_of_2(num_heads)), FUSED_MERGE=fused_merge and not single,
        SETTLED=settled, PRECISION=dot_precision(on), **launch.options, **launch_options(q.device),
    )  # fmt: skip
    if not single and not fused_merge and scratch is not None:
        merge_splits(scratch, seq_lens, out, block_n=launch.block_n, num_splits=num_splits, settled=settled)
    return out


@quick
@triton.jit(do_not_specialize=["table_row", "num_splits"])
def _mla_kernel(
    q, q_pe, kv_cache, block_tables, seq_lens, kv_scale, out, partial, lse, arrivals,
    q_row, q_head, pe_row, pe_head, block_stride, token_stride, table_row, out_row, out_head, qk_scale, num_splits,
    HEADS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, SINGLE: tl.constexpr,
    MERGE_M: tl.constexpr, FUSED_MERGE: tl.constexpr, SETTLED: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: one row, one split of its keys, up to BLOCK_M heads. Scores are base 2."""
    head_tile = tl.program_id(0)
    split = tl.program_id(1)
    row = tl.program_id(2)
    head = head_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)
    mine = (head < HEADS)[:, None] & (r < RANK)[None, :]
    out_at = out + row.to(tl.int64) * out_row + head[:, None] * out_head + r[None, :]

    if not SETTLED:
        wait(PDL)
    seq_len = tl.load(seq_lens + row)
    _, begin, end, splits = share_of(split, seq_len, 0, num_splits, BLOCK_N, False)
    if begin >= end:
        if SETTLED:
            wait(PDL)
        if split == 0:
            tl.store(out_at, tl.zeros([BLOCK_M, BLOCK_R], out.dtype.element_ty), mask=mine)
        return

    if kv_scale is not None:
        qk_scale *= tl.load(kv_scale)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # summed over the keys once, after the loop
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)

    table = block_tables + row.to(tl.int64) * table_row
    pos = begin * BLOCK_N + tl.arange(0, BLOCK_N)
    # Block ids are read one tile ahead, so that a tile's latents never wait for them.
    ids = tl.load(table + pos // BLOCK_SIZE, mask=pos < seq_len, other=0)
    if SETTLED:
        wait(PDL)
    q_latent = tl.load(q + row.to(tl.int64) * q_row + head[:, None] * q_head + r[None, :], mask=mine, other=0.0)
    q_rope_at = q_pe + row.to(tl.int64) * pe_row + head[:, None] * pe_head + p[None, :]
    q_rope = tl.load(q_rope_at, mask=(head < HEADS)[:, None] & (p < ROPE)[None, :], other=0.0)
    for _ in range(begin, end):
        there = (pos < seq_len)[:, None]
        at = (kv_cache + ids.to(tl.int64) * block_stride + pos % BLOCK_SIZE * token_stride)[:, None]
        if BLOCK_R == RANK:
            latent = tl.load(at + r[None, :], mask=there, other=0.0)
        else:
            latent = tl.load(at + r[None, :], mask=there & (r < RANK)[None, :], other=0.0)
        rope = tl.load(at + RANK + p[None, :], mask=there & (p < ROPE)[None, :], other=0.0)
        visible = pos < seq_len
        pos += BLOCK_N
        ids = tl.load(table + pos // BLOCK_SIZE, mask=pos < seq_len, other=0)
        latent = latent.to(q_latent.dtype)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision=PRECISION)
        scores = tl.dot(q_rope, tl.trans(rope.to(q_latent.dtype)), scores, input_precision=PRECISION) * qk_scale
        weights, decay, best, total = running_softmax(scores, visible, best, total)
        acc = acc * decay[:, None]
        acc = tl.dot(weights.to(q_latent.dtype), latent, acc, input_precision=PRECISION)

    start(PDL)
    denominator = tl.sum(total, 1)
    acc = acc / denominator[:, None]
    if kv_scale is not None:
        acc *= tl.load(kv_scale)
    if SINGLE:
        tl.store(out_at, acc.to(out.dtype.element_ty), mask=mine)
    else:
        entry = (row * HEADS + head).to(tl.int64) * num_splits
        tl.store(partial + (entry + split)[:, None] * RANK + r[None, :], acc, mask=mine)
        tl.store(lse + entry + split, best + tl.log2(denominator), mask=head < HEADS)
        if FUSED_MERGE:  # noqa: SIM102 - the outer test is for the compiler, the inner one for the device
            if last_to_arrive(arrivals + row * tl.num_programs(0) + head_tile, splits):
                few = head_tile * BLOCK_M + tl.arange(0, MERGE_M)
                merge_tile(
                    partial, lse, out, row, few, few < HEADS, splits, num_splits, out_row, out_head,
                    HEADS, RANK, BLOCK_R, MERGE_M,
                )  # fmt: skip
