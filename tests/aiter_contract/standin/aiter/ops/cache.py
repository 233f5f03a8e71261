"""aiter.ops.cache: writing tokens to the KV cache. All write in place and return None."""

from __future__ import annotations

import math

import torch
from aiter import _checks, _standin
from aiter._rope import rotate
from aiter._standin import check, record, require


def _store(
    cache: torch.Tensor, index: tuple[object, ...], values: torch.Tensor, kind: str, scale: torch.Tensor | None
) -> None:
    """cache[index] = values, times the scale's reciprocal in float32 and rounded to fp8 where the cache is such. What
    rounds to more than the largest code becomes NaN, as the GPUs' conversion instruction has it (of float8_e4m3fn
    PyTorch's may be the largest code, by its version)."""
    if kind == "auto":
        cache[index] = values
        return
    scaled = values.float() if scale is None else values.float() * (1 / scale)
    fp8 = _standin.device.fp8
    largest = torch.finfo(fp8).max
    code = scaled.clamp(-largest, largest).to(fp8)
    # Half the distance to the code there would be next; a tie goes to the even one, which is the largest in e4m3fn.
    step = 2.0 ** (math.frexp(largest)[1] - 5)
    over = scaled.abs() > largest + step if fp8 == torch.float8_e4m3fn else scaled.abs() >= largest + step
    bits = code.view(torch.uint8).masked_fill(over, 0x7F if fp8 == torch.float8_e4m3fn else 0x80)
    cache.view(torch.uint8)[index] = bits


def _demand_sources(key: torch.Tensor, value: torch.Tensor, kv_cache_dtype: str) -> None:
    check(
        key.dtype in (torch.float32, torch.float16, torch.bfloat16), f"Unsupported input type of kv cache: {key.dtype}"
    )
    check(kv_cache_dtype in ("auto", "fp8", "fp8_e4m3"), f"Unsupported data type of kv cache: {kv_cache_dtype}")
    require(value.dtype == key.dtype and value.shape == key.shape, "key and value must be alike")
    _checks.dense_rows("key", key)
    _checks.dense_rows("value", value)


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    asm_layout: bool = False,
) -> None:
    """Write key.size(0) tokens to x-packed K and to V as v0 (4-D) or, with asm_layout, shuffled (5-D). The kernel takes
    no strides of the caches: anything not contiguous is a violation. A scale of None counts as 1."""
    record("reshape_and_cache", "shuffled" if asm_layout else "v0")
    _demand_sources(key, value, kv_cache_dtype)
    _checks.packed_shapes(key_cache, value_cache, key.shape[2])
    require(
        value_cache.dim() == (5 if asm_layout else 4), f"asm_layout={asm_layout} misreads V {tuple(value_cache.shape)}"
    )
    num_blocks, kv_heads, groups, block_size, x = key_cache.shape
    require(kv_heads == key.shape[1], "key and key_cache differ in heads")
    for cache, given in ((key_cache, k_scale), (value_cache, v_scale)):
        require(cache.is_contiguous(), f"the kernel takes no strides: {cache.stride()}")
        _checks.cache_dtype(kv_cache_dtype, cache, key.dtype)
        if given is not None:
            _checks.scale("scale", given)
    slots = _checks.slots(slot_mapping, key.shape[0], num_blocks * block_size)
    kept = slots >= 0
    b, o = slots[kept] // block_size, slots[kept] % block_size
    packed = key[kept].unflatten(-1, (groups, x))
    _store(key_cache, (b, slice(None), slice(None), o), packed, kv_cache_dtype, k_scale)
    at = (b, slice(None), o // x, slice(None), o % x) if asm_layout else (b, slice(None), slice(None), o)
    _store(value_cache, at, value[kept], kv_cache_dtype, v_scale)


def reshape_and_cache_flash(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> None:
    """Write key.size(0) tokens to linear caches [NB, BS, KH, D]. Only stride(0) is honoured, and must be equal."""
    record("reshape_and_cache_flash")
    check(key_cache.stride(0) == value_cache.stride(0), "Expected key_cache.stride(0) == value_cache.stride(0)")
    _demand_sources(key, value, kv_cache_dtype)
    num_blocks, block_size = key_cache.shape[:2]
    for cache, given in ((key_cache, k_scale), (value_cache, v_scale)):
        require(tuple(cache.shape) == (num_blocks, block_size, *key.shape[1:]), f"cache of shape {tuple(cache.shape)}")
        require(cache[0].is_contiguous(), f"a block must be dense: {cache.stride()}")
        _checks.cache_dtype(kv_cache_dtype, cache, key.dtype)
        _checks.scale("scale", given)
    slots = _checks.slots(slot_mapping, key.shape[0], num_blocks * block_size)
    kept = slots >= 0
    at = (slots[kept] // block_size, slots[kept] % block_size)
    _store(key_cache, at, key[kept], kv_cache_dtype, k_scale)
    _store(value_cache, at, value[kept], kv_cache_dtype, v_scale)


def concat_and_cache_mla(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_cache_dtype: str,
    scale: torch.Tensor,
) -> None:
    """Write kv_c [T, 512] ‖ k_pe [T, 64] to kv_cache [NB, BS, 576]; slot_mapping.size(0) tokens."""
    record("concat_and_cache_mla")
    rank = kv_c.shape[1]
    check(kv_cache.shape[2] == rank + k_pe.shape[1], "Expected kv_cache.size(2) == kv_lora_rank + pe_dim")
    check(kv_cache_dtype in ("auto", "fp8", "fp8_e4m3"), f"Unsupported data type of kv cache: {kv_cache_dtype}")
    tokens = slot_mapping.shape[0]
    require(
        tokens <= min(kv_c.shape[0], k_pe.shape[0]), f"{tokens} slots for {kv_c.shape[0]} tokens: read out of bounds"
    )
    require(kv_c.dtype == k_pe.dtype, "kv_c and k_pe differ in dtype")
    require(kv_c.stride(1) == k_pe.stride(1) == kv_cache.stride(2) == 1, "the last dims must be dense")
    _checks.cache_dtype(kv_cache_dtype, kv_cache, kv_c.dtype)
    _checks.scale("scale", scale)
    slots = _checks.slots(slot_mapping, tokens, kv_cache.shape[0] * kv_cache.shape[1])
    kept = slots >= 0
    at = (slots[kept] // kv_cache.shape[1], slots[kept] % kv_cache.shape[1])
    _store(kv_cache, at, torch.cat([kv_c, k_pe], dim=1)[:tokens][kept], kv_cache_dtype, scale)


def fused_qk_rope_concat_and_cache_mla(
    q_nope: torch.Tensor,
    q_pe: torch.Tensor,
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    q_out: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor,
    q_scale: torch.Tensor,
    positions: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    is_neox: bool,
    is_nope_first: bool,
    compute_all_q_rope: bool = False,
) -> None:
    """Rope on q_pe and k_pe; q_out = q_nope ‖ q_pe; the latent written. A token of negative slot gets no q_out (NaN)
    unless compute_all_q_rope. is_nope_first=False is a violation here (DeepSeek keeps the rope part last)."""
    record("fused_qk_rope_concat_and_cache_mla")
    check(q_out.shape[2] == q_nope.shape[2] + k_pe.shape[-1], "Expected q_out.size(2) == qk_lora_rank + pe_dim")
    check(kv_c.shape[-1] == q_nope.shape[-1], "kv_lora_rank and qk_lora_rank must be the same")
    tokens = slot_mapping.shape[0]
    require(is_nope_first, "the stand-in covers is_nope_first=True")
    require(kv_c.dim() == k_pe.dim() == 2, "the stand-in covers one latent head: kv_c [T, 512], k_pe [T, 64]")
    require(positions.dtype == torch.int64 and positions.shape[0] >= tokens, "positions must be int64, one per slot")
    require(tokens <= q_nope.shape[0], f"{tokens} slots for {q_nope.shape[0]} tokens: read out of bounds")
    slots = _checks.slots(slot_mapping, tokens, kv_cache.shape[0] * kv_cache.shape[1])
    kept = torch.ones_like(slots, dtype=torch.bool) if compute_all_q_rope else slots >= 0
    cos, sin = (t[positions[:tokens].clamp(0, t.shape[0] - 1)] for t in (cos_cache, sin_cache))
    query = torch.cat([q_nope[:tokens].float(), rotate(q_pe[:tokens], cos[:, None], sin[:, None], is_neox)], dim=-1)
    if q_out.element_size() == 1:
        query = query / float(q_scale)
    query[~kept] = float("nan")
    q_out[:tokens] = query.to(q_out.dtype)
    kind = "fp8" if kv_cache.element_size() == 1 else "auto"
    roped = rotate(k_pe[:tokens], cos, sin, is_neox).to(k_pe.dtype)
    concat_and_cache_mla(kv_c[:tokens], roped, kv_cache, slot_mapping, kind, k_scale)
