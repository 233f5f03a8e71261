"""The two layouts against the index formulas they are defined by, and against each other."""

from __future__ import annotations

import torch
from attention_reference import pack_shuffled
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.attention.layouts import LAYOUTS, LinearLayout, ShuffledLayout
from miniserve.attention.spec import AttentionSpec

CPU = torch.device("cpu")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def spec(kv_heads: int, head_dim: int, dtype: torch.dtype) -> AttentionSpec:
    return AttentionSpec(kv_heads, kv_heads, head_dim, 1.0, dtype, dtype)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    dtype=DTYPES,
    kv_heads=st.integers(1, 3),
    head_dim=st.sampled_from([16, 40, 64]),
    block_size=st.sampled_from([8, 16, 32]),
    seed=st.integers(0, 99),
)
def test_every_element_lies_where_the_formulas_say(
    dtype: torch.dtype, kv_heads: int, head_dim: int, block_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_blocks, x = 4, 16 // dtype.itemsize
    slots = torch.randperm(num_blocks * block_size, generator=generator)[: block_size + 3]
    k = torch.randn(len(slots), kv_heads, head_dim, generator=generator).to(dtype)
    v = torch.randn(len(slots), kv_heads, head_dim, generator=generator).to(dtype)
    for name in ("linear", "shuffled"):
        layout = LAYOUTS[name](block_size)
        cache = layout.allocate(spec(kv_heads, head_dim, dtype), num_blocks, CPU)
        layout.write(cache, k, v, slots)
        key, value = cache.key.flatten(), cache.value.flatten()
        token, head, dim = torch.meshgrid(
            torch.arange(len(slots)), torch.arange(kv_heads), torch.arange(head_dim), indexing="ij"
        )
        block, offset = slots[token] // block_size, slots[token] % block_size
        base = block * kv_heads * head_dim * block_size
        if name == "linear":
            key_place = value_place = base + (offset * kv_heads + head) * head_dim + dim
        else:
            base = base + head * head_dim * block_size
            key_place = base + (dim // x) * block_size * x + offset * x + dim % x
            value_place = base + (offset // x) * head_dim * x + dim * x + offset % x
        assert torch.equal(key[key_place], k)
        assert torch.equal(value[value_place], v)
        assert int((key != 0).sum()) == int((k != 0).sum()), "something else was written"


@settings(max_examples=30, deadline=None, derandomize=True)
@given(dtype=DTYPES, kv_heads=st.integers(1, 3), head_dim=st.sampled_from([16, 64, 128]), seed=st.integers(0, 99))
def test_packing_matches_writing_and_gathering_undoes_both(
    dtype: torch.dtype, kv_heads: int, head_dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    block_size, num_blocks = 16, 3
    k, v = (torch.randn(num_blocks, block_size, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
    layout = ShuffledLayout(block_size)
    cache = layout.allocate(spec(kv_heads, head_dim, dtype), num_blocks, CPU)
    layout.write(cache, k.flatten(0, 1), v.flatten(0, 1), torch.arange(num_blocks * block_size))
    key, value = pack_shuffled(k, v)
    assert torch.equal(cache.key, key)
    assert torch.equal(cache.value, value)
    order = torch.tensor([[2, 0], [1, 2]])
    for got, want in zip(layout.gather(cache, order), (k, v), strict=True):
        assert torch.equal(got, want[order])


def test_both_layouts_take_the_same_bytes() -> None:
    one = spec(8, 128, torch.bfloat16)
    sizes = set()
    for layout in (LinearLayout(16), ShuffledLayout(16)):
        cache = layout.allocate(one, 3, CPU)
        assert cache.key.nbytes + cache.value.nbytes == 3 * layout.block_bytes(one)
        sizes.add(layout.block_bytes(one))
    assert sizes == {2 * 16 * 8 * 128 * 2}


def test_shuffled_refuses_what_does_not_divide_into_lanes() -> None:
    assert "block size" in (ShuffledLayout.refusal(spec(1, 64, torch.bfloat16), 12) or "")
    assert "head_dim" in (ShuffledLayout.refusal(spec(1, 60, torch.bfloat16), 16) or "")
    assert ShuffledLayout.refusal(spec(1, 60, torch.float32), 12) is None
    assert LinearLayout.refusal(spec(1, 61, torch.bfloat16), 7) is None
