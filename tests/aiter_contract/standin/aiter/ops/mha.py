"""aiter.ops.mha: prefill."""

from __future__ import annotations

from itertools import pairwise

import torch
from aiter import _checks, _math, _standin
from aiter._standin import check, record, require


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    min_seqlen_q=0,
    dropout_p=0.0,
    softmax_scale=None,
    logits_soft_cap=0.0,
    causal=False,
    window_size=(-1, -1, 0),
    bias=None,
    alibi_slopes=None,
    deterministic=False,
    return_lse=False,
    return_attn_probs=False,
    how_v3_bf16_cvt=1,
    block_table=None,
    out=None,
    cu_seqlens_q_padded=None,
    cu_seqlens_k_padded=None,
    sink_ptr=None,
):
    """q [Tq, H, D], k [Tk, KH, D], v [Tk, KH, Dv] -> out [Tq, H, Dv], with return_lse also float32 [H, Tq].

    Reproduced: bf16 with D = 128 (or 192/128) and no window, softcap, alibi or bias goes to the fmha_v3 kernel, which
    drops `sink_ptr`. A row that sees no key is 0 with -inf. block_table raises UnboundLocalError (CK) or is a violation
    (v3 faults); whether the log-sum-exp counts the sinks is not established, so asking for both is one too.
    """
    tq, heads, dim = q.shape
    _, kv_heads, dim_v = v.shape
    left, right = (-1 if w >= max_seqlen_k else w for w in window_size[:2])
    windowed = left > 0 or right > 0  # (0, 0) passes for no window in this gate
    plain = not windowed and logits_soft_cap == 0.0 and alibi_slopes is None and bias is None and dropout_p == 0.0
    v3 = plain and q.dtype == torch.bfloat16 and (dim, dim_v) in ((128, 128), (192, 128))
    lean = (dim, dim_v) == (192, 128) and sink_ptr is None and not return_lse and block_table is None
    route = "ck" if not v3 else "opus" if lean and _standin.device.arch == "gfx950" else "fmha_v3"
    record("flash_attn_varlen_func", route)
    if block_table is not None:
        require(route == "ck", "flash_attn_varlen_func: fmha_v3 faults on a block_table")
        raise UnboundLocalError("cannot access local variable 'filter_fwd' where it is not associated with a value")
    if sink_ptr is not None:
        assert sink_ptr.shape[0] == heads, "sink_ptr has incorrect shape"
        require(not return_lse, "flash_attn_varlen_func: sinks with return_lse: not established what the lse counts")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        assert return_lse
    check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16 data type")
    check(q.dtype == k.dtype == v.dtype, "query, key and value must have the same dtype")
    check(max(dim, dim_v) <= 256, "CK only supports head dimension at most 256")
    check(heads % kv_heads == 0, "Number of heads in key/value must divide number of heads in query")
    require(k.shape[:2] == v.shape[:2] and k.shape[2] == dim, f"k {tuple(k.shape)} against v {tuple(v.shape)}")
    require(
        dropout_p == 0.0 and bias is None and not return_attn_probs, "the stand-in covers no dropout, bias or probs"
    )
    require(len(window_size) == 2 or window_size[2] == 0, "the stand-in covers no sink tokens")
    require(cu_seqlens_q_padded is None and cu_seqlens_k_padded is None, "the stand-in covers no padding")
    starts_q = _checks.indptr("cu_seqlens_q", cu_seqlens_q, tq)
    starts_k = _checks.indptr("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    require(len(starts_q) == len(starts_k), "cu_seqlens_q and cu_seqlens_k differ in length")
    longest = [max(b - a for a, b in pairwise(s)) for s in (starts_q, starts_k)]
    require(longest[0] <= max_seqlen_q, f"max_seqlen_q {max_seqlen_q} is below {longest[0]}: the grid is too small")
    require(longest[1] <= max_seqlen_k, f"max_seqlen_k {max_seqlen_k} is below {longest[1]}")
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    result = torch.empty(tq, heads, dim_v, dtype=q.dtype) if out is None else out
    _checks.tensor("out", result, q.dtype, (tq, heads, dim_v))
    _math.poison(result)
    lse = torch.full((heads, tq), float("nan"))
    sinks = None if route == "fmha_v3" else sink_ptr
    if route == "fmha_v3":
        left, right = -1, -1
    right = min(right, 0) if causal and right >= 0 else 0 if causal else right
    for i in range(len(starts_q) - 1):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        num_q, num_k = rows.stop - rows.start, keys.stop - keys.start
        positions = (torch.arange(num_q) + num_k - num_q)[None]
        got, sums = _math.attention(
            q[None, rows], k[None, keys].float(), v[None, keys].float(), positions, torch.tensor([num_k]), scale,
            window=left + 1, softcap=logits_soft_cap, alibi=alibi_slopes, sinks=sinks,
            right=None if right < 0 else right,
        )  # fmt: skip
        result[rows], lse[:, rows] = got[0].to(q.dtype), sums[0].T
    return (result, lse) if return_lse else result


def mha_batch_prefill_func(
    q,
    k,
    v,
    cu_seqlens_q,
    kv_indptr,
    kv_page_indices,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    logits_soft_cap=0.0,
    causal=False,
    window_size=(-1, -1),
    alibi_slopes=None,
    deterministic=False,
    return_lse=False,
    return_attn_probs=False,
    out=None,
    kv_last_page_lens=None,
    block_table=None,
    seqlen_k=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    kv_block_descale=None,
    sink_ptr=None,
    sink_size=0,
):
    """Prefill over pages: 5-D shuffled, 4-D linear or 3-D (page 1) K and V of q's dtype, pages listed by kv_indptr and
    kv_page_indices with the last one's fill in kv_last_page_lens. fp8 and block_table are not covered (violations)."""
    record("mha_batch_prefill_func")
    dim, x = q.shape[-1], 16 // k.element_size()
    packed = k.dim() == v.dim() == 5
    if not packed and not (k.dim() == v.dim() and k.dim() in (3, 4)):
        raise ValueError("Batch prefill requires 5D vectorized, 4D linear, or 3D linear (page_size=1) K/V tensors")
    if dim % x:
        raise ValueError("Batch prefill requires head size divisible by vector size")
    if packed and k.size(-3) * x != dim:
        raise ValueError("K vectorized layout does not match Q head size")
    if packed and k.size(-2) % x:
        raise ValueError("Vectorized KV requires page size divisible by vector size")
    if not packed and k.size(-1) != dim:
        raise ValueError("K linear layout does not match Q head size")
    check(q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype, "K/V dtype must equal Q's")
    require(block_table is None and seqlen_k is None, "the stand-in covers kv_indptr, not block_table")
    page = k.size(3) if packed else k.size(1) if k.dim() == 4 else 1
    require(page == 1 or kv_last_page_lens is not None, "pages of more than one token need kv_last_page_lens")
    pages = _checks.indptr("kv_indptr", kv_indptr)
    require(pages[-1] <= kv_page_indices.shape[0], "kv_indptr reaches past kv_page_indices")
    ids = kv_page_indices[: pages[-1]]
    require(ids.dtype == torch.int32 and (not ids.numel() or int(ids.max()) < k.shape[0]), "a page outside the cache")
    read = (_math.packed_key, _math.packed_value) if packed else (_math.linear, _math.linear)
    full = [t.unsqueeze(1) if t.dim() == 3 else t for t in (k, v)]
    keys, values, ends = [], [], [0]
    for i in range(len(pages) - 1):
        own = ids[None, pages[i] : pages[i + 1]]
        fill = 1 if page == 1 else int(kv_last_page_lens[i])
        length = (own.numel() - 1) * page + fill if own.numel() else 0
        keys.append(read[0](full[0], own)[0, :length])
        values.append(read[1](full[1], own)[0, :length])
        ends.append(ends[-1] + length)
    return flash_attn_varlen_func(
        q, torch.cat(keys).to(q.dtype), torch.cat(values).to(q.dtype), cu_seqlens_q,
        torch.tensor(ends, dtype=torch.int32), max_seqlen_q, max_seqlen_k, softmax_scale=softmax_scale,
        logits_soft_cap=logits_soft_cap, causal=causal, window_size=window_size, alibi_slopes=alibi_slopes,
        return_lse=return_lse, out=out, sink_ptr=sink_ptr,
    )  # fmt: skip
