"""Cache writes against the offset formulas; refusals; padding rows."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from aiter_naive import error, plane, view_shape
from aiter_standin import installed

SHAPE = (16, 2, 64)  # block_size, kv_heads, head_dim
SLOTS = torch.tensor([40, 3, -1, 15, 16, -1])
ONE = torch.ones(1)


@pytest.fixture(scope="module")
def aiter() -> Iterator[ModuleType]:
    with installed() as module:
        yield module


def tokens(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    packed = torch.randn(len(SLOTS), 2, *SHAPE[1:], generator=random).to(dtype)
    return packed[:, 0], packed[:, 1]  # rows of one projection: stride(0) is not heads * dims


def caches(value: str, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    x = 16 // dtype.itemsize
    layouts = ("linear" if value == "linear" else "packed", value)
    key, other = (torch.zeros(view_shape(layout, 3, SHAPE, x), dtype=dtype) for layout in layouts)
    return key, other


def expected(
    layout: str, values: torch.Tensor, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    flat = torch.zeros(48, *SHAPE[1:])
    flat[SLOTS[SLOTS >= 0]] = values[SLOTS >= 0].float() / scale
    return plane(layout, flat.to(dtype).view(3, *SHAPE))


def write(aiter: ModuleType, layout: str, key_cache: torch.Tensor, value_cache: torch.Tensor, **changes: Any) -> None:
    k, v = tokens()
    arguments = {
        "key": k,
        "value": v,
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": SLOTS,
        "kv_cache_dtype": "auto" if key_cache.element_size() == 2 else "fp8",
        "k_scale": ONE,
        "v_scale": ONE,
    }
    if layout == "linear":
        aiter.reshape_and_cache_flash(**(arguments | changes))
    else:
        aiter.reshape_and_cache(**(arguments | {"asm_layout": layout == "shuffled"} | changes))


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("value", ["linear", "v0", "shuffled"])
def test_tokens_land_where_the_formulas_say(aiter: ModuleType, value: str, arch: str) -> None:
    with aiter._standin.emulate(arch=arch):
        for dtype in (torch.bfloat16, aiter.dtypes.fp8):
            key, other = caches(value, dtype)
            scales = (1.0, 1.0) if dtype == torch.bfloat16 else (0.5, 2.0)
            write(aiter, value, key, other, k_scale=torch.tensor([scales[0]]), v_scale=torch.tensor([scales[1]]))
            key_layout = "linear" if value == "linear" else "packed"
            for got, layout, values, scale in zip((key, other), (key_layout, value), tokens(), scales, strict=True):
                want = expected(layout, values, scale, dtype)
                assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize(
    ("arch", "largest", "kept", "lost"), [("gfx942", 240.0, 247.9, 248.0), ("gfx950", 448.0, 464.0, 464.1)]
)
def test_what_fp8_cannot_hold_becomes_nan(
    aiter: ModuleType, arch: str, largest: float, kept: float, lost: float
) -> None:
    """In aiter's HIP writers; whatever PyTorch's conversion does."""
    with aiter._standin.emulate(arch=arch):
        for layout in ("linear", "shuffled"):
            key, other = caches(layout, aiter.dtypes.fp8)
            values = torch.full((6, *SHAPE[1:]), kept)
            values[:, 0] = lost
            write(aiter, layout, key, other, key=-values, value=values)
            assert sorted({*key.float().nan_to_num(1.0).unique().tolist()}) == [-largest, 0.0, 1.0]
            assert sorted({*other.float().nan_to_num(1.0).unique().tolist()}) == [0.0, 1.0, largest]
            assert int(other.float().isnan().sum()) == 4 * SHAPE[2]
        latent = torch.zeros(1, 16, 576, dtype=torch.uint8).view(aiter.dtypes.fp8)
        parts = torch.full((2, 512), kept), torch.full((2, 64), float("inf"))
        aiter.concat_and_cache_mla(*parts, latent, torch.tensor([3, -1]), "fp8", ONE)
        assert latent[0, 3, :512].float().unique().tolist() == [largest]
        assert latent[0, 3, 512:].float().isnan().all()


def test_values_are_multiplied_by_the_scales_reciprocal(aiter: ModuleType) -> None:
    """Of 0.9 in float32: the quotient of this value is halfway between two codes, the product just off it."""
    scale, value = torch.tensor([0.9]), torch.tensor(45 / 256)
    product, quotient = (float(x.to(torch.float8_e4m3fnuz)) for x in (value * (1 / scale), value / scale))
    key, other = caches("shuffled", torch.float8_e4m3fnuz)
    values = value.expand(6, *SHAPE[1:]).contiguous()
    write(aiter, "shuffled", key, other, key=values, value=values, k_scale=scale, v_scale=scale)
    assert float(other.float().max()) == product != quotient


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"slot_mapping": SLOTS.int()}, AssertionError, "read as int64"),
    ({"slot_mapping": SLOTS[:3]}, AssertionError, "3 entries for 6 tokens"),
    ({"slot_mapping": SLOTS + 8}, AssertionError, "a slot outside"),
    ({"slot_mapping": SLOTS * 0}, AssertionError, "share a slot"),
    ({"kv_cache_dtype": "fp8_e5m2"}, RuntimeError, "Unsupported data type of kv cache"),
    ({"kv_cache_dtype": "fp8"}, AssertionError, "fp8 on gfx942"),
    ({"key": torch.zeros(6, 2, 64).half(), "value": torch.zeros(6, 2, 64).half()}, AssertionError, "'auto' reads"),
    ({"key": torch.zeros(6, 64, 2).bfloat16().transpose(1, 2)}, AssertionError, "heads and dims must be dense"),
]


@pytest.mark.parametrize("value", ["linear", "shuffled"])
@pytest.mark.parametrize(("changes", "error_class", "words"), REFUSALS)
def test_refusals(
    aiter: ModuleType, value: str, changes: dict[str, Any], error_class: type[Exception], words: str
) -> None:
    with pytest.raises(error_class, match=words):
        write(aiter, value, *caches(value), **changes)


def test_newer_versions_take_int32_slots(aiter: ModuleType) -> None:
    with aiter._standin.emulate(version="0.1.21"):
        write(aiter, "linear", *caches("linear"), slot_mapping=SLOTS.int())
        with pytest.raises(RuntimeError, match="int32 or int64"):
            write(aiter, "linear", *caches("linear"), slot_mapping=SLOTS.short())


def test_layouts_that_the_writers_would_misread(aiter: ModuleType) -> None:
    key, other = caches("shuffled")
    with pytest.raises(aiter._standin.ContractViolation, match="asm_layout=False misreads V"):
        write(aiter, "v0", key, other)
    with pytest.raises(aiter._standin.ContractViolation, match="takes no strides"):
        write(aiter, "shuffled", key.repeat(2, 1, 1, 1, 1)[::2], other.repeat(2, 1, 1, 1, 1)[::2])
    with pytest.raises(RuntimeError, match=r"Expected key_cache.stride"):
        write(aiter, "linear", torch.zeros(6, *SHAPE).bfloat16()[::2], caches("linear")[1])


def rope(x: torch.Tensor, angles: torch.Tensor, is_neox: bool) -> torch.Tensor:
    """Turn each pair as a complex number: angles [T, d/2]."""
    half = x.shape[-1] // 2
    first, second = (x[..., :half], x[..., half:]) if is_neox else (x[..., ::2], x[..., 1::2])
    turned = torch.complex(first.double(), second.double()) * torch.polar(torch.ones(()).double(), angles.double())
    parts = (turned.real, turned.imag)
    return torch.cat(parts, -1) if is_neox else torch.stack(parts, -1).flatten(-2)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("value", ["linear", "v0", "shuffled"])
def test_fused_rope_and_write(aiter: ModuleType, value: str, is_neox: bool) -> None:
    from aiter.ops.triton.fusions.fused_kv_cache import fused_qk_rope_reshape_and_cache as fused

    (k, v), (key, other) = tokens(), caches(value)
    q, pos = torch.randn(6, 4, 64, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.arange(6) * 3
    table = torch.arange(20)[:, None] / torch.arange(1, 33)
    arguments = (q, k, v, key, other, SLOTS, pos, table.cos(), table.sin(), ONE, ONE, is_neox, value == "linear")
    q_out, k_out, *rest = fused(*arguments, output_zeros=False)
    turned = rope(k, table[pos][:, None], is_neox)
    assert len(rest) == 2 and error(q_out, rope(q, table[pos][:, None], is_neox)) < 5e-3
    assert k_out[SLOTS < 0].isnan().all() and error(k_out[SLOTS >= 0], turned[SLOTS >= 0]) < 5e-3
    assert error(key, expected("linear" if value == "linear" else "packed", turned)) < 5e-3
    assert torch.equal(other, expected(value, v))
    long = torch.cat([SLOTS, torch.tensor([-1])])
    with pytest.raises(aiter._standin.ContractViolation, match="7 entries for 6 tokens"):
        fused(*arguments[:5], long, *arguments[6:])
    with pytest.raises(AssertionError, match="KV cache dtype must be"):
        fused(*arguments[:3], key.half(), other.half(), *arguments[5:])
    for sin, words in ((table.sin().bfloat16(), "angles of 16 bits"), (table.sin().T.contiguous().T, "cos's strides")):
        with pytest.raises(aiter._standin.ContractViolation, match=words):
            fused(*arguments[:8], sin, *arguments[9:])


def test_the_fused_write_limits_what_fp8_cannot_hold(aiter: ModuleType) -> None:
    from aiter.ops.triton.fusions.fused_kv_cache import fused_qk_rope_reshape_and_cache as fused

    (k, v), (key, other) = tokens(), caches("shuffled", aiter.dtypes.fp8)
    angles = (torch.ones(6, 32), torch.zeros(6, 32))
    fused(k, 1e4 * k, 1e4 * v, key, other, SLOTS, torch.arange(6), *angles, ONE, ONE, True, False, output_zeros=False)
    for cache in (key, other):
        assert float(cache.float().abs().max()) == torch.finfo(aiter.dtypes.fp8).max


def test_latent_writes(aiter: ModuleType) -> None:
    random = torch.Generator().manual_seed(2)
    kv_c, k_pe, q_nope, q_pe = (
        torch.randn(*shape, generator=random).bfloat16() for shape in ((6, 512), (6, 64), (6, 4, 512), (6, 4, 64))
    )
    cache = torch.zeros(3, 16, 576).bfloat16()
    aiter.concat_and_cache_mla(kv_c, k_pe, cache, SLOTS, "auto", ONE)
    kept = SLOTS >= 0
    assert torch.equal(cache.view(48, 576)[SLOTS[kept]], torch.cat([kv_c, k_pe], 1)[kept])
    assert int((cache.abs().sum(-1) > 0).sum()) == 4
    table, pos = torch.arange(20)[:, None] / torch.arange(1, 33), torch.arange(6) * 2
    for everything in (False, True):
        q_out = torch.zeros(6, 4, 576).bfloat16()
        aiter.fused_qk_rope_concat_and_cache_mla(
            q_nope,
            q_pe,
            kv_c,
            k_pe,
            cache,
            q_out,
            SLOTS,
            ONE,
            ONE,
            pos,
            table.cos(),
            table.sin(),
            False,
            True,
            everything,
        )
        rows = kept | everything
        assert error(q_out[rows][..., 512:], rope(q_pe, table[pos][:, None], False)[rows]) < 5e-3
        assert torch.equal(q_out[rows][..., :512], q_nope[rows]) and q_out[~rows].isnan().all()
        assert error(cache.view(48, 576)[SLOTS[kept], 512:], rope(k_pe, table[pos], False)[kept]) < 5e-3
    with pytest.raises(RuntimeError, match="kv_lora_rank"):
        aiter.concat_and_cache_mla(kv_c, k_pe, cache[..., :570], SLOTS, "auto", ONE)
    with pytest.raises(aiter._standin.ContractViolation, match="6 slots for 5 tokens"):
        aiter.concat_and_cache_mla(kv_c[:5], k_pe[:5], cache, SLOTS, "auto", ONE)
