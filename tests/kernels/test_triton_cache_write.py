"""The Triton cache writers: every element where the layout's formula says, and nothing else touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton_support import (
    DEVICE,
    DTYPES,
    FP8,
    LAYOUTS,
    end_of_a_pool_above_4_gib,
    normal,
    on_gpu,
    relative_error,
)

from miniserve.attention.spec import LatentRope, QKRope
from miniserve.kernels.triton.cache_write import norm_rope_latent, rope_and_write, write_kv, write_latent
from miniserve.kernels.triton.zero_blocks import plane_table, zero_blocks
from miniserve.models.layers.ops import Ops, qk_norm_rope

SLOTS = [5, -1, 47, 16, 31, 0, -1, 95]


def slots(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def planes(
    num_blocks: int, block_size: int, heads: int, head_dim: int, dtype: torch.dtype, shuffled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed planes of the layout."""
    x = 16 // dtype.itemsize
    key = (num_blocks, heads, head_dim // x, block_size, x) if shuffled else (num_blocks, block_size, heads, head_dim)
    value = (num_blocks, heads, block_size // x, head_dim, x) if shuffled else key
    return torch.zeros(key, dtype=dtype, device=DEVICE), torch.zeros(value, dtype=dtype, device=DEVICE)


def stored(
    key: torch.Tensor, value: torch.Tensor, slot: int, block_size: int, heads: int, head_dim: int, shuffled: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's k, v [heads, head_dim] read back by the formulas of flat offsets (aiter's `reshape_and_cache`)."""
    block, o = divmod(slot, block_size)
    h, d = torch.arange(heads)[:, None], torch.arange(head_dim)[None, :]
    base = block * block_size * heads * head_dim
    at_k = at_v = base + o * heads * head_dim + h * head_dim + d
    if shuffled:
        x = 16 // key.element_size()
        at_k = base + h * head_dim * block_size + d // x * block_size * x + o * x + d % x
        at_v = base + h * head_dim * block_size + o // x * head_dim * x + d * x + o % x
    return key.flatten().float()[at_k.to(DEVICE)], value.flatten().float()[at_v.to(DEVICE)]


def only_these_were_written(plane: torch.Tensor, expected_elements: int) -> None:
    assert int((plane.float() != 0).sum()) == expected_elements


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_dim", "block_size"), [(2, 64, 16), (3, 80, 32), (1, 256, 48)])
def test_write_kv(heads: int, head_dim: int, block_size: int, dtype: torch.dtype, shuffled: bool) -> None:
    fused = normal(1, len(SLOTS), 5 + 2 * heads, head_dim, dtype=dtype)  # as a slice of fused qkv
    fused[fused == 0] = 1
    k, v = fused[:, 5 : 5 + heads], fused[:, 5 + heads :]
    key, value = planes(96 // block_size, block_size, heads, head_dim, dtype, shuffled)
    write_kv(k, v, key, value, slots(SLOTS), block_size=block_size, shuffled=shuffled)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            got_k, got_v = stored(key, value, slot, block_size, heads, head_dim, shuffled)
            assert torch.equal(got_k, k[token].float())
            assert torch.equal(got_v, v[token].float())
    for plane in (key, value):
        only_these_were_written(plane, sum(slot >= 0 for slot in SLOTS) * heads * head_dim)


@LAYOUTS
def test_write_of_no_tokens(shuffled: bool) -> None:
    key, value = planes(1, 16, 1, 16, torch.float16, shuffled)
    empty = normal(1, 0, 1, 16, dtype=torch.float16)
    write_kv(empty, empty, key, value, slots([]), block_size=16, shuffled=shuffled)
    only_these_were_written(key, 0)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=on_gpu)])
def test_fp8_is_scaled_and_limited(dtype: torch.dtype, shuffled: bool) -> None:
    limit = torch.finfo(FP8).max
    k = torch.tensor([0.25, -3.0, 10.0, 1e6, -1e6, 448.0, 0.5, 96.0] * 4, device=DEVICE).to(dtype).view(1, 1, 32)
    key, value = planes(1, 16, 1, 32, FP8, shuffled)
    scales = torch.tensor([0.25], device=DEVICE), torch.tensor([2.0], device=DEVICE)
    write_kv(
        k, k, key, value, slots([3]), block_size=16, shuffled=shuffled, k_scale=scales[0], v_scale=scales[1]
    )  # fmt: skip
    got = stored(key, value, 3, 16, 1, 32, shuffled)
    for plane, scale in zip(got, scales, strict=True):
        want = (k[0].float() / scale).clamp(-limit, limit).to(FP8).float()
        assert torch.equal(plane, want)


@LAYOUTS
@pytest.mark.parametrize(("normed", "settled"), [(False, False), (True, True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (5, 5, 80), (3, 1, 256)])
def test_rope_and_write(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, normed: bool, settled: bool, shuffled: bool
) -> None:
    tokens = len(SLOTS)
    wide = normal(1, tokens, (heads + 2 * kv_heads) * head_dim + 16, dtype=dtype)
    qkv = wide[:, :-16]
    angles = 3 * normal(2, tokens, head_dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=-1)
    weights = (normal(3, head_dim, dtype=dtype), normal(4, head_dim, dtype=dtype)) if normed else (None, None)
    key, value = planes(6, 16, kv_heads, head_dim, dtype, shuffled)
    k_out = torch.full((tokens, kv_heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    q_out = rope_and_write(
        qkv, cos_sin, *weights, 1e-6, key, value, slots(SLOTS), num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, block_size=16, shuffled=shuffled, settled=settled, k_out=k_out,
    )  # fmt: skip
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split([heads, kv_heads, kv_heads], dim=1)
    want_q, want_k = qk_norm_rope(q, k, QKRope(cos_sin, *weights, 1e-6))
    # Both round alike; only a sum's order may tip a rounding.
    ulp = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(q_out, want_q) < ulp
    assert q_out.dtype == dtype
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            got_k, got_v = stored(key, value, slot, 16, kv_heads, head_dim, shuffled)
            assert relative_error(got_k, want_k[token]) < ulp
            assert torch.equal(k_out[token].float(), got_k)
            assert torch.equal(got_v, v[token].float())
    only_these_were_written(value, sum(slot >= 0 for slot in SLOTS) * kv_heads * head_dim)


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_latent(dtype: torch.dtype) -> None:
    kv_c, k_pe = normal(1, len(SLOTS), 70, dtype=dtype)[:, :64], normal(2, len(SLOTS), 16, dtype=dtype)
    cache = torch.zeros(6, 16, 80, dtype=dtype, device=DEVICE)
    write_latent(kv_c, k_pe, cache, slots(SLOTS))
    want = torch.zeros_like(cache).flatten(0, 1)
    for token, slot in enumerate(SLOTS):
        if slot >= 0:
            want[slot] = torch.cat((kv_c[token], k_pe[token]))
    assert torch.equal(cache.flatten(0, 1), want)


@pytest.mark.parametrize(
    ("tokens", "interleaved", "kv_dtype", "settled"),
    [(8, False, torch.float32, False), (8, True, FP8, True), (260, True, torch.float32, True), (5, True, None, False)],
)
def test_the_norm_and_rope_of_latent_attention(
    tokens: int, interleaved: bool, kv_dtype: torch.dtype | None, settled: bool
) -> None:
    """In place, and what it leaves there in the cache as well, if there is one."""
    q, both, cos_sin = normal(0, tokens, 3, 20)[:, :, 4:], normal(1, tokens, 63), normal(2, tokens, 16)
    kv_c, k_pe, weight, scale = both[:, 7:47], both[:, 47:], normal(3, 40), torch.tensor([0.5], device=DEVICE)
    how = LatentRope(weight, 1e-6, cos_sin, interleaved)
    want = Ops().norm_rope_latent(q.clone(), kv_c.clone(), k_pe.clone(), how)
    given = q, kv_c, k_pe, weight, 1e-6, cos_sin
    terms: dict[str, Any] = {"interleaved": interleaved, "settled": settled}
    places = [*SLOTS, *range(96, 96 + tokens)][:tokens]
    if kv_dtype is None:
        norm_rope_latent(*given, **terms)
    else:
        got, expected = (torch.zeros(24, 16, 56, dtype=kv_dtype, device=DEVICE) for _ in range(2))
        stores: dict[str, Any] = {"kv_scale": scale if kv_dtype == FP8 else None}
        norm_rope_latent(*given, **terms, **stores, kv_cache=got, slot_mapping=slots(places))
        write_latent(kv_c, k_pe, expected, slots(places), **stores)
        assert torch.equal(got.float(), expected.float())
        assert expected.float().any()
    for found, wanted in zip((q, kv_c, k_pe), want, strict=True):
        assert relative_error(found, wanted) < 1e-5


@LAYOUTS
@pytest.mark.parametrize("roped", [False, True])
def test_the_last_slot_of_a_pool_above_4_gib(roped: bool, shuffled: bool) -> None:
    heads, head_dim = 8, 128
    key, value = end_of_a_pool_above_4_gib(*planes(1, 16, heads, head_dim, torch.float16, shuffled))
    k, v = (normal(seed, 1, heads, head_dim, dtype=torch.float16) for seed in (1, 2))
    where: dict[str, Any] = {"block_size": 16, "shuffled": shuffled}
    if roped:  # by no angle
        cos_sin = torch.cat([torch.ones(1, 64), torch.zeros(1, 64)], dim=1).to(DEVICE)
        qkv = torch.cat([k, k, v], dim=1).flatten(1)
        rope_and_write(
            qkv, cos_sin, None, None, 0.0, key, value, slots([len(key) * 16 - 1]), num_heads=heads, num_kv_heads=heads,
            head_dim=head_dim, **where,
        )  # fmt: skip
    else:
        write_kv(k, v, key, value, slots([len(key) * 16 - 1]), **where)
    last = stored(key[-1:], value[-1:], 15, 16, heads, head_dim, shuffled)
    assert torch.equal(last[0], k[0].float())
    assert torch.equal(last[1], v[0].float())


def test_blocks_are_zeroed_by_whoever_writes_their_first_token() -> None:
    """In planes of different sizes: longer than a program's step, and shorter."""
    written = slots([5, 16, 17, -1, 63, *[2] * 20, 80])  # of blocks 0, 1, 1, none, 3, 0, …, 5
    held = [normal(0, 6, 16, heads, 64, dtype=torch.bfloat16) for heads in (8, 1)] + [normal(0, 6, 16, 80, dtype=FP8)]
    zero_blocks(plane_table(held), written, 16)
    for plane in held:
        found = [bool(block.view(torch.uint8).any()) for block in plane]
        assert found == [True, False, True, True, True, False]


def test_the_last_slot_of_latents_above_4_gib() -> None:
    (cache,) = end_of_a_pool_above_4_gib(torch.zeros(1, 16, 576, dtype=torch.float16, device=DEVICE))
    kv_c, k_pe = normal(1, 1, 512, dtype=torch.float16), normal(2, 1, 64, dtype=torch.float16)
    write_latent(kv_c, k_pe, cache, slots([len(cache) * 16 - 1]))
    assert torch.equal(cache[-1, -1], torch.cat([kv_c, k_pe], dim=-1)[0])
