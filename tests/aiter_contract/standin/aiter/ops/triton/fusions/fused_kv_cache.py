"""aiter.ops.triton.fusions.fused_kv_cache: rope and cache write in one kernel."""

from __future__ import annotations

import torch
from aiter import _checks, _math, _standin
from aiter._rope import rotate
from aiter._standin import record, require
from aiter.ops.cache import _store


def fused_qk_rope_reshape_and_cache(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    pos: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    is_neox: bool,
    flash_layout: bool,
    apply_scale: bool = True,
    offs: torch.Tensor = None,
    q_out: torch.Tensor = None,
    k_out: torch.Tensor = None,
    output_zeros: bool = True,
    zeros_out: torch.Tensor = None,
    upcast_operand: bool = False,
):
    """q [T, QH, D], k and v [T, KH, D] roped and written -> (q_out, k_out, key_cache, value_cache[, zeros_out]).

    A token of a negative slot is not written and gets no k_out (NaN). What an fp8 cache cannot hold becomes its largest
    code, as Triton converts on both GPUs. More slots than tokens (K read out of bounds), an x that is not 16 bytes,
    cos and sin of unlike strides or not in float32, positions past them, and before v0.1.16 a 5-D V are violations.
    """
    shuffled = value_cache.dim() == 5
    record("fused_qk_rope_reshape_and_cache", "linear" if flash_layout else "shuffled" if shuffled else "v0")
    tokens, heads, dim = q.shape
    _, kv_heads, _ = k.shape
    known = (torch.bfloat16, _standin.device.fp8)
    assert key_cache.dtype in known, "KV cache dtype must be BF16, FP8 or packed FP4"
    if flash_layout:
        num_blocks, block_size, cache_heads, _ = key_cache.shape
        require(key_cache.shape == value_cache.shape and key_cache.shape[3] == dim, "caches of another shape")
    else:
        num_blocks, cache_heads, _, block_size, x = key_cache.shape
        require(not shuffled or _standin.device.at_least("0.1.16"), "before v0.1.16 V is 4-D")
        _checks.packed_shapes(key_cache, value_cache, dim)
    slots = slot_mapping.shape[0]
    same = tokens == k.shape[0] == v.shape[0] and tokens <= slots
    assert same, f"Number of tokens should be identical for q, kand v. {tokens=} {slots=}"
    assert kv_heads == v.shape[1] == cache_heads, "KV head should be identical for k, v, key_cache, and value_cache"
    assert dim & (dim - 1) == 0, "D dimension should be power of 2"
    assert block_size & (block_size - 1) == 0, "block_size should be power of 2"
    assert heads % kv_heads == 0, "Q heads must be multiple of H heads"
    assert cos.shape[-1] in (dim // 2, dim), "cos/sin last dim should be the same or half of the qk last dim"
    found = _checks.slots(slot_mapping, tokens, num_blocks * block_size, exact=True)
    at = pos + offs if offs is not None else pos
    require(at.shape == (tokens,) and not at.is_floating_point(), "pos must be one integer per token")
    require(pos.is_contiguous() and slot_mapping.is_contiguous(), "the kernel takes no strides of pos and slots")
    require(cos.shape == sin.shape and cos.stride() == sin.stride(), "cos's strides serve sin too")
    require(cos.dtype == sin.dtype == torch.float32, "angles of 16 bits are multiplied in 16 bits")
    require(q.dtype == k.dtype == v.dtype, "the stand-in covers q, k and v of one dtype")
    require(not tokens or 0 <= int(at.min()) <= int(at.max()) < cos.shape[0], "a position outside cos and sin")
    c, s = (t.view(t.shape[0], -1)[at][:, None] for t in (cos, sin))
    rotated, key = rotate(q, c, s, is_neox), rotate(k, c, s, is_neox)
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format) if q_out is None else q_out
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format) if k_out is None else k_out
    _math.poison(q_out, k_out)
    q_out.copy_(rotated)
    kept = found >= 0
    k_out[kept] = key[kept].to(k_out.dtype)
    b, o = found[kept] // block_size, found[kept] % block_size
    kind = "fp8" if key_cache.element_size() == 1 else "auto"
    rows = key[kept], v[kept].float()
    for t, given in zip(rows, (k_scale, v_scale), strict=True):
        if given is not None and apply_scale:
            _checks.scale("scale", given)
            t *= 1 / given  # whatever the cache's dtype
    limit = torch.finfo(key_cache.dtype).max
    key, value = (t.clamp(-limit, limit) if kind == "fp8" else t.to(key_cache.dtype) for t in rows)
    if flash_layout:
        at_key = at_value = (b, o)
    else:
        key = key.unflatten(-1, (dim // x, x))
        at_key = (b, slice(None), slice(None), o)
        at_value = (b, slice(None), o // x, slice(None), o % x) if shuffled else (b, slice(None), slice(None), o)
    _store(key_cache, at_key, key, kind, None)
    _store(value_cache, at_value, value, kind, None)
    if zeros_out is not None or output_zeros:
        zeros = torch.empty_like(q) if zeros_out is None else zeros_out
        return q_out, k_out, key_cache, value_cache, zeros.zero_()
    return q_out, k_out, key_cache, value_cache
