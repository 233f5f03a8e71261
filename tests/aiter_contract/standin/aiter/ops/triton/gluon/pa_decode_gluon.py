"""aiter.ops.triton.gluon.pa_decode_gluon: the shuffled path with sinks, windows and any scale."""

from __future__ import annotations

import torch
from aiter import _checks, _math, _standin
from aiter._standin import record, require


def pa_decode_gluon(
    output: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    context_lengths: torch.Tensor,
    block_tables: torch.Tensor,
    softmax_scale: float,
    query_length: int,
    max_context_partition_num: int,
    context_partition_size: int = 256,
    compute_type: torch.dtype = torch.bfloat16,
    query_scale: torch.Tensor = None,
    key_scale: torch.Tensor = None,
    value_scale: torch.Tensor = None,
    exp_sums: torch.Tensor = None,
    max_logits: torch.Tensor = None,
    temporary_output: torch.Tensor = None,
    alibi_slopes: torch.Tensor = None,
    sinks: torch.Tensor = None,
    sliding_window: int = 0,
    ps: bool = True,
) -> None:
    """Up to four causal queries per sequence, the same number of each. Scales of one element only (more: a violation),
    fp8 KV without them too. Given scratch must be [S, KH, P, queries * GQA(, D)]; it becomes NaN. A sliding_window W
    lets a query see W - query_length keys, its own among them (in the kernels' masks, and in the reference of the
    library's own test). Its output is written through `reshape`: one that is not contiguous would be lost. No alibi is
    read."""
    record("pa_decode_gluon")
    fp8 = _standin.device.fp8
    known = (fp8, torch.bfloat16, torch.float16)
    (rows, heads, dim), kv_heads = query.shape, key_cache.shape[1]
    group = query_length * heads // kv_heads
    assert query_length <= 4, f"query_length == {query_length} exceeds maximum of 4"
    for name, t in (("query", query), ("key_cache", key_cache), ("value_cache", value_cache)):
        assert t.dtype in known, f"{name} tensor only support dtype in [{known}], but got {name}.dtype == {t.dtype}"
    assert output.dtype in known[1:], f"output tensor only support dtype in [{known[1:]}]"
    assert group <= 64, f"equivalent_query_group_size={group} exceeds maximum of 64"
    assert len(key_cache.shape) == 5, f"Expected 5D key_cache tensor, but got shape {key_cache.shape}"
    if value_cache.dim() not in (4, 5):
        raise RuntimeError(f"Unsupported value cache shape: {value_cache.shape}")
    _checks.packed_shapes(key_cache, value_cache, dim)
    require(rows % query_length == 0, f"{rows} query rows: every sequence must have query_length = {query_length}")
    block_size, seqs = key_cache.shape[3], rows // query_length
    assert block_size in (16, 64, 1024), f"kv_block_size == {block_size} not in [16, 64, 1024]"
    require(alibi_slopes is None, "alibi_slopes are never read")
    require(not sliding_window or sliding_window > query_length, f"a window of {sliding_window} sees no key")
    require(query.dtype != fp8 and query_scale is None, "the stand-in covers 16-bit queries")
    require(context_partition_size == 256 and max_context_partition_num >= 1, "partitions are of 256, at least one")
    require(key_cache.dtype in (query.dtype, fp8), f"the KV cache is {key_cache.dtype}")
    factors = [1.0, 1.0]
    if key_cache.dtype == fp8:
        for name, given in (("key_scale", key_scale), ("value_scale", value_scale)):
            _checks.scale(name, given)
        factors = [float(key_scale), float(value_scale)]
    base = (seqs, kv_heads, max_context_partition_num, group)
    for name, t, shape in (
        ("exp_sums", exp_sums, base),
        ("max_logits", max_logits, base),
        ("temporary_output", temporary_output, (*base, dim)),
    ):
        require(t is None or tuple(t.shape) == shape, f"{name} must be {shape}")
        _math.poison(t)
    require(
        context_lengths.shape[0] == block_tables.shape[0] == seqs, "lengths, tables and queries differ in sequences"
    )
    width = block_tables.shape[1] * block_size
    _checks.paging(block_tables, context_lengths, block_size, key_cache.shape[0], width)
    _checks.tensor("output", output, output.dtype, tuple(query.shape))
    lens = context_lengths.long()
    ids = block_tables[:, : -(-int(lens.max()) // block_size)] if seqs else block_tables
    positions = lens[:, None] - query_length + torch.arange(query_length)
    k, v = _math.packed_key(key_cache, ids), _math.packed_value(value_cache, ids)
    got, _ = _math.attention(
        query.unflatten(0, (seqs, query_length)), k, v, positions, lens, softmax_scale * factors[0],
        window=sliding_window - query_length if sliding_window else 0, sinks=sinks,
    )  # fmt: skip
    got[lens == 0] = float("nan")
    _math.poison(output)
    output.copy_((got * factors[1]).flatten(0, 1))
