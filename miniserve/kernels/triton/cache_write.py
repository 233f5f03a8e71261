# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Writing tokens to the paged cache, in either layout; alone, or in one kernel with the norm and rotation before it.

An fp8 cache stores value / scale, rounded to nearest and limited to the largest code.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.common import plane_strides
from miniserve.kernels.triton.elementwise import rms_normed
from miniserve.kernels.triton.launch import cdiv, next_power_of_2
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import quick

_TILE = 2048  # elements of K that one program handles


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    block_size: int,
    shuffled: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Store k, v [num_tokens, num_kv_heads, head_dim] (last dimension dense, the others may be strided) at
    slot_mapping int64 [num_tokens] of the planes; a negative slot is skipped. k_scale, v_scale: float32 [1]."""
    num_tokens, num_kv_heads, head_dim = k.shape
    if num_tokens == 0:
        return
    heads = min(next_power_of_2(num_kv_heads), max(1, _TILE // next_power_of_2(head_dim)))
    _write_kernel[(num_tokens, cdiv(num_kv_heads, heads))](
        k, v, key_cache, value_cache, slot_mapping, k_scale, v_scale, *k.stride()[:2], *v.stride()[:2],
        *plane_strides(key_cache, shuffled), *plane_strides(value_cache, shuffled),
        KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_H=heads, BLOCK_D=next_power_of_2(head_dim),
        BLOCK_SIZE=block_size, X=_lanes(key_cache, shuffled), LIMIT=_limit(key_cache.dtype), **launch_options(k.device),
    )  # fmt: skip


def rope_and_write(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    shuffled: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    settled: bool = False,
    q_out: torch.Tensor | None = None,
    k_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norm each head of q and k (if weights [head_dim] are passed), rotate both, and store k and v in the cache.

    qkv [num_tokens, (num_heads + 2 num_kv_heads) * head_dim], rows may be strided; cos_sin float32 [num_tokens,
    head_dim]: cosines, then sines; slots as in `write_kv`. settled: slots and cos_sin may be read before earlier
    kernels are done (see `pdl.py`). Rounds to qkv's dtype where `models/layers/ops.py` does. Returns q [num_tokens,
    num_heads, head_dim], q_out if it is passed; k_out [num_tokens, num_kv_heads, head_dim], dense, gets the k of the
    tokens that are written.
    """
    num_tokens = qkv.shape[0]
    if q_out is None:
        q_out = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    if num_tokens == 0:
        return q_out
    tile = 512 if num_tokens <= 256 else 1024  # few tokens need many programs
    heads = min(next_power_of_2(num_heads), max(1, tile // next_power_of_2(head_dim)))
    _rope_write_kernel[(num_tokens, cdiv(num_heads, heads) + cdiv(num_kv_heads, heads))](
        qkv, cos_sin, q_weight, k_weight, key_cache, value_cache, slot_mapping, k_scale, v_scale, q_out, k_out,
        qkv.stride(0), cos_sin.stride(0), *q_out.stride()[:2], *plane_strides(key_cache, shuffled),
        *plane_strides(value_cache, shuffled), eps,
        HEADS=num_heads, KV_HEADS=num_kv_heads, HEAD_DIM=head_dim, BLOCK_H=heads,
        BLOCK_HALF=next_power_of_2(head_dim // 2), BLOCK_SIZE=block_size, X=_lanes(key_cache, shuffled),
        LIMIT=_limit(key_cache.dtype), SETTLED=settled, num_warps=2, **launch_options(qkv.device),
    )  # fmt: skip
    return q_out


def write_latent(
    kv_c: torch.Tensor,
    k_pe: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    kv_scale: torch.Tensor | None = None,
) -> None:
    """Store kv_c [num_tokens, kv_lora_rank] ‖ k_pe [num_tokens, rope_dim] at slot_mapping int64 [num_tokens] of
    kv_cache [num_blocks, block_size, kv_lora_rank + rope_dim]; a negative slot is skipped. kv_scale: float32 [1]."""
    num_tokens, rank = kv_c.shape
    if num_tokens == 0:
        return
    _write_latent_kernel[(num_tokens,)](
        kv_c, k_pe, kv_cache, slot_mapping, kv_scale, kv_c.stride(0), k_pe.stride(0), *kv_cache.stride()[:2],
        RANK=rank, ROPE=k_pe.shape[1], BLOCK=next_power_of_2(rank + k_pe.shape[1]), BLOCK_SIZE=kv_cache.shape[1],
        LIMIT=_limit(kv_cache.dtype), **launch_options(kv_c.device),
    )  # fmt: skip


def norm_rope_latent(
    q: torch.Tensor,
    latent: torch.Tensor,
    k: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    cos_sin: torch.Tensor,
    *,
    interleaved: bool,
    kv_cache: torch.Tensor | None = None,
    slot_mapping: torch.Tensor | None = None,
    kv_scale: torch.Tensor | None = None,
    settled: bool = False,
) -> None:
    """Rotate q [T, num_heads, dim] and k [T, dim], norm latent [T, size], in place (views with a dense last dimension);
    weight [size]; cos_sin float32 [T, dim], cosines first. interleaved: neighbours are paired instead of halves. With
    a cache, slots and kv_scale as of `write_latent`, latent and k are stored there, too; settled as of
    `rope_and_write`."""
    tokens, num_heads, dim = q.shape
    if tokens == 0:
        return
    size = latent.shape[1]
    # Few tokens need many programs, many tokens few of them.
    heads, warps = (min(16, next_power_of_2(num_heads)), 4) if tokens > 256 else (1, 1)
    strides = (0, 0) if kv_cache is None else kv_cache.stride()[:2]
    _norm_rope_latent_kernel[(tokens, cdiv(num_heads, heads) + 1)](
        q, k, cos_sin, latent, weight, kv_cache, slot_mapping, kv_scale, eps, num_heads, *q.stride()[:2], k.stride(0),
        latent.stride(0), *strides,
        DIM=dim, HALF=next_power_of_2(dim // 2), BLOCK_H=heads, INTERLEAVED=interleaved, SIZE=size,
        BLOCK=next_power_of_2(size), BLOCK_SIZE=1 if kv_cache is None else kv_cache.shape[1],
        LIMIT=0.0 if kv_cache is None else _limit(kv_cache.dtype), SETTLED=settled, num_warps=warps,
        **launch_options(q.device),
    )  # fmt: skip


def _lanes(plane: torch.Tensor, shuffled: bool) -> int:
    return 16 // plane.element_size() if shuffled else 0


def _limit(dtype: torch.dtype) -> float:
    """The largest code of an fp8 dtype; 0 for a dtype that needs no scaling."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0


@triton.jit
def _encoded(x, scale, dtype: tl.constexpr, LIMIT: tl.constexpr):
    """x as the cache stores it."""
    if LIMIT > 0:
        x = x.to(tl.float32)
        if scale is not None:
            x = x / tl.load(scale)
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return x.to(dtype)


@triton.jit
def _store_token(
    key_cache, value_cache, k, v, k_scale, v_scale, slot, head, d, mask,
    k_block, k_token, k_head, v_block, v_token, v_head,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Store k, v [heads, dims] of one token at slot; head [heads, 1], d [1, dims]."""
    block = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    key_at = key_cache + block * k_block + head * k_head
    value_at = value_cache + block * v_block + head * v_head
    if X == 0:
        key_at += offset * k_token + d
        value_at += offset * v_token + d
    else:
        key_at += d // X * (BLOCK_SIZE * X) + offset * X + d % X
        value_at += offset // X * (HEAD_DIM * X) + d * X + offset % X
    tl.store(key_at, _encoded(k, k_scale, key_cache.dtype.element_ty, LIMIT), mask=mask)
    tl.store(value_at, _encoded(v, v_scale, value_cache.dtype.element_ty, LIMIT), mask=mask)


@quick
@triton.jit
def _write_kernel(
    k, v, key_cache, value_cache, slots, k_scale, v_scale, k_row, k_in_head, v_row, v_in_head,
    k_block, k_token, k_head, v_block, v_token, v_head,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, X: tl.constexpr, LIMIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_H kv heads of one token."""
    start(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    mask = (head < KV_HEADS) & (d < HEAD_DIM)
    keys = tl.load(k + token * k_row + head * k_in_head + d, mask=mask, other=0.0)
    values = tl.load(v + token * v_row + head * v_in_head + d, mask=mask, other=0.0)
    _store_token(
        key_cache, value_cache, keys, values, k_scale, v_scale, slot, head, d, mask,
        k_block, k_token, k_head, v_block, v_token, v_head, HEAD_DIM, BLOCK_SIZE, X, LIMIT,
    )  # fmt: skip


@triton.jit
def _norm_rope(
    first, second, first_weight, second_weight, cos, sin, eps, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The two halves of heads [heads, half], normed if there are weights, and rotated; in their dtype."""
    dtype: tl.constexpr = first.dtype
    if first_weight is not None:
        a = first.to(tl.float32)
        b = second.to(tl.float32)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        first = (first_weight.to(tl.float32) * (a * scale).to(dtype).to(tl.float32)).to(dtype)
        second = (second_weight.to(tl.float32) * (b * scale).to(dtype).to(tl.float32)).to(dtype)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@quick
@triton.jit
def _rope_write_kernel(
    qkv, cos_sin, q_weight, k_weight, key_cache, value_cache, slots, k_scale, v_scale, q_out, k_out,
    qkv_row, cos_row, out_row, out_head, k_block, k_token, k_head, v_block, v_token, v_head, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, X: tl.constexpr, LIMIT: tl.constexpr, SETTLED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_H query heads of one token, or as many kv heads of it."""
    start(PDL)
    HALF: tl.constexpr = HEAD_DIM // 2
    Q_TILES: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    member = tl.arange(0, BLOCK_H)[:, None]
    # For each head again, so that the same threads hold everything they read.
    half = tl.broadcast_to(tl.arange(0, BLOCK_HALF)[None, :], (BLOCK_H, BLOCK_HALF))
    there = half < HALF
    # Other layers' weights have evicted these from the L2 cache, so they are fetched before the wait.
    q_first, q_second = None, None
    if q_weight is not None:
        q_first = tl.load(q_weight + half, mask=there, other=0.0)
        q_second = tl.load(q_weight + HALF + half, mask=there, other=0.0)
    k_first, k_second = None, None
    if k_weight is not None:
        k_first = tl.load(k_weight + half, mask=there, other=0.0)
        k_second = tl.load(k_weight + HALF + half, mask=there, other=0.0)
    if not SETTLED:
        wait(PDL)
    cos = tl.load(cos_sin + token * cos_row + half, mask=there, other=0.0)
    sin = tl.load(cos_sin + token * cos_row + HALF + half, mask=there, other=0.0)
    slot = tl.load(slots + token)
    if SETTLED:
        wait(PDL)
    row = qkv + token * qkv_row + half
    if tile < Q_TILES:
        head = tile * BLOCK_H + member
        mask = (head < HEADS) & there
        first = tl.load(row + head * HEAD_DIM, mask=mask, other=0.0)
        second = tl.load(row + head * HEAD_DIM + HALF, mask=mask, other=0.0)
        first, second = _norm_rope(first, second, q_first, q_second, cos, sin, eps, HEAD_DIM)
        at = q_out + token * out_row + head * out_head + half
        tl.store(at, first, mask=mask)
        tl.store(at + HALF, second, mask=mask)
    elif slot >= 0:
        kv_head = (tile - Q_TILES) * BLOCK_H + member
        mask = (kv_head < KV_HEADS) & there
        k_at = row + (HEADS + kv_head) * HEAD_DIM
        v_at = k_at + KV_HEADS * HEAD_DIM
        first = tl.load(k_at, mask=mask, other=0.0)
        second = tl.load(k_at + HALF, mask=mask, other=0.0)
        v_first = tl.load(v_at, mask=mask, other=0.0)
        v_second = tl.load(v_at + HALF, mask=mask, other=0.0)
        first, second = _norm_rope(first, second, k_first, k_second, cos, sin, eps, HEAD_DIM)
        if k_out is not None:
            out_at = k_out + (token * KV_HEADS + kv_head) * HEAD_DIM + half
            tl.store(out_at, first, mask=mask)
            tl.store(out_at + HALF, second, mask=mask)
        _store_token(
            key_cache, value_cache, first, v_first, k_scale, v_scale, slot, kv_head, half, mask,
            k_block, k_token, k_head, v_block, v_token, v_head, HEAD_DIM, BLOCK_SIZE, X, LIMIT,
        )  # fmt: skip
        _store_token(
            key_cache, value_cache, second, v_second, k_scale, v_scale, slot, kv_head, half + HALF, mask,
            k_block, k_token, k_head, v_block, v_token, v_head, HEAD_DIM, BLOCK_SIZE, X, LIMIT,
        )  # fmt: skip


@quick
@triton.jit
def _write_latent_kernel(
    kv_c, k_pe, kv_cache, slots, kv_scale, c_row, pe_row, block_stride, token_stride,
    RANK: tl.constexpr, ROPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, LIMIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: one token."""
    start(PDL)
    wait(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot < 0:
        return
    d = tl.arange(0, BLOCK)
    latent = tl.load(kv_c + token * c_row + d, mask=d < RANK, other=0.0)
    rope = tl.load(k_pe + token * pe_row + d - RANK, mask=(d >= RANK) & (d < RANK + ROPE), other=0.0)
    at = kv_cache + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride + d
    x = _encoded(tl.where(d < RANK, latent, rope), kv_scale, kv_cache.dtype.element_ty, LIMIT)
    tl.store(at, x, mask=d < RANK + ROPE)


@quick
@triton.jit
def _norm_rope_latent_kernel(
    q_ptr, k_ptr, cos_sin_ptr, latent_ptr, weight_ptr, kv_cache, slots, kv_scale, eps, num_heads,
    q_row, q_head, k_row, latent_row, block_stride, token_stride,
    DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, LIMIT: tl.constexpr, SETTLED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a token and BLOCK_H of q's heads; one more for k's only one and for the latent; in place."""
    start(PDL)
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    col = tl.arange(0, BLOCK)
    # Other layers' weights have evicted it from the L2 cache, so it is fetched before the wait.
    weight = tl.load(weight_ptr + col, mask=(tile == tl.num_programs(1) - 1) & (col < SIZE), other=0.0)
    if not SETTLED:
        wait(PDL)
    place = tl.arange(0, HALF)[None, :]
    inside = place < DIM // 2
    cos = tl.load(cos_sin_ptr + token * DIM + place, mask=inside, other=0.0)
    sin = tl.load(cos_sin_ptr + token * DIM + DIM // 2 + place, mask=inside, other=0.0)
    cached, written = None, False
    if kv_cache is not None:
        slot = tl.load(slots + token)
        written = slot >= 0
        cached = kv_cache + slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * token_stride
    if SETTLED:
        wait(PDL)
    # Triton 3.6 cannot compile a choice between two pointers for AMD.
    head = tile * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    if tile < tl.num_programs(1) - 1:
        q_at = q_ptr + token * q_row + head * q_head
        _rotate(q_at, None, head < num_heads, False, cos, sin, None, DIM, HALF, INTERLEAVED, LIMIT)
    else:
        k_at = k_ptr + token * k_row + head * 0
        only = head == tile * BLOCK_H
        pe_cached = None
        if kv_cache is not None:
            pe_cached = cached + SIZE + head * 0
        _rotate(k_at, pe_cached, only, written, cos, sin, kv_scale, DIM, HALF, INTERLEAVED, LIMIT)
        latent_at = latent_ptr + token * latent_row + col
        latent = rms_normed(tl.load(latent_at, mask=col < SIZE, other=0.0), weight, SIZE, eps)
        tl.store(latent_at, latent, mask=col < SIZE)
        if kv_cache is not None:
            code = _encoded(latent, kv_scale, kv_cache.dtype.element_ty, LIMIT)
            tl.store(cached + col, code, mask=(col < SIZE) & written)


@triton.jit
def _rotate(
    at, cached, there, written, cos, sin, scale,
    DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Vectors that begin at `at` [BLOCK_H, 1], where `there`; cos, sin [1, HALF]. cached: where the only one of them is
    stored as well, if it is to be `written`."""
    BLOCK_H: tl.constexpr = at.shape[0]
    if INTERLEAVED:  # neighbours are loaded together
        col = tl.arange(0, 2 * HALF)[None, :]
        inside = there & (col < DIM)
        a, b = tl.split(tl.reshape(tl.load(at + col, mask=inside, other=0.0), (BLOCK_H, HALF, 2)))
    else:
        col = tl.arange(0, HALF)[None, :]
        inside = there & (col < DIM // 2)
        a = tl.load(at + col, mask=inside, other=0.0)
        b = tl.load(at + DIM // 2 + col, mask=inside, other=0.0)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    first, second = (wide_a * cos - wide_b * sin).to(a.dtype), (wide_b * cos + wide_a * sin).to(a.dtype)
    if INTERLEAVED:
        both = tl.reshape(tl.join(first, second), (BLOCK_H, 2 * HALF))
        tl.store(at + col, both, mask=inside)
        if cached is not None:
            code = _encoded(both, scale, cached.dtype.element_ty, LIMIT)
            tl.store(cached + col, code, mask=inside & written)
    else:
        tl.store(at + col, first, mask=inside)
        tl.store(at + DIM // 2 + col, second, mask=inside)
        if cached is not None:
            code = _encoded(first, scale, cached.dtype.element_ty, LIMIT)
            tl.store(cached + col, code, mask=inside & written)
            code = _encoded(second, scale, cached.dtype.element_ty, LIMIT)
            tl.store(cached + DIM // 2 + col, code, mask=inside & written)
