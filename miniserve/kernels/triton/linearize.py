# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Blocks of a shuffled cache copied into the linear layout, which prefill reads faster than it reads the shuffled one.

A tile of the shuffled layout must be turned in registers before the matrix unit can take it, once for every tile of
queries that reads it; turned here once, it is read as it lies. This pays from some number of query tokens on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.launch import next_power_of_2


def linearize(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy the blocks that each request's new tokens see: shuffled planes, and the rest as `paged_extend` takes it, ->
    linear planes [requests * width, block_size, num_kv_heads, head_dim], block w of request r at r * width + w. Other
    blocks stay uninitialized."""
    _, kv_heads, chunks, block_size, x = key_cache.shape
    requests, width = block_tables.shape
    shape = (requests * width, block_size, kv_heads, chunks * x)
    key, value = (torch.empty(shape, dtype=key_cache.dtype, device=key_cache.device) for _ in range(2))
    _linearize_kernel[(width, kv_heads, requests)](
        key_cache, value_cache, block_tables, cu_query_lens, seq_lens, key, value, key_cache.stride(0),
        value_cache.stride(0), block_tables.stride(0), window or 0,
        KV_HEADS=kv_heads, HEAD_DIM=chunks * x, BLOCK_SIZE=block_size, X=x, BLOCK_T=next_power_of_2(block_size),
        BLOCK_D=next_power_of_2(chunks * x), num_warps=2,
    )  # fmt: skip
    return key, value


@triton.jit(do_not_specialize=["table_row", "window"])
def _linearize_kernel(
    key_cache, value_cache, block_tables, cu_query_lens, seq_lens, key, value, k_block, v_block, table_row, window,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one block and kv head."""
    place = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2).to(tl.int64)
    seq_len = tl.load(seq_lens + request)
    if place * BLOCK_SIZE >= seq_len:
        return
    if window > 0:
        context = seq_len - tl.load(cu_query_lens + request + 1) + tl.load(cu_query_lens + request)
        if (place + 1) * BLOCK_SIZE <= context - window + 1:
            return
    block = tl.load(block_tables + request * table_row + place).to(tl.int64)
    token = tl.arange(0, BLOCK_T)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < BLOCK_SIZE) & (d < HEAD_DIM)
    offset = head * (BLOCK_SIZE * HEAD_DIM)
    k_at = key_cache + block * k_block + offset + d // X * (BLOCK_SIZE * X) + token * X + d % X
    v_at = value_cache + block * v_block + offset + token // X * (HEAD_DIM * X) + d * X + token % X
    to = ((request * tl.num_programs(0) + place) * BLOCK_SIZE + token) * (KV_HEADS * HEAD_DIM) + head * HEAD_DIM + d
    tl.store(key + to, tl.load(k_at, mask=mask), mask=mask)
    tl.store(value + to, tl.load(v_at, mask=mask), mask=mask)
