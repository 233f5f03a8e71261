"""An fp8 KV cache: what is written, divided by its scale, is what is read, times it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attention_steps import Case, cases, make_step
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention_backends import make_backend

from miniserve.attention.layouts import LAYOUTS, decoded
from miniserve.attention.spec import AttentionSpec

FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
SCALES = [(1.0, 1.0), (0.5, 2.0), (0.03, 0.04)]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", ["linear", "shuffled"])
def test_reading_undoes_writing(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    layout = LAYOUTS[name](16)
    cache = layout.allocate(AttentionSpec(2, 2, 32, 1.0, torch.bfloat16, dtype), 3, torch.device("cpu"))
    k, v = (torch.randn(20, 2, 32, generator=generator) for _ in range(2))
    k[0, 0, 0], v[1, 1, 1] = 1e6, -1e6  # beyond the largest code
    slots = torch.randperm(48, generator=generator)[:20]
    k_scale, v_scale = torch.tensor([0.5]), torch.tensor([2.0])
    layout.write(cache, k, v, slots, k_scale, v_scale)
    limit = torch.finfo(dtype).max
    want = [(values / scale).clamp(-limit, limit).to(dtype).float() * scale for values, scale in ((k, 0.5), (v, 2.0))]
    tokens = decoded(layout.gather_tokens(cache, slots), torch.float32, k_scale, v_scale)
    for got, expected in zip(tokens, want, strict=True):
        assert torch.equal(got, expected)
        assert float(got.abs().max()) in (limit * 0.5, limit * 2.0)
    blocks = decoded(layout.gather(cache, torch.arange(3)), torch.float32, k_scale, v_scale)
    for got, expected in zip(blocks, want, strict=True):
        assert torch.equal(got.flatten(0, 1)[slots], expected)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(dtype=st.sampled_from([torch.float32, torch.bfloat16, *FORMATS]), seed=st.integers(0, 99))
def test_tokens_are_gathered_from_where_blocks_are(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, 5 * 16, (23,), generator=generator)
    for layout_type in LAYOUTS.values():
        layout = layout_type(16)
        spec = AttentionSpec(3, 3, 32, 1.0, torch.bfloat16, dtype)
        if layout.refusal(spec, 16):
            continue
        cache = layout.allocate(spec, 5, torch.device("cpu"))
        k, v = (torch.randn(80, 3, 32, generator=generator) for _ in range(2))
        layout.write(cache, k, v, torch.arange(80))
        whole = layout.gather(cache, torch.arange(5))
        for got, blocks in zip(layout.gather_tokens(cache, slots), whole, strict=True):
            assert torch.equal(got.float(), blocks.float().flatten(0, 1)[slots])


@pytest.mark.parametrize("name", ["TORCH_ATTN", "TRITON_ATTN gfx942", "TRITON_ATTN sm_90"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    case=cases(),
    dtype=st.sampled_from(FORMATS),
    layout=st.sampled_from(["linear", "shuffled"]),
    scales=st.sampled_from(SCALES),
    seed=st.integers(0, 999),
)
def test_attention_over_an_fp8_cache(
    name: str, case: Case, dtype: torch.dtype, layout: str, scales: tuple[float, float], seed: int
) -> None:
    spec, block_size, *rest = case
    spec = replace(spec, kv_dtype=dtype)
    if LAYOUTS[layout].refusal(spec, block_size):
        return
    step = make_step((spec, block_size, *rest), layout, seed, scales)
    step.check(make_backend(name, step.layout, spec), 6e-2)
