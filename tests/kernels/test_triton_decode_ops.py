"""The kernels around attention in a decode step: norms, rope, small linears, experts, the step's two ends."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from triton_support import DEVICE, DTYPES, NATIVE, normal, relative_error

from miniserve.attention.spec import AttentionSpec, QKRope
from miniserve.kernels.step_tensors import RowState, StepTensors
from miniserve.kernels.triton import decode_step, elementwise, moe, moe_token, small_linear
from miniserve.kernels.triton.head_linear import head_linear
from miniserve.kernels.triton.small_linear import Chip, LinearTile, Workspace, chip_of, choose_tile
from miniserve.models.layers import ops

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def integers(values: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [96, 128, 1000])
def test_norms(size: int, dtype: torch.dtype) -> None:
    wide, residual, weight = normal(0, 3, size + 9, dtype=dtype), normal(1, 3, size, dtype=dtype), normal(2, size)
    weight = weight.to(dtype)
    x = wide[:, 5 : 5 + size]  # rows may be strided
    assert relative_error(elementwise.rms_norm(x, weight, 1e-6), ops.rms_norm(x, weight, 1e-6)) < TOLERANCE[dtype]
    want, total = ops.Ops().add_rms_norm(x, residual, weight, 1e-6)
    got = elementwise.add_rms_norm(x.contiguous(), residual, weight, 1e-6)
    assert relative_error(got, want) < TOLERANCE[dtype]
    assert torch.equal(residual, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    gate_up = normal(0, 5, 2 * 1500, dtype=dtype)
    assert relative_error(elementwise.silu_and_mul(gate_up), ops.silu_and_mul(gate_up)) < TOLERANCE[dtype]


@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_norm_and_rope_within_a_fused_qkv(head_dim: int, with_norm: bool) -> None:
    spec = AttentionSpec(4, 2, head_dim, 1.0, torch.float32, torch.float32)
    qkv, cos_sin = normal(0, 4, 8 * head_dim), normal(1, 4, head_dim)
    weights = (normal(2, head_dim), normal(3, head_dim)) if with_norm else (None, None)
    want = ops.Ops().split_norm_rope(qkv.clone(), spec, QKRope(cos_sin, *weights, 1e-6))
    elementwise.norm_rope(qkv, cos_sin, *weights, 1e-6, num_heads=4, num_kv_heads=2, head_dim=head_dim)
    for got, expected in zip(ops.split_heads(qkv, spec), want, strict=True):
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "n", "m"), [(1, 24, 40), (3, 128, 512), (17, 512, 40), (65, 16, 16)])
def test_products_of_heads(tokens: int, n: int, m: int, transposed: bool) -> None:
    x = normal(0, tokens, 3, n + 8)[:, :, 8:]
    weights = normal(1, 3, m, n).mT if transposed else normal(1, 3, n, m)
    got = head_linear(x, weights)
    assert got is not None
    assert got.is_contiguous()
    assert relative_error(got, ops.Ops().head_linear(x, weights)) < 1e-5


def test_products_of_heads_of_many_tokens_are_left_to_the_library() -> None:
    assert head_linear(normal(0, 129, 2, 16), normal(1, 2, 16, 16)) is None
    assert head_linear(normal(0, 1, 2, 1024), normal(1, 2, 1024, 16)) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_parts_of_an_attention_merge_into_the_whole(dtype: torch.dtype, out_dtype: torch.dtype | None) -> None:
    """Views with strides, large sums, and parts without keys, which hold NaN."""
    tokens, heads, dim, nan, none = 37, 3, 24, float("nan"), float("-inf")
    out = normal(0, tokens + 2, heads, dim + 8).to(out_dtype or dtype)[2:, :, :dim]
    part = normal(1, tokens, heads, 2 * dim).to(dtype)[:, :, dim:]
    lse, part_lse = 200.0 + 3 * normal(2, heads, tokens + 2)[:, 2:], 200.0 + 3 * normal(3, heads, tokens)
    for (values, sums), token in (((out, lse), 4), ((part, part_lse), 9), ((out, lse), 30), ((part, part_lse), 30)):
        values[token], sums[:, token] = nan, none
    wide = lse.double(), part_lse.double()
    want_lse = torch.logaddexp(*wide)
    weights = ((each - want_lse).exp().nan_to_num(0.0).T[..., None] for each in wide)
    want = sum((each.double() * weight).nan_to_num(0.0) for each, weight in zip((out, part), weights, strict=True))
    elementwise.merge_lse(out, lse, part, part_lse)
    assert relative_error(out, want) < (1e-6 if out.dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    assert torch.allclose(lse.double(), want_lse, rtol=1e-6)
    assert not out[30].any()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "tile", [LinearTile(16, 32, 1, 4, 2), LinearTile(64, 32, 1, 4, 2, True), LinearTile(16, 32, 3, 4, 2)]
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 40, 96), (2, 64, 256), (17, 33, 304)])
def test_small_linears(m: int, n: int, k: int, tile: LinearTile, gated: bool) -> None:
    workspace = Workspace(DEVICE)
    x, weight = normal(0, m, k, dtype=torch.float16), normal(1, n * (2 if gated else 1), k, dtype=torch.float16)
    bias = normal(2, len(weight), dtype=torch.float16)
    for _ in range(2):  # the second finds the counters as the first left them
        got = small_linear.small_linear(x, weight, bias, tile, workspace, gated=gated)
        want = torch.nn.functional.linear(x.float(), weight.float(), bias.float())
        assert relative_error(got, ops.silu_and_mul(want) if gated else want) < 5e-3
    assert not workspace.counts.any()


def test_a_float32_weight_takes_any_x_and_several_rows_one_by_one() -> None:
    x, weight = normal(0, 5, 64, dtype=torch.float16), normal(1, 12, 64)
    got = small_linear.small_linear(
        x, weight, None, LinearTile(4, 64, 1, 4, 3), Workspace(DEVICE), out_dtype=torch.float32
    )
    assert got.dtype == torch.float32
    assert relative_error(got, x.float() @ weight.T) < 1e-5


@pytest.mark.parametrize("shared_bytes", [64 << 10, 232_448])
@pytest.mark.parametrize("m", [1, 2, 16, 17, 32, 33, 64, 65])
def test_every_cut_fits_the_shared_memory(m: int, shared_bytes: int) -> None:
    for n, k in ((6144, 4096), (4096, 12288), (1024, 2048), (151936, 4096), (48, 4096)):
        for gated in (False, True):
            tile = choose_tile(m, n, k, 2, Chip(132, shared_bytes), gated=gated)
            if tile is None:
                assert m > 32
                continue
            assert choose_tile(m, n, k, 2, Chip(304, shared_bytes, False), gated=gated).split_k == 1
            rows = tile.block_n * (2 if gated else 1) + max(16, m)
            assert m == 1 or rows * tile.block_k * 2 * tile.num_stages <= shared_bytes or tile.num_stages == 1


def fewer_programs(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """The interpreter runs them one by one."""
    if not NATIVE:
        for name in ("_MIDDLE", "_OUT"):
            monkeypatch.setattr(moe_token, name, (rows, *getattr(moe_token, name)[1:]))


@pytest.mark.parametrize(("hidden", "middle"), [(2200, 16), (16, 1100)])
def test_the_experts_of_one_token_in_several_rounds(hidden: int, middle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer rows than a program reads at a time."""
    fewer_programs(monkeypatch, rows=64)
    x, weights, ids = normal(0, 1, hidden), normal(1, 1, 2).abs(), integers([3, 1], torch.int32)[None]
    w1, w2 = normal(2, 4, 2 * middle, hidden) * 0.1, normal(3, 4, hidden, middle) * 0.1
    want = torch.zeros_like(x)
    for weight, expert in zip(weights[0], (3, 1), strict=True):
        want += weight * (ops.silu_and_mul(x @ w1[expert].T) @ w2[expert].T)
    assert relative_error(moe_token.token_experts(x, w1, w2, weights, ids), want) < 1e-4


@pytest.mark.parametrize(("tokens", "k"), [(1, 3), (1, 4), (3, 3), (40, 3)])
@pytest.mark.parametrize("swap", [False, True])
def test_routed_experts(tokens: int, k: int, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token a power of two of experts is fetched at once."""
    fewer_programs(monkeypatch, rows=16)
    num_experts, hidden, middle = 12, 80, 40
    x, shared = normal(0, tokens, hidden), normal(1, tokens, hidden)
    w1, w2 = normal(2, num_experts, 2 * middle, hidden) * 0.1, normal(3, num_experts, hidden, middle) * 0.1
    ids = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)]).int().to(DEVICE)
    weights = normal(4, tokens, k).abs()
    tiles = (moe.MoETile(16, 64, 32, 4, 2, swap), moe.MoETile(16, 64, 16, 4, 2, swap))
    parts = moe.experts(x, w1, w2, weights, ids, tiles)
    start, norm = normal(5, tokens, hidden), normal(6, hidden)
    want = torch.zeros_like(x)
    for token in range(tokens):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            activated = ops.silu_and_mul((x[token] @ w1[expert].T)[None])
            want[token] += weight * (activated @ w2[expert].T)[0]
    if tokens == 1:
        assert relative_error(moe_token.token_experts(x, w1, w2, weights, ids), want) < 1e-4
    # Ranks have some of the experts each; pairs of others give zeros.
    apart = torch.zeros_like(want)
    for first, last in ((0, 5), (5, 12)):
        choice = (x, w1[first:last], w2[first:last], weights, ids)
        own = moe.experts(*choice, tiles, first=first).view(tokens, k, hidden)
        here = (ids >= first) & (ids < last)
        assert torch.equal(own[~here], torch.zeros_like(own[~here]))
        apart += own.sum(1)
        if tokens == 1:
            assert relative_error(moe_token.token_experts(*choice, first=first), own.sum(1)) < 1e-4
    assert relative_error(apart, want) < 1e-4
    for extra, dtype in ((None, torch.float32), (shared, torch.float32), (shared, torch.float16)):
        residual, tolerance = start.clone(), 1e-4 if dtype == torch.float32 else 1e-3
        got = moe.add_pairs_norm(parts.to(dtype), extra, residual, norm, 1e-6)
        total = start + want if extra is None else start + want + extra
        assert relative_error(residual, total) < tolerance
        assert relative_error(got, ops.rms_norm(total, norm, 1e-6)) < tolerance
        pending = ops.PendingSum(mock.Mock(), parts.to(dtype), extra)
        assert relative_error(start + pending.total(start), total) < tolerance


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize(("tokens", "k"), [(30, 3), (97, 1), pytest.param(9000, 8, marks=pytest.mark.gpu)])
def test_pairs_in_the_order_of_their_experts(tokens: int, k: int, first: int) -> None:
    """Some experts have none, one has many."""
    num_experts, block_m, num_pairs = 12, 16, tokens * k
    ids = torch.randint(0, num_experts - 2, (tokens, k), generator=torch.Generator().manual_seed(tokens)).int()
    ids[: tokens // 2, 0] = 5
    held = num_experts - first
    pairs, blocks = moe.aligned_pairs(ids.to(DEVICE), held, block_m, first)
    in_use = int(blocks[0])
    found = pairs[: in_use * block_m].view(in_use, block_m).tolist()
    experts = blocks[1 : 1 + in_use].tolist()
    want: list[tuple[int, list[int]]] = []
    for expert in range(held):
        mine = (ids.flatten() == expert + first).nonzero()[:, 0].tolist()
        mine += [num_pairs] * (-len(mine) % block_m)
        want += [(expert, mine[at : at + block_m]) for at in range(0, len(mine), block_m)]
    assert list(zip(experts, found, strict=True)) == want


def test_tiles_of_experts() -> None:
    """Rows of both products share blocks; a narrow middle is a whole number of tiles."""
    for pairs in (8, 64, 512, 2048, 32768):
        for middle in (64, 192, 256, 176, 768):
            gate_up, down = moe.choose_tiles(pairs, 128, middle)
            assert gate_up.block_m == down.block_m
            assert middle > 256 or middle % 64 or middle % down.block_k == 0
            narrow = middle in (64, 192, 256) and pairs <= 40 * 128
            assert (moe.choose_tiles(pairs, 128, middle) == moe.choose_tiles(pairs, 128, 768)) is not narrow


on_hopper = pytest.mark.skipif(not NATIVE or not chip_of(DEVICE).wgmma, reason="needs a Hopper GPU")


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 8, 64), (130, 200, 72), (1029, 1408, 2048), (4096, 3072, 1000)])
def test_swiglu_of_many_rows(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    from miniserve.kernels.triton.large_linear import large_gated

    x, weight = normal(0, m, k + 8, dtype=dtype)[:, :k], normal(1, 2 * n, k, dtype=dtype)
    want = ops.silu_and_mul(x.float() @ weight.float().T)
    assert relative_error(large_gated(x, weight, chip_of(DEVICE)), want) < TOLERANCE[dtype]


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "num_experts", "k", "hidden", "middle"),
    [(2, 4, 1, 64, 8), (300, 5, 3, 520, 200), (700, 64, 6, 2048, 1408), (1100, 7, 7, 256, 768)],
)
def test_experts_of_many_rows(
    tokens: int, num_experts: int, k: int, hidden: int, middle: int, dtype: torch.dtype
) -> None:
    from miniserve.kernels.triton.large_linear import large_experts

    x, scales = normal(0, tokens, hidden, dtype=dtype), normal(4, tokens, k).abs()
    w1, w2 = (normal(seed, num_experts, *shape, dtype=dtype) / 8 for seed, shape in (
        (2, (2 * middle, hidden)), (3, (hidden, middle)),
    ))  # fmt: skip
    ids = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)]).int().to(DEVICE)
    ids[: tokens // 2, 0] = 1  # one expert with many rows, perhaps twice for a token
    got = large_experts(x, w1, w2, scales, ids, chip_of(DEVICE)).view(tokens, k, hidden)
    for expert in range(num_experts):
        where = (ids == expert).nonzero(as_tuple=True)
        activated = ops.silu_and_mul(x[where[0]] @ w1[expert].T)
        want = scales[where][:, None] * (activated @ w2[expert].T).float()
        assert relative_error(got[where], want) < TOLERANCE[dtype] or not len(want)


def step_tensors(rows: list[int], width: int) -> StepTensors:
    size = len(rows)
    return StepTensors(
        integers(rows),
        *(integers([77] * size) for _ in range(3)),
        integers([77] * size, torch.int32),
        torch.zeros(size, width, dtype=torch.int32, device=DEVICE),
    )


def host_memory(staged: torch.Tensor) -> torch.Tensor:
    return staged.pin_memory() if DEVICE.type == "cuda" else staged


def test_the_start_of_a_step() -> None:
    tables = torch.arange(5 * 7, dtype=torch.int32, device=DEVICE).view(5, 7)
    state = RowState(tables, integers([0, 16, 5, 47, 3]), integers([9, 8, 7, 6, 5]), integers([0] * 5))
    step = step_tensors([3, -1, 1], 7)
    decode_step.advance(state, step, 16, explicit=False)
    assert step.input_ids.tolist() == [6, 0, 8]
    assert step.positions.tolist() == [47, 0, 16]
    assert step.slots.tolist() == [(3 * 7 + 2) * 16 + 15, -1, (7 + 1) * 16]
    assert step.seq_lens.tolist() == [48, 0, 17]  # a padding row has none
    assert step.block_tables[0].tolist() == tables[3].tolist()
    assert state.lens.tolist() == [0, 17, 5, 48, 3]


def test_the_end_of_a_step() -> None:
    logits = normal(0, 3, 9001)
    logits[0, 100] = logits[0, 8000] = 50.0  # the lowest id among equals
    state = RowState(integers([0]), integers([0] * 5), integers([9, 8, 7, 6, 5]), integers([0] * 5))
    tokens = integers([0] * 3)
    # Of three ranks, the second without words of a second part.
    parts = [(logits[:, :4500], 0), (logits[:, 4500:6000], 4500), (logits[:, 6000:], 6000)]
    best = torch.stack([decode_step.best_words(part.contiguous(), first, 4500) for part, first in parts])
    for ranks in (best, decode_step.best_words(logits, 0, 9001)[None]):
        decode_step.hand_over(ranks, integers([-1, -1, -1]), state, tokens)
        assert tokens.tolist() == [100, *logits[1:].argmax(1).tolist()]
        assert state.num_outputs.tolist() == [0] * 5
    decode_step.hand_over(best, integers([3, -1, 1]), state, tokens)
    assert tokens.tolist() == [100, *logits[1:].argmax(1).tolist()]
    assert state.last_tokens.tolist() == [9, tokens[2].item(), 7, 100, 5]
    assert state.num_outputs.tolist() == [0, 1, 0, 1, 0]


def test_what_the_host_staged() -> None:
    staged = torch.tensor([2, 0, -1, -1, 3, 7, 11, 30, 70, 110, 5, 5], dtype=torch.int32)
    step, tables = step_tensors([9] * 6, 5), torch.zeros(3, 5, dtype=torch.int32, device=DEVICE)
    decode_step.apply_changes(host_memory(staged), 4, 3, step, tables, explicit=False)
    assert step.rows.tolist() == [2, 0, -1, -1, 9, 9]
    assert step.positions.tolist() == step.input_ids.tolist() == [77] * 6
    assert tables.flatten()[[3, 7, 11]].tolist() == [30, 70, 110]
    assert tables.sum() == 210


def test_a_step_whose_entries_the_host_states() -> None:
    tables = torch.arange(5 * 7, dtype=torch.int32, device=DEVICE).view(5, 7)
    state = RowState(tables, integers([3] * 5), integers([9] * 5), integers([0] * 5))
    step = step_tensors([0] * 5, 7)
    # Row 3 from position 15 into a new block, row 1 alone, padding; then block 90 comes to row 3, place 1.
    staged = [3, 3, 3, 1, -1, 15, 16, 17, 0, 99, 40, 41, 42, 43, 99, 3 * 7 + 1, 90]
    staged_tensor = host_memory(torch.tensor(staged, dtype=torch.int32))
    decode_step.apply_changes(staged_tensor, 5, 1, step, tables, explicit=True)
    decode_step.advance(state, step, 16, explicit=True)
    assert step.input_ids.tolist() == [40, 41, 42, 43, 0]
    assert step.positions.tolist() == [15, 16, 17, 0, 0]
    assert step.slots.tolist() == [21 * 16 + 15, 90 * 16, 90 * 16 + 1, 7 * 16, -1]
    assert step.seq_lens.tolist() == [16, 17, 18, 1, 0]
    assert step.block_tables[1].tolist() == [21, 90, 23, 24, 25, 26, 27]
    assert state.lens.tolist() == [3] * 5 and state.last_tokens.tolist() == [9] * 5
