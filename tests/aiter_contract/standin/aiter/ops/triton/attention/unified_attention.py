"""aiter.ops.triton.attention.unified_attention."""

from __future__ import annotations

import torch
from aiter import _checks, _math, _standin
from aiter._standin import record, require


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def unified_attention(
    q,
    k,
    v,
    out,
    cu_seqlens_q,
    max_seqlen_q,
    seqused_k,
    max_seqlen_k,
    softmax_scale,
    causal,
    window_size,
    block_table,
    softcap,
    q_descale,
    k_descale,
    v_descale,
    q_scales=None,
    alibi_slopes=None,
    output_scale=None,
    qq_bias=None,
    sinks=None,
    shuffled_kv_cache: bool = False,
    skip_reduce: bool = False,
):
    """Mixed prefill and decode over linear [NB, BS, KH, D] or shuffled caches; window W is `(W - 1, _)`, and only the
    left side counts. A shuffled cache with a head_dim that is no power of two (NaN), max_seqlen_q 1 with longer
    queries, fp8 KV without descales and lengths past max_seqlen_k are violations.
    """
    assert causal, "Only causal attention is supported"
    window = 1 + window_size[0]
    tokens, heads, dim = q.shape
    if sinks is not None:
        assert sinks.shape[0] == heads, "Sinks must be num_query_heads size"
    fp8 = _standin.device.fp8
    if shuffled_kv_cache:
        _checks.packed_shapes(k, v, dim)
        num_blocks, kv_heads, _, block_size, _ = k.shape
        require(v.dim() == 5 and dim == _power_of_two(dim), f"shuffled with D = {dim} or a {v.dim()}-D V gives garbage")
    else:
        num_blocks, block_size, kv_heads, _ = k.shape
        require(k.shape == v.shape and k.shape[3] == dim, f"k {tuple(k.shape)}, v {tuple(v.shape)} for heads of {dim}")
        require(k.stride(3) == v.stride(3) == 1, "the last dim of the caches must be dense")
    if shuffled_kv_cache and q.dtype == k.dtype == fp8:
        assert block_size >= 32, (
            "For A8W8 Unified Attention with pre-shuffled KV cache, only block_size >= 32 is supported"
        )
    _demand_route(tokens, len(seqused_k), heads, kv_heads, block_size, max_seqlen_q, max_seqlen_k, window, k.dtype)
    require(k.dtype == v.dtype and k.dtype in (q.dtype, fp8), f"the KV cache is {k.dtype}, fp8 here {fp8}")
    require(k.dtype != fp8 or (k_descale is not None and v_descale is not None), "fp8 KV needs k_descale and v_descale")
    require(dim >= 16 and q.stride(2) == out.stride(2) == 1, "heads must be dense and of 16 dims or more")
    require(tuple(out.shape) == tuple(q.shape), f"out is {tuple(out.shape)}")
    require(q_scales is None and qq_bias is None and output_scale is None and not skip_reduce, "not covered here")
    starts = torch.tensor(_checks.indptr("cu_seqlens_q", cu_seqlens_q))
    _checks.tensor("seqused_k", seqused_k, torch.int32, (starts.shape[0] - 1,))
    require(block_table.dtype == torch.int32 and block_table.stride(1) == 1, "block_table must be int32 of dense rows")
    require(block_table.shape[0] == seqused_k.shape[0], "block_table and seqused_k differ in sequences")
    _checks.paging(block_table.contiguous(), seqused_k, block_size, num_blocks, max_seqlen_k)
    qlens, lens = starts.diff(), seqused_k.long()
    require(
        not qlens.numel() or int(qlens.max()) <= max_seqlen_q, f"max_seqlen_q {max_seqlen_q} is below a query's length"
    )
    require(bool((lens >= qlens).all() | (lens == 0).any()), "a sequence has fewer keys than queries")
    require(int(starts[-1]) <= tokens, f"cu_seqlens_q ends at {int(starts[-1])} of {tokens} tokens")
    scale = softmax_scale * (1.0 if q_descale is None else float(q_descale))
    factor = 1.0
    if k_descale is not None and v_descale is not None:  # applied whatever the cache's dtype
        scale, factor = scale * float(k_descale.view(-1)[0]), float(v_descale.view(-1)[0])
    read = (_math.packed_key, _math.packed_value) if shuffled_kv_cache else (_math.linear, _math.linear)
    _math.poison(out)
    for length in qlens.unique().tolist():  # sequences with queries of one length together
        at = (qlens == length).nonzero()[:, 0]
        rows = starts[at, None] + torch.arange(length)
        ids = block_table[at, : -(-int(lens[at].max()) // block_size)]
        positions = lens[at, None] - length + torch.arange(length)
        got, _ = _math.attention(
            q[rows], read[0](k, ids), read[1](v, ids), positions, lens[at], scale,
            window=window, softcap=softcap if softcap > 0 else 0.0, alibi=alibi_slopes, sinks=sinks,
        )  # fmt: skip
        out[rows] = (got * factor).to(out.dtype)
    return out


def _demand_route(tokens, seqs, heads, kv_heads, block_size, max_q, max_k, window, kv_dtype) -> None:
    """Which kernel, and what the split-KV one asserts of the block size and dtype."""
    group = heads // kv_heads
    rows = (16 if group <= 16 else _power_of_two(group)) // group
    programs = (seqs if max_q == 1 else tokens // rows + seqs) * kv_heads
    flat = window > 0 or max_k <= 512 or programs > 4 * _standin.device.cus
    record("unified_attention", "2d" if flat else "3d")
    if flat:
        return
    known = (torch.float16, torch.bfloat16, _standin.device.fp8)
    assert kv_dtype in known, f"kv_cache_dtype only supports {known}, in arch = {_standin.device.arch}"
    tile = min(64, _power_of_two(block_size))
    assert tile <= block_size or tile % block_size == 0, "TILE_SIZE needs to be divisible by block_size"
