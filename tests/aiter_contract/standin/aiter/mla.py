"""aiter.mla: decode over the latent cache."""

from __future__ import annotations

import torch

from aiter import _checks, _math, _mla_metadata, _mla_work, _standin
from aiter._mla_metadata import folded_heads, kind
from aiter._mla_plan import folded_spans
from aiter._standin import check, record, require

# Rows of hsa/<arch>/mla/mla_asm.csv, decode with the causal mask: "q kv" -> {(gqa, persistent, qlen)}, lse rows apart.
_SHARED = {
    "bf16 bf16": {(128, 0, 0), (16, 1, 4), (16, 0, 1), (16, 0, 4), (16, 0, 8), (32, 0, 0), (64, 0, 0), (8, 0, 1)},
    "bf16 fp8": {(16, 1, 4)},
    "fp8 fp8": {
        (16, 0, 1),
        (16, 0, 2),
        (16, 0, 4),
        (16, 1, 1),
        (16, 1, 2),
        (16, 1, 4),
        (128, 0, 0),
        (8, 0, 1),
    },
}
_OWN = {
    "gfx942": {"bf16 bf16": {(8, 1, 2)}, "fp8 fp8": {(64, 1, 1), (128, 1, 0)}},
    "gfx950": {
        "bf16 bf16": {(64, 0, 1), (8, 0, 2), (32, 1, 4), (64, 1, 1)},
        "fp8 fp8": {(32, 1, 1), (32, 1, 4), (8, 1, 4)},
    },
}
_LSE = {
    "gfx942": {"fp8 fp8": {(64, 1, 1)}},
    "gfx950": {
        "bf16 bf16": {(16, 1, 4), (32, 1, 4), (64, 1, 1)},
        "fp8 fp8": {(16, 1, 1), (16, 1, 4), (32, 1, 1), (32, 1, 4), (8, 1, 4)},
    },
}
_SPLIT_TILES = (8, 16, 24, 32, 48, 64, 128, 256, 384, 512)  # get_meta_param's table for fp8 queries


def dispatch(
    arch: str, gqa: int, qlen: int, q: str, kv: str, persistent: bool, lse: bool = False, causal: bool = True
) -> tuple[int, int, int]:
    """The row (gqa, persistent, qlen) that asm_mla.cu picks, RuntimeError where there is none."""
    both_fp8, both_bf16 = (q, kv) == ("fp8", "fp8"), (q, kv) == ("bf16", "bf16")
    ps, length, heads, new = int(persistent), qlen, gqa, arch == "gfx950"
    if gqa == 128:
        length, ps = 0, 0 if both_bf16 and not new else ps
    elif gqa == 16 and q == "bf16":
        if persistent or both_bf16:
            length = 4 if qlen <= 4 and (persistent or qlen > 1) else qlen if persistent or qlen == 1 else 8
    elif gqa == 16:
        check(qlen <= 4 or (persistent and new), "only support gqa_ratio=16 fp8 mla decoding with qo_len <= 4")
        length, heads = (min(qlen, 4), 16) if qlen <= 2 else (4, 16 if qlen <= 4 else 32)
    elif gqa == 32 and both_bf16 and not persistent:
        length = 0
    elif gqa == 32 and both_fp8 and persistent and qlen >= 3:
        check(new, "fp8/fp8 with gqa_ratio=32 only supports decode_qlen=1,2 in persistent mode")
        length = 4
    elif gqa == 64 and both_bf16 and not persistent:
        length = 1 if qlen == 1 else 0
    elif gqa == 64 and both_fp8:
        check(persistent, "fp8/fp8 with gqa_ratio=64 only supports persistent mode")
        length = 1 if qlen == 1 else 4
    if new and persistent and both_bf16:
        if (gqa * qlen >= 128 or gqa > 64) and gqa != 48:
            heads, length = 32, 4
        elif gqa * qlen >= 64 or gqa >= 16:
            heads, length = 64, 1
    elif new and persistent and both_fp8:
        if (gqa == 32 and qlen >= 4) or (gqa == 64 and qlen >= 2) or gqa == 128:
            heads, length = 32, 4
        elif (gqa == 16 and qlen in (3, 4)) or (gqa == 32 and qlen in (2, 3)) or (gqa, qlen) == (64, 1):
            heads, length = 16, 4
    row, pair = (heads, ps, length), f"{q} {kv}"
    rows = _LSE[arch].get(pair, set()) if lse and persistent else _SHARED.get(pair, set()) | _OWN[arch].get(pair, set())
    check(
        row in rows and (causal or arch != "gfx942"),
        f"get_heuristic_kernel_mla: cannot get heuristic kernel! q_type:{q} kv_type:{kv} gqa:{heads} ps:{ps} prefill:0 "
        f"causal:{int(causal)} qseqlen:{length} lse:{int(lse)} cprr:0",
    )
    return row


def mla_decode_fwd(
    q,
    kv_buffer,
    o,
    qo_indptr,
    kv_indptr,
    kv_indices,
    kv_last_page_lens,
    max_seqlen_q,
    page_size=1,
    nhead_kv=1,
    sm_scale=None,
    logit_cap=0.0,
    num_kv_splits=None,
    num_kv_splits_indptr=None,
    work_meta_data=None,
    work_indptr=None,
    work_info_set=None,
    reduce_indptr=None,
    reduce_final_map=None,
    reduce_partial_map=None,
    q_scale=None,
    kv_scale=None,
    intra_batch_mode=False,
    return_logits=False,
    return_lse=False,
    g_kv_indptr=None,
    cp_world_size=1,
    cp_rank=0,
    causal=True,
):
    """Absorbed decode: q [T, H, 576], kv_buffer [tokens, 1, 1, 576], o bf16 [T, H, 512] -> (logits, lse).

    Reproduced: sm_scale None is 1/sqrt(576); the gfx950 downgrade of bf16, 16 heads, one query, 32 or more sequences to
    non-persistent; a folded call with several queries leaves the result in a new storage that `o` is switched to, and
    rows in folded order in the old one. Page sizes other than 1, some but not all of the six buffers, buffers of
    another size, another step's plan, and combinations known to fault or to be wrong are violations. NaN: rows without
    keys, with a plan also what the same workgroup does after them; rows past qo_indptr.
    """
    assert logit_cap <= 0, f"{logit_cap=} is not support yet"
    total, heads, dim_v = o.shape
    _, _, _, dim = kv_buffer.shape
    batch = qo_indptr.shape[0] - 1
    six = (work_meta_data, work_indptr, work_info_set, reduce_indptr, reduce_final_map, reduce_partial_map)
    missing = [name for name, t in zip(_mla_metadata.NAMES, six, strict=True) if t is None]
    require(len(missing) in (0, 6), f"mla_decode_fwd: all six buffers or none; {', '.join(missing)} not given")
    arch, kinds, persistent = _standin.device.arch, (kind(q.dtype), kind(kv_buffer.dtype)), not missing
    if persistent and num_kv_splits is None and arch == "gfx950" and kinds == ("bf16", "bf16"):
        persistent = not (heads == 16 and max_seqlen_q == 1 and batch >= 32)
    record("mla_decode_fwd", "persistent" if persistent else "non_persistent")
    seen = folded_heads(arch, heads, max_seqlen_q, *kinds) if persistent else heads
    if not persistent and kinds[0] == "fp8" and heads * max_seqlen_q not in _SPLIT_TILES:
        raise KeyError(heads * max_seqlen_q)
    _demand_inputs(q, kv_buffer, o, nhead_kv, q_scale, kv_scale, kinds)
    dispatch(arch, seen, max_seqlen_q, *kinds, persistent, return_lse, causal=causal or max_seqlen_q == 1)
    both_bf16 = kinds == ("bf16", "bf16")
    wrong = (
        (kinds == ("fp8", "fp8") and (arch, heads, max_seqlen_q) == ("gfx942", 64, 1))
        or (not persistent and both_bf16 and heads == 64 and max_seqlen_q > 1)
        or (arch == "gfx942" and both_bf16 and max_seqlen_q > 4)  # aiter #5679
    )
    require(not wrong, f"mla_decode_fwd: the kernel for {heads} heads and {max_seqlen_q} queries is bad on {arch}")
    require(page_size == 1 and kv_buffer.shape[1] == 1, "mla_decode_fwd: the kernels force page size 1")
    require(g_kv_indptr is None and not intra_batch_mode, "the stand-in covers neither CP nor intra_batch_mode")
    require(causal or max_seqlen_q == 1, "the stand-in covers causal decode")
    starts_q = torch.tensor(_checks.indptr("qo_indptr", qo_indptr, total))
    starts_kv = torch.tensor(_checks.indptr("kv_indptr", kv_indptr))
    _checks.tensor("kv_last_page_lens", kv_last_page_lens, torch.int32)
    require(starts_kv.shape[0] == batch + 1, "qo_indptr and kv_indptr differ in length")
    require(kv_last_page_lens.shape[0] >= batch and bool((kv_last_page_lens[:batch] == 1).all()), "of a page of one: 1")
    _checks.tensor("kv_indices", kv_indices, torch.int32)
    used = kv_indices[: int(starts_kv[-1])]
    require(used.shape[0] == int(starts_kv[-1]), "kv_indptr reaches past kv_indices")
    require(
        not used.numel() or 0 <= int(used.min()) <= int(used.max()) < kv_buffer.shape[0], "a token outside the cache"
    )
    if persistent and (kinds[1] == "fp8" or arch == "gfx942"):
        used = _math.wrapped(used, kv_buffer.stride(0) * kv_buffer.element_size())
    qlens, lens = starts_q.diff(), starts_kv.diff()
    require(bool((qlens <= max_seqlen_q).all()), f"a query of more than max_seqlen_q = {max_seqlen_q} tokens")
    fold = heads // seen
    whole = bool((qlens == max_seqlen_q).all()) and int(starts_q[-1]) == total
    require(fold == 1 or max_seqlen_q == 1 or whole, "folding heads needs every query of max_seqlen_q tokens")
    q_spans = folded_spans([n for n in qlens.tolist() for _ in range(fold)], 1)
    kv_spans = folded_spans(lens.tolist(), fold)
    works = _mla_work.whole_rows(q_spans, kv_spans)
    if persistent:
        _mla_metadata.demand_buffers(six, batch, max_seqlen_q, heads, q.dtype, kv_buffer.dtype)
        works = _mla_work.read_plan(six, q_spans, kv_spans, _mla_metadata.stamp_of(heads, q.dtype, kv_buffer.dtype))
    queries = _folded(q.float() * (float(q_scale) if kinds[0] == "fp8" else 1.0), fold, max_seqlen_q)
    latents = _math.take(kv_buffer.view(-1, dim), used) * (float(kv_scale) if kinds[1] == "fp8" else 1.0)
    scale = dim**-0.5 if sm_scale is None else sm_scale
    got, sums = _mla_work.attend(works, queries[: int(starts_q[-1]) * fold], latents, q_spans, kv_spans, scale, dim_v)
    out, sums = (_unfolded(t, fold, max_seqlen_q) for t in (got, sums[..., None]))
    if fold > 1 and max_seqlen_q > 1:
        o.copy_(got.reshape(o.shape))
        o.set_(out.to(o.dtype))
    else:
        _math.poison(o)
        o[: out.shape[0]] = out.to(o.dtype)
    logits = torch.full((), float("nan")).expand(total, 1, heads, dim_v)
    return logits, sums[..., 0] if return_lse else None


def _demand_inputs(q, kv_buffer, o, nhead_kv, q_scale, kv_scale, kinds) -> None:
    check(q.is_contiguous(), "mla_decode_stage1_asm_fwd:only support Q.is_contiguous() for now")
    check(nhead_kv == 1, "mla_decode_stage1_asm_fwd:only support num_kv_heads==1 for now")
    check(q.shape[2] == kv_buffer.shape[3], "mla_decode_stage1_asm_fwd:only support head_size == KV.size(3) for now")
    check(kinds[0] in ("bf16", "fp8"), f"mla_decode_stage1_asm_fwd: unsupport Q dtype:{q.dtype}")
    check(kinds[1] in ("bf16", "fp8"), f"mla_decode_stage1_asm_fwd: unsupport KV dtype:{kv_buffer.dtype}")
    both = q_scale is not None and kv_scale is not None
    check(kinds[0] != "fp8" or both, "mla_decode_stage1_asm_fwd: fp8 Q requires q_scale and kv_scale")
    require(kinds[1] != "fp8" or kv_scale is not None, "mla_decode_fwd: fp8 KV needs kv_scale (null is read)")
    for name, t in (("q_scale", q_scale), ("kv_scale", kv_scale)):
        if t is not None:
            _checks.scale(name, t)
    require(tuple(q.shape[1:]) == (o.shape[1], 576), f"q must be [T, {o.shape[1]}, 576], not {tuple(q.shape)}")
    require(kv_buffer.shape[2] == 1 and kv_buffer.stride()[2:] == (576, 1), f"kv_buffer {tuple(kv_buffer.shape)}")
    _checks.tensor("o", o, torch.bfloat16, (q.shape[0], q.shape[1], 512))


def _folded(t: torch.Tensor, fold: int, qlen: int) -> torch.Tensor:
    """[T, H, d] -> [T * fold, H / fold, d]: the rows of a sequence for each 16 of its heads, one after the other."""
    if fold == 1:
        return t
    split = t.unflatten(0, (-1, qlen)).unflatten(2, (fold, -1))
    return split.transpose(1, 2).flatten(0, 2)


def _unfolded(t: torch.Tensor, fold: int, qlen: int) -> torch.Tensor:
    """The inverse."""
    return t if fold == 1 else t.unflatten(0, (-1, fold, qlen)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
