"""Latent attention: its layout, its backend in PyTorch against the formula, and who may serve whom."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from attention_steps import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_steps import latent_cases, make_latent_step

from miniserve.attention.backends import torch_mla
from miniserve.attention.backends.gathered import merge_lse
from miniserve.attention.backends.torch_mla import TorchLatentBackend, dense_attention
from miniserve.attention.layouts import LAYOUTS, LatentLayout, decoded
from miniserve.attention.platform import Platform
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.core import UserError

torch.set_num_threads(1)
CPU = torch.device("cpu")
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
MLA = AttentionSpec(16, 1, 576, 0.1, torch.bfloat16, torch.bfloat16, latent=LatentDims(512, 64, 128, 128))
MHA = AttentionSpec(4, 2, 64, 0.125, torch.bfloat16, torch.bfloat16)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=latent_cases(), context_tokens=st.sampled_from([1, 7, 16, 4096]), seed=st.integers(0, 99))
def test_a_step_is_what_the_formula_gives(case: Case, context_tokens: int, seed: int) -> None:
    step = make_latent_step(case, seed)
    backend = TorchLatentBackend(step.layout)
    backend.context_tokens = context_tokens
    step.check(backend)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    case=latent_cases(),
    kv_dtype=st.sampled_from(FP8),
    kv_scale=st.sampled_from([0.25, 1.0, 3.0]),
    seed=st.integers(0, 99),
)
def test_an_fp8_cache_is_read_by_the_scale_it_was_written_with(
    case: Case, kv_dtype: torch.dtype, kv_scale: float, seed: int
) -> None:
    case = (dataclasses.replace(case[0], kv_dtype=kv_dtype), *case[1:])
    step = make_latent_step(case, seed, kv_scale)
    backend = TorchLatentBackend(step.layout)
    backend.context_tokens = 16
    step.check(backend)


def test_small_workspaces_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(MLA, num_heads=3, dtype=torch.float32, kv_dtype=torch.float32)
    step = make_latent_step((spec, 16, [(30, 1), (2, 1), (17, 1), (40, 20), (0, 33)], 3), seed=1)
    step.check(TorchLatentBackend(step.layout))
    monkeypatch.setattr(torch_mla, "_WORKSPACE", 2000)
    step.check(TorchLatentBackend(step.layout))


def test_a_padding_row_does_no_harm() -> None:
    step = make_latent_step((dataclasses.replace(MLA, num_heads=2), 16, [(5, 1), (9, 1)], 2), seed=0)
    assert step.batch.decode is not None
    lens = torch.tensor([6, 0], dtype=torch.int32)
    decode = dataclasses.replace(step.batch.decode, seq_lens=lens)
    mapping = torch.stack([step.batch.slot_mapping[0], torch.tensor(-1)])
    before = step.cache.key.clone()
    padded = dataclasses.replace(step, batch=dataclasses.replace(step.batch, decode=decode, slot_mapping=mapping))
    out = padded.run(TorchLatentBackend(step.layout))
    assert out.isfinite().all()
    assert torch.allclose(out[0].double(), step.want[0], atol=2e-2)
    changed = (step.cache.key != before).any(-1).flatten().nonzero().flatten()
    assert changed.tolist() == [int(mapping[0])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *FP8])
def test_the_layout_holds_each_token_in_one_run(dtype: torch.dtype) -> None:
    spec = dataclasses.replace(MLA, head_dim=24, kv_dtype=dtype, latent=LatentDims(16, 8, 4, 4))
    layout = LatentLayout(4)
    cache = layout.allocate(spec, 5, CPU)
    assert cache.key.shape == (5, 4, 24)
    assert cache.value.shape == (5, 4, 16)
    assert cache.value.data_ptr() == cache.key.data_ptr()
    assert cache.key.nbytes == 5 * layout.block_bytes(spec)
    generator = torch.Generator().manual_seed(0)
    kv_c, k_pe = (torch.randn(6, size, generator=generator) for size in (16, 8))
    slots = torch.tensor([19, 3, -1, 0, -7, 8])
    layout.write(cache, kv_c, k_pe, slots)
    kept = slots >= 0
    want = torch.cat([kv_c, k_pe], -1)[kept].to(dtype).float()
    assert torch.equal(cache.key.float().flatten(0, 1)[slots[kept]], want)
    assert int((cache.key.float() != 0).any(-1).sum()) == int(kept.sum())
    tokens = torch.cat(decoded(layout.gather_tokens(cache, slots[kept]), torch.float32), -1)
    assert torch.equal(tokens, want)
    blocks = torch.cat(decoded(layout.gather(cache, torch.tensor([[4, 0]])), torch.float32), -1)
    assert torch.equal(blocks, cache.key.float()[[4, 0]][None])


def test_fp8_codes_end_at_the_largest() -> None:
    spec = dataclasses.replace(MLA, kv_dtype=torch.float8_e4m3fn)
    layout = LatentLayout(1)
    cache = layout.allocate(spec, 1, CPU)
    scale = torch.tensor([0.5])
    layout.write(cache, torch.full((1, 512), 1e6), torch.full((1, 64), -1e6), torch.tensor([0]), scale, scale)
    kv_c, k_pe = decoded(layout.gather(cache, torch.tensor([0])), torch.float32, scale, scale)
    assert (kv_c == 224).all()
    assert (k_pe == -224).all()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    num_queries=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    shift=st.sampled_from([0.0, 300.0]),
)
def test_parts_merge_into_the_whole(num_queries: int, cuts: list[int], seed: int, shift: float) -> None:
    """Also where a part has no keys at all, and where exponentials of scores would overflow."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(n, 2, 8, generator=generator) for n in (num_queries, 30, 30))
    k = k + shift
    whole, whole_lse = dense_attention(q, k, v, 0.5, causal=False)
    bounds = [0, *sorted(cuts), 30]
    out, lse = torch.full_like(whole, float("nan")), torch.full_like(whole_lse, float("-inf"))
    for start, end in itertools.pairwise(bounds):
        if start == end:
            part = (torch.full_like(whole, float("nan")), torch.full_like(whole_lse, float("-inf")))
        else:
            part = dense_attention(q, k[start:end], v[start:end], 0.5, causal=False)
        out, lse = merge_lse(out, lse, *part)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-4)


def test_latent_layers_and_others_are_served_apart() -> None:
    cpu = Platform("cpu")
    choice = select([MLA, MLA], cpu, block_size=16)
    assert (choice.backend, choice.layout) == ("TORCH_MLA", "latent")
    assert any("CPU_ATTN" in line and "no latent (MLA) attention" in line for line in choice.explain())
    assert select([MHA], cpu, block_size=16).backend == "CPU_ATTN"
    for spec, backend, said in ((MHA, "TORCH_MLA", "it is for latent"), (MLA, "TORCH_ATTN", "it has no latent")):
        with pytest.raises(UserError, match=said):
            select([spec], cpu, block_size=16, backend=backend)
    with pytest.raises(UserError, match="this MLA model has one latent for all heads"):
        select([MLA], cpu, block_size=16, layout="linear")
    with pytest.raises(UserError, match="this one has keys and values of each KV head"):
        select([MHA], cpu, block_size=16, layout="latent")
    for name, layout in LAYOUTS.items():
        assert (layout.refusal(MLA, 16) is None) == (name == "latent")
        assert (layout.refusal(MHA, 16) is None) == (name != "latent")
