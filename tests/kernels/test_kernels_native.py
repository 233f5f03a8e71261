"""The C++ kernels against their PyTorch references, at odd sizes and strides."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.attention.spec import AttentionSpec, QKRope
from miniserve.kernels import native, native_build
from miniserve.kernels.sampling import NUM_COLUMNS, RowParams, draw
from miniserve.kernels.step_tensors import RowState, StepTensors
from miniserve.models.layers.ops import NativeOps, Ops

pytestmark = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"C++ kernels: {native.unavailable_reason()}"
)
# bfloat16 may differ by one rounding where the two sum in another order.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
DTYPES = st.sampled_from(list(TOLERANCE))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm()
    assert error < TOLERANCE[want.dtype]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 3, 4, 5, 8, 11, 12, 13, 24, 40, 100]),
    out_features=st.integers(1, 20).map(lambda n: 16 * n),
    in_features=st.sampled_from([2, 30, 64, 130, 512]),
    bias=st.booleans(),
    seed=st.integers(0, 999),
)
def test_linear(rows: int, out_features: int, in_features: int, bias: bool, seed: int) -> None:
    kernels = native.NativeKernels()
    if not kernels.can_pack(torch.bfloat16, in_features, out_features):
        pytest.skip("this processor has no bfloat16 dot product")
    weight = normal(seed, out_features, in_features).bfloat16()
    wide = normal(seed + 1, rows, in_features + 6).bfloat16()
    x = wide[:, :in_features]  # rows need not be adjacent
    b = normal(seed + 2, out_features).bfloat16() if bias else None
    got = kernels.linear(x, kernels.pack_linear(weight), b)
    close(got, torch.nn.functional.linear(x.float(), weight.float(), None if b is None else b.float()).bfloat16())


def test_linear_declines_what_it_cannot_pack() -> None:
    kernels = native.NativeKernels()
    assert not kernels.can_pack(torch.float32, 64, 64)
    assert not kernels.can_pack(torch.bfloat16, 64, 40)
    assert not kernels.can_pack(torch.bfloat16, 63, 64)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(dtype=DTYPES, rows=st.integers(1, 70), size=st.sampled_from([8, 50, 256, 1000]), seed=st.integers(0, 999))
def test_norms_and_activation(dtype: torch.dtype, rows: int, size: int, seed: int) -> None:
    reference, fused = Ops(), NativeOps(native.NativeKernels())
    x, residual, weight = normal(seed, rows, size).to(dtype), normal(seed + 1, rows, size).to(dtype), None
    weight = normal(seed + 2, size).to(dtype)
    close(fused.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    want_normed, want_sum = reference.add_rms_norm(x, residual, weight, 1e-6)
    got_normed, got_sum = fused.add_rms_norm(x, residual.clone(), weight, 1e-6)
    assert torch.equal(got_sum, want_sum)
    close(got_normed, want_normed)
    gate_up = 30 * normal(seed + 3, rows, 2 * size).to(dtype)  # wide enough for the sigmoid to saturate
    close(fused.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    dtype=DTYPES,
    tokens=st.sampled_from([1, 3, 40]),
    heads=st.sampled_from([1, 4, 6]),
    kv_heads=st.sampled_from([1, 2]),
    head_dim=st.sampled_from([16, 40, 80, 128]),
    norm=st.booleans(),
    seed=st.integers(0, 999),
)
def test_split_norm_rope(
    dtype: torch.dtype, tokens: int, heads: int, kv_heads: int, head_dim: int, norm: bool, seed: int
) -> None:
    spec = AttentionSpec(heads, kv_heads, head_dim, 1.0, dtype, dtype)
    qkv = normal(seed, tokens, (heads + 2 * kv_heads) * head_dim).to(dtype)
    angles = 100 * normal(seed + 1, tokens, head_dim // 2)
    cos_sin = torch.cat([angles.cos(), angles.sin()], dim=1)
    q_weight, k_weight = (normal(seed + i, head_dim).to(dtype) if norm else None for i in (2, 3))
    rope = QKRope(cos_sin, q_weight, k_weight, 1e-6)
    want, got = (each.split_norm_rope(qkv.clone(), spec, rope) for each in (Ops(), NativeOps(native.NativeKernels())))
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    dtype=DTYPES,
    rows=st.integers(1, 4),
    size=st.sampled_from([1, 15, 100, 256, 300, 1000]),
    levels=st.sampled_from([1, 3, 10**6]),
    odd=st.sampled_from([None, float("nan"), float("inf"), -float("inf")]),
    seed=st.integers(0, 999),
)
def test_greedy(dtype: torch.dtype, rows: int, size: int, levels: int, odd: float | None, seed: int) -> None:
    """Few levels make equals, of which the lowest is taken; a NaN counts as the largest, as PyTorch has it."""
    logits = (levels * normal(seed, rows, size)).round().div(levels).to(dtype) - 3
    if odd is not None:
        logits[0, seed % size :: 50] = odd
    taken = torch.randperm(6, generator=torch.Generator().manual_seed(seed))[:rows]
    tokens, last_tokens, num_outputs = torch.zeros(rows).long(), torch.full((6,), -1), torch.arange(6)
    params = RowParams(torch.zeros(6).long(), torch.zeros(6).long(), torch.zeros(6, NUM_COLUMNS))
    want = draw(logits, taken, params, num_outputs)
    state = RowState(torch.zeros(6, 1).int(), torch.zeros(6).long(), last_tokens, num_outputs)
    native.NativeKernels().draw_next(logits, taken, params, state, tokens)
    assert torch.equal(tokens, want)
    assert torch.equal(tokens, torch.from_numpy(np.argmax(logits.float().numpy(), -1)))
    assert torch.equal(last_tokens[taken], tokens)
    assert (last_tokens == -1).sum() == 6 - rows
    assert torch.equal(num_outputs, torch.arange(6).index_add(0, taken, torch.ones(rows).long()))


@pytest.mark.parametrize("explicit", [False, True])
def test_advance(explicit: bool) -> None:
    rows, tables = torch.tensor([2, 0, 2] if explicit else [2, 0, 1]), torch.randperm(15).view(3, 5).int()
    lens, last_tokens = torch.tensor([0, 15, 16]), torch.tensor([7, 8, 9])
    ids, positions = (torch.tensor([4, 5, 6]), torch.tensor([16, 0, 17])) if explicit else (torch.zeros(3).long(),) * 2
    want_ids = ids if explicit else last_tokens[rows]
    want = positions if explicit else lens[rows]
    want_lens = lens.clone() if explicit else lens + 1
    step = StepTensors.allocate(3, 5, torch.device("cpu"))
    for fixed, values in ((step.rows, rows), (step.input_ids, ids), (step.positions, positions)):
        fixed.copy_(values)
    state = RowState(tables, lens, last_tokens, torch.zeros(3).long())
    native.NativeKernels().advance(state, step, 8, explicit=explicit)
    assert torch.equal(step.input_ids, want_ids)
    assert torch.equal(step.positions, want)
    assert torch.equal(lens, want_lens)
    assert torch.equal(step.seq_lens, want.int() + 1)
    assert torch.equal(step.slots, tables[rows, want // 8].long() * 8 + want % 8)
    for table, row, position in zip(step.block_tables, rows, want, strict=True):
        assert torch.equal(table[: position // 8 + 1], tables[row, : position // 8 + 1])


@pytest.mark.parametrize("table", [normal(0, 9, 7), normal(0, 9, 3).bfloat16(), normal(0, 300, 300)])
def test_gather_rows(table: torch.Tensor) -> None:
    ids = torch.tensor([8, 0, 8, 3])
    assert torch.equal(native.NativeKernels().gather_rows(ids, table), table[ids])


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_build.shutil, "which", lambda name: None)
    with pytest.raises(native_build.Unavailable, match=r"no C\+\+ compiler"):
        native_build.build()


def test_a_failing_compiler_is_told_with_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cpu.cpp"
    broken.write_text("this is not C++;")
    monkeypatch.setattr(native_build, "_SOURCE", broken)
    monkeypatch.setattr(native_build, "cache_dir", lambda: tmp_path / "cache")
    with pytest.raises(native_build.Unavailable, match=r"could not compile the CPU kernels: .*error"):
        native_build.build()
    assert not list((tmp_path / "cache").iterdir()), "a failed build must leave nothing behind"
