"""HIP paged attention for decode, and `paged_attention_common`, which chooses HIP or ASM."""

from __future__ import annotations

import math

import torch

from aiter import _checks, _math, _standin
from aiter._asm import pa_fwd_asm
from aiter._standin import record, require


def _validate_table(op: str, table: torch.Tensor, lens: torch.Tensor, block_size: int, max_context_len: int) -> None:
    blocks = math.ceil(max_context_len / block_size)
    if table.dim() != 2:
        raise ValueError(f"{op}: block_tables must be 2D [num_seqs, max_num_blocks_per_seq], got {tuple(table.shape)}")
    if table.size(1) < blocks:
        raise ValueError(
            f"{op}: block_tables.size(1)={table.size(1)} is too small for max_context_len={max_context_len} and "
            f"block_size={block_size}; need at least {blocks} block-table entries per sequence"
        )
    if lens.size(0) != table.size(0):
        raise ValueError(f"{op}: context_lens.size(0)={lens.size(0)} must match block_tables.size(0)={table.size(0)}")


def _common_demands(op: str, gqa: int, partition_size: int, mtp: int, fp8_out_scale: object) -> None:
    require(_standin.device.arch in _standin.CU_COUNTS, f"{op} has no kernel for this device")
    require(gqa <= 16, f"{op}: {gqa} query heads per KV head: beyond 16 the head index is wrong")
    require(partition_size == 256, f"{op}: the kernel is built for partitions of 256")
    require(mtp == 1 and fp8_out_scale is None, f"{op}: the stand-in covers mtp 1 and no fp8 output")


def paged_attention_v1(
    out: torch.Tensor,
    workspace_buffer: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scale: float,
    block_tables: torch.Tensor,
    cu_query_lens: torch.Tensor | None,
    context_lens: torch.Tensor,
    max_context_len: int,
    alibi_slopes: torch.Tensor | None,
    kv_cache_dtype: str,
    kv_cache_layout: str,
    logits_soft_cap: float,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    fp8_out_scale: torch.Tensor | None = None,
    partition_size: int = 256,
    mtp: int = 1,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Decode over linear caches. Head dims other than 64/128/192/256 (D < 64 gives garbage), GQA > 16, odd
    block sizes and K/V of unequal strides are violations. Rows with more than one query are skipped: NaN. Rows with
    none (cu_query_lens equal) are a violation: the kernel writes the next sequence's row, or one past the end.
    """
    record("paged_attention_v1", "hip")
    op = "paged_attention_v1"
    if kv_cache_dtype not in ("auto", "fp8", "fp8_e4m3"):
        raise ValueError(f"Unsupported kv_cache_dtype: {kv_cache_dtype}")
    for t in (query, out):
        if t.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"Unsupported data type: {t.dtype}")
    hnd = kv_cache_layout == "HND"
    require(kv_cache_layout in ("NHD", "HND"), f"{op}: layout {kv_cache_layout!r} is read as NHD")
    num_blocks, block_size, kv_heads, head_dim = (key_cache.transpose(1, 2) if hnd else key_cache).shape
    num_seqs, heads = block_tables.size(0), query.size(1)
    _validate_table(op, block_tables, context_lens, block_size, max_context_len)
    partitions = math.ceil(max_context_len / partition_size)
    needed = num_seqs * mtp * heads * partitions * (query.size(2) * query.element_size() + 2 * 4)
    given = workspace_buffer.numel() * workspace_buffer.element_size()
    if given < needed:
        raise ValueError(f"{op}: workspace_buffer is too small ({given} bytes); need at least {needed} bytes")
    _common_demands(op, heads // kv_heads, partition_size, mtp, fp8_out_scale)
    most = 64 if key_cache.element_size() == 1 else 32
    _standin.check(block_size <= most, f"{op}: static assertion failed: BLOCK_SIZE <= {most} in the kernel's JIT build")
    require(block_size in (16, 32, 64), f"{op}: block size {block_size} indexes wrongly")
    require(head_dim == query.size(2) and head_dim in (64, 128, 192, 256), f"{op}: head_dim {head_dim} gives garbage")
    _checks.dense_rows("query", query)
    _checks.tensor("out", out, out.dtype, tuple(query.shape))
    require(key_cache.shape == value_cache.shape, f"{op}: key and value caches differ in shape")
    require(key_cache.stride() == value_cache.stride(), f"{op}: K's strides serve V too")
    require(key_cache.stride(-1) == 1, f"{op}: a head's dims must be dense")
    for cache in (key_cache, value_cache):
        _checks.cache_dtype(kv_cache_dtype, cache, query.dtype)
    _checks.scale("k_scale", k_scale)
    _checks.scale("v_scale", v_scale)
    if alibi_slopes is not None:
        _checks.tensor("alibi_slopes", alibi_slopes, torch.float32, (heads,))
    _checks.paging(block_tables, context_lens, block_size, num_blocks, max_context_len)
    workspace_buffer.view(-1).view(torch.uint8)[:needed].fill_(255)
    rows, decoded = _query_rows(cu_query_lens, num_seqs, query.shape[0])
    _math.poison(out)
    lens = context_lens[decoded]
    ids = block_tables[decoded, : -(-int(context_lens.max()) // block_size)] if num_seqs else block_tables
    planes = [cache.transpose(1, 2) if hnd else cache for cache in (key_cache, value_cache)]
    k, v = (_math.linear(_as_fp8(plane), ids) for plane in planes)
    factor = (1.0, 1.0) if kv_cache_dtype == "auto" else (float(k_scale), float(v_scale))
    fp8 = kv_cache_dtype != "auto"
    _decode(out, query, rows, k, v, lens, block_size, scale, factor, fp8, sliding_window, logits_soft_cap, alibi_slopes)
    return out


def _query_rows(cu: torch.Tensor | None, num_seqs: int, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The query rows to compute and the sequences they belong to."""
    if cu is None:
        require(num_rows >= num_seqs, f"{num_rows} query rows for {num_seqs} sequences")
        return torch.arange(num_seqs), torch.arange(num_seqs)
    require(cu.dtype == torch.int32 and cu.stride() == (1,), "cu_query_lens must be a dense int32 vector")
    room = cu.untyped_storage().nbytes() // 4 - cu.storage_offset()
    require(room > num_seqs, f"cu_query_lens is read to entry {num_seqs}, past its {room}")
    starts = cu.as_strided((num_seqs + 1,), (1,)).long()
    lens = starts.diff()
    require(bool((lens >= 1).all()), "a sequence without a query: the kernel writes the next one's row in its place")
    require(int(starts[-1]) <= num_rows, f"cu_query_lens ends at {int(starts[-1])} of {num_rows} query rows")
    decoded = (lens == 1).nonzero()[:, 0]
    return starts[decoded], decoded


def _as_fp8(plane: torch.Tensor) -> torch.Tensor:
    return plane.view(_standin.device.fp8) if plane.dtype == torch.uint8 else plane


def _decode(
    out: torch.Tensor,
    query: torch.Tensor,
    rows: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lens: torch.Tensor,
    block_size: int,
    scale: float,
    kv_scales: tuple[float, float],
    fp8: bool,
    window: int = 0,
    softcap: float = 0.0,
    alibi: torch.Tensor | None = None,
) -> None:
    """One query per sequence; out[rows] written. A sequence of length 0 has nothing to read: its row stays NaN. Values
    beyond a length, in its last block, are multiplied by 0: NaN among them spreads (aiter PR 5401)."""
    last = lens.long()[:, None] - 1
    if fp8:
        require(alibi is None, "the stand-in covers no alibi over fp8 caches")
        got = _multiplied_in_fp8(query[rows], k, v, last, scale * kv_scales[0], window, softcap)
    else:
        got, _ = _math.attention(
            query[rows][:, None], k, v, last, lens, scale * kv_scales[0], window=window, softcap=softcap, alibi=alibi
        )
        got = got[:, 0]
    j = torch.arange(k.shape[1])
    tail = (j > last) & (j < -(-lens.long()[:, None] // block_size) * block_size)
    spread = (v * 0.0).masked_fill(~tail[..., None, None], 0.0).sum(1)
    got = (got + spread.repeat_interleave(got.shape[1] // v.shape[2], 1)) * kv_scales[1]
    got[lens == 0] = float("nan")
    out[rows] = got.to(out.dtype)


def _multiplied_in_fp8(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, last: torch.Tensor, scale: float, window: int, softcap: float
) -> torch.Tensor:
    """Both products are of fp8 numbers: the query is rounded to it, and in each partition of 256 keys the weights, when
    they are divided by their sum there (aiter `csrc/cpp_itfs/pa`: `__builtin_amdgcn_cvt_pk_fp8_f32`). [S, H, D]."""
    fp8, kv_heads = _standin.device.fp8, k.shape[2]
    q = query.to(fp8).float().unflatten(1, (kv_heads, -1))
    logits = torch.einsum("skgd,slkd->skgl", q, k) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    j = torch.arange(k.shape[1])
    seen = (j <= last) & (j > last - window if window > 0 else j >= 0)
    logits = logits.masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    v = v.masked_fill(~seen[..., None, None], 0.0)
    out, total, top = torch.zeros_like(q), torch.zeros(q.shape[:3]), logits.amax(-1)
    for part, values in zip(logits.split(256, -1), v.split(256, 1), strict=True):
        weights = torch.exp(part - part.amax(-1, keepdim=True))
        sums = weights.sum(-1)
        weights = (weights / (sums[..., None] + 1e-6)).to(fp8).float()
        share = sums * torch.exp(part.amax(-1) - top)
        out += torch.einsum("skgl,slkd->skgd", weights, values) * share[..., None]
        total += share
    return (out / total[..., None]).flatten(1, 2)


def paged_attention_rocm(
    out: torch.Tensor,
    exp_sums: torch.Tensor,
    max_logits: torch.Tensor,
    tmp_out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    num_kv_heads: int,
    scale: float,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    block_size: int,
    max_context_len: int,
    alibi_slopes: torch.Tensor | None,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    fp8_out_scale: torch.Tensor | None = None,
    partition_size: int = 256,
    mtp: int = 1,
    q_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Decode over x-packed K and V of either kind (by V's dims). None as a scale counts as 1. Head dims other than
    64/128/256 (192 for 16 bits), GQA > 16, a scale of several elements (which switches to an index that ignores the
    block table when it has one per slot and head) are violations. Scratch and rows beyond the sequences become NaN.
    """
    record("paged_attention_rocm", "hip")
    op = "paged_attention_rocm"
    partitions = math.ceil(max_context_len / partition_size)
    for name, scratch in (("tmp_out", tmp_out), ("exp_sums", exp_sums), ("max_logits", max_logits)):
        if scratch.dim() < 3:
            raise ValueError(
                f"{op}: {name} must have shape [..., max_num_partitions, head_size], got {tuple(scratch.shape)}"
            )
        if scratch.size(2) < partitions:
            raise ValueError(
                f"{op}: {name}.size(2)={scratch.size(2)} is too small for max_context_len={max_context_len} and "
                f"partition_size={partition_size}; need at least {partitions} partition slots"
            )
    _validate_table(op, block_tables, context_lens, block_size, max_context_len)
    known = (torch.bfloat16, torch.float16, torch.float8_e4m3fnuz, torch.float8_e4m3fn)
    for t in (query, key_cache, out):
        if t.dtype not in known:
            raise KeyError(t.dtype)
    num_seqs, (_, heads, head_dim) = block_tables.size(0), query.shape
    _common_demands(op, heads // num_kv_heads, partition_size, mtp, fp8_out_scale)
    require(query.element_size() == 2 and q_scale is None, f"{op}: the stand-in covers 16-bit queries")
    require(query.shape[0] >= num_seqs, f"{op}: {query.shape[0]} query rows for {num_seqs} sequences")
    _checks.packed_shapes(key_cache, value_cache, head_dim)
    require(key_cache.shape[1] == num_kv_heads, f"{op}: num_kv_heads {num_kv_heads} is not the cache's")
    require(key_cache.shape[3] == block_size and block_size % 16 == 0, f"{op}: block_size {block_size} misreads")
    wide = (64, 128, 192, 256) if key_cache.element_size() == 2 else (64, 128, 256)
    require(head_dim in wide, f"{op}: head_dim {head_dim} gives garbage")
    require(kv_cache_dtype in ("auto", "fp8", "fp8_e4m3"), f"{op}: kv_cache_dtype {kv_cache_dtype!r} does not compile")
    _checks.cache_dtype(kv_cache_dtype, key_cache, query.dtype)
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        if given is not None:
            _checks.scale(name, given)
    _checks.dense_rows("query", query)
    _checks.tensor("out", out, out.dtype, tuple(query.shape))
    for name, scratch, dtype, width in (
        ("exp_sums", exp_sums, torch.float32, 1),
        ("max_logits", max_logits, torch.float32, 1),
        ("tmp_out", tmp_out, out.dtype, head_dim),
    ):
        _checks.tensor(name, scratch, dtype)
        need = num_seqs * heads * partitions * width
        require(scratch.numel() >= need, f"{op}: {name} has {scratch.numel()} elements, the kernel writes {need}")
        scratch.view(-1)[:need].fill_(float("nan"))
    if alibi_slopes is not None:
        _checks.tensor("alibi_slopes", alibi_slopes, torch.float32, (heads,))
    _checks.paging(block_tables, context_lens, block_size, key_cache.shape[0], max_context_len)
    _math.poison(out)
    ids = block_tables[:, : -(-int(context_lens.max()) // block_size)] if num_seqs else block_tables
    k, v = _math.packed_key(key_cache, ids), _math.packed_value(value_cache, ids)
    factors = [1.0 if t is None or kv_cache_dtype == "auto" else float(t) for t in (k_scale, v_scale)]
    rows = torch.arange(num_seqs)
    fp8, scales = kv_cache_dtype != "auto", (factors[0], factors[1])
    _decode(out, query, rows, k, v, context_lens, block_size, scale, scales, fp8, alibi=alibi_slopes)
    return out


def _should_use_asm_kernel(
    num_seqs: int, num_heads: int, head_size: int, kv_cache_tensor_dtype: torch.dtype, high_precision: int
) -> bool:
    if head_size != 128:
        return False
    if high_precision == 2 or kv_cache_tensor_dtype == torch.int8:
        return True
    return num_seqs * num_heads > 2 * _standin.device.cus


def paged_attention_common(
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    exp_sums: torch.Tensor,
    max_logits: torch.Tensor,
    tmp_out: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables_stride0: int,
    scale: float,
    max_qlen: int = 1,
    max_seq_len: int = 1,
    K_QScale_hip: torch.Tensor | None = None,
    V_QScale_hip: torch.Tensor | None = None,
    K_QScale_asm: torch.Tensor | None = None,
    V_QScale_asm: torch.Tensor | None = None,
    out_: torch.Tensor | None = None,
    qo_indptr: torch.Tensor | None = None,
    high_precision: int | None = 1,
    kernelName: str | None = None,
    kv_cache_dtype: str = "auto",
    kv_cache_tensor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Route by head_size, precision, dtype and query rows * heads > 2 * compute units, then as that kernel does: the
    ASM branch ignores `scale`, the HIP branch `max_qlen` and `qo_indptr` (a violation when they ask for more than one
    query)."""
    asm = _should_use_asm_kernel(*Q.shape, kv_cache_tensor_dtype or K.dtype, high_precision)
    record("paged_attention_common", "asm" if asm else "hip")
    if asm:
        return pa_fwd_asm(
            Q, K, V, block_tables, context_lens, block_tables_stride0, max_qlen, K_QScale_asm, V_QScale_asm, out_,
            qo_indptr, high_precision, kernelName,
        )  # fmt: skip
    require(max_qlen == 1, "paged_attention_common: its HIP branch computes one query per sequence whatever max_qlen")
    output = out_ if out_ is not None else torch.empty_like(Q)
    return paged_attention_rocm(
        output, exp_sums, max_logits, tmp_out, Q, K, V, int(K.size(1)), scale, block_tables, context_lens,
        int(K.size(3)), max_seq_len, None, kv_cache_dtype, K_QScale_hip, V_QScale_hip,
    )  # fmt: skip
