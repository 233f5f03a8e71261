"""Products with weights in 8 bits and their scales, beside float32 products of what codes and scales say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from triton_support import DEVICE, FP8, HALVES, NATIVE, every_other, normal, relative_error

from miniserve.kernels.triton import medium_linear, moe, moe_token, rounded_linear, runtime, small_linear, widen
from miniserve.kernels.triton.medium_linear import MediumTile
from miniserve.kernels.triton.moe import MoETile
from miniserve.kernels.triton.small_linear import Chip, LinearTile, Workspace, chip_of, largest_tile
from miniserve.models.layers import ops
from miniserve.models.layers.aiter_linear import rounded_groups

Block = tuple[int, int] | None
BLOCK_SHAPES: list[Block] = [None, (32, 32), (64, 96)]
BLOCKS = pytest.mark.parametrize("block", BLOCK_SHAPES, ids=str)
H200 = Chip(132, 232_448, wgmma=True)
CHIPS = [H200, Chip(132, 232_448), Chip(304, 64 << 10, splits=False)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def scaled(seed: int, *shape: int, block: Block) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [..., N, K], their scales, and what they say in float32."""
    codes = normal(seed, *shape).to(FP8)
    *lead, n, k = shape
    if block is None:
        scale = normal(seed + 1, *lead, n).abs() + 0.1
        return codes, scale, codes.float() * scale[..., None]
    scale = normal(seed + 1, *lead, -(-n // block[0]), -(-k // block[1])).abs() + 0.1
    spread = scale.repeat_interleave(block[0], -2)[..., :n, :].repeat_interleave(block[1], -1)[..., :k]
    return codes, scale, codes.float() * spread


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gated: bool) -> torch.Tensor:
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return ops.silu_and_mul(y) if gated else y


def experts_sum(
    x: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x)
    for token, row in enumerate(ids.tolist()):
        for weight, expert in zip(weights[token], row, strict=True):
            out[token] += weight * (ops.silu_and_mul(x[token : token + 1] @ w1[expert].T) @ w2[expert].T)[0]
    return out


@every_other(
    "tile,block,gated",
    [
        LinearTile(16, 32, 1, 4, 2),
        LinearTile(32, 32, 1, 4, 2, True),
        LinearTile(16, 32, 3, 4, 2),
        LinearTile(16, 32, 2, 4, 2, True, splits=2),
        LinearTile(16, 32, 1, 4, 2, splits=4),
    ],
    BLOCK_SHAPES,
    [False, True],
)
def test_few_rows(tile: LinearTile, block: Block, gated: bool) -> None:
    """In float32, so that an activation rounded to 8 bits would show."""
    workspace = Workspace(DEVICE)
    wide_k = 304 if NATIVE else 176  # the interpreter takes its time for each tile
    for m, n, k in ((1, 64, 96), (2, 64, wide_k - 32), (17, 64 if gated else 72, wide_k)):
        if m == 1 and tile.splits > 1:  # without the matrix units
            continue
        weight, scale, wide = scaled(1, n * (2 if gated else 1), k, block=block)
        x, bias = normal(0, m, k), normal(3, len(weight))
        got = small_linear.small_linear(x, weight, bias, tile, workspace, gated=gated, scale=scale, block=block)
        assert relative_error(got, product(x, wide, bias, gated)) < 1e-5


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("m", [1, 5])
def test_activations_keep_their_bits(m: int, dtype: torch.dtype) -> None:
    weight, scale, wide = scaled(1, 48, 128, block=(32, 64))
    x = normal(0, m, 128, dtype=dtype)
    tile = LinearTile(16, 64, 1, 4, 2)
    got = small_linear.small_linear(x, weight, None, tile, Workspace(DEVICE), scale=scale, block=(32, 64))
    assert relative_error(got, product(x, wide, None, False)) < (1e-3 if dtype == torch.float16 else 5e-3)


def test_tiles_that_reach_beyond_a_scale_are_refused() -> None:
    weight, scale, _ = scaled(1, 96, 96, block=(32, 32))
    for m, n, tile in ((1, 96, LinearTile(64, 32, 1, 4, 2)), (2, 96, LinearTile(32, 64, 1, 4, 2))):
        with pytest.raises(ValueError, match="do not fit"):
            small_linear.small_linear(
                normal(0, m, n), weight, None, tile, Workspace(DEVICE), scale=scale, block=(32, 32)
            )
    with pytest.raises(ValueError, match="do not fit"):  # ups begin within a block
        small_linear.small_linear(
            normal(0, 1, 96), weight, None, LinearTile(16, 32, 1, 4, 2), Workspace(DEVICE), gated=True, scale=scale,
            block=(32, 32),
        )  # fmt: skip


@BLOCKS
def test_any_number_of_rows(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    if not NATIVE:
        monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(132, 1 << 17))
    kernels = runtime.TritonKernels(DEVICE)
    dtype = torch.bfloat16 if NATIVE else torch.float32
    for m, n, k in ((1, 64, 192), (17, 64, 304), (65, 64, 96), (4, 64, 100), *([(257, 1024, 1024)] if NATIVE else [])):
        for gated in (False, True):
            weight, scale, wide = scaled(1, n * (2 if gated else 1), k, block=block)
            x = normal(0, m, k, dtype=dtype)
            bias = normal(3, len(weight), dtype=dtype)
            got = kernels.linear_fp8(x, weight, scale, block, bias, gated=gated)
            assert relative_error(got, product(x, wide, bias, gated)) < TOLERANCE[dtype]


@BLOCKS
def test_widening_a_weight(block: Block) -> None:
    weight, scale, wide = scaled(1, 72, 200, block=block)
    assert torch.equal(widen.widen(weight, scale, block, torch.float32), wide)
    assert torch.equal(widen.widen(weight, scale, block, torch.float16), wide.half())


E4M3 = pytest.mark.skipif(torch.float8_e4m3fn != FP8, reason="e4m3fn, which is not this GPU's format")


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversion to e4m3 as a GPU's: the interpreter's own carries nothing from the mantissa to the exponent."""
    if NATIVE:
        return
    from triton.runtime import interpreter

    real = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if str(target) != "fp8e4nv" or values.dtype != "float32":
            return real(values, source, target, mode)
        return torch.from_numpy(values.copy()).to(FP8).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@E4M3
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("group", [128, None])
def test_rounding_to_8_bits(group: int | None) -> None:
    """As aiter is given it. A row of zeros stays one; NaN and infinity stay no numbers, and in their group."""
    x = normal(0, 37, 400)[:, :384] * torch.logspace(-6, 4, 37, device=DEVICE)[:, None]
    x[3] = 0.0
    codes, scale = rounded_linear.rounded(x, group, 48)
    assert codes.shape == (48, 384) and scale.shape == (3 if group else 1, 48)
    got = codes[:37].float().unflatten(1, (len(scale), -1)) * scale.T[:37, :, None]
    if group:
        want_codes, want_scale = rounded_groups(x, FP8)
        want = want_codes.float().unflatten(1, (3, -1)) * want_scale[..., None]
        assert ((got - want).abs() <= want.abs() * 2**-3 + want_scale[..., None] * 2**-9).all()  # a code apart
        assert (((got - want).abs() > 1e-6 * want.abs()).float().mean()) < 1e-3
    error = (got.flatten(1) - x).abs() / x.abs().amax(1, keepdim=True).clamp(min=1e-9)
    assert error.max() < 1.001 * 16 / 448 and got[3].abs().max() == 0.0
    x[5, 130], x[6, 1] = torch.nan, torch.inf
    codes, scale = rounded_linear.rounded(x, group, 37)
    got = codes.float().unflatten(1, (len(scale), -1)) * scale.T[:, :, None]
    assert got.flatten(1)[5, 130].isnan() and got.flatten(1)[6, 1].isnan()
    assert got.isfinite().all((1, 2))[[0, 4, 7, 36]].all()


def scaled_mm_of_blocks(
    a: torch.Tensor, b: torch.Tensor, a_scale: torch.Tensor, a_recipe: Any, b_scale: torch.Tensor, b_recipe: Any,
    output_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """As PyTorch's, of which a CPU has none for blocks; it refuses what that refuses, and what it would get wrong."""
    (m, k), n = a.shape, b.shape[1]
    assert str(a_recipe).endswith("BlockWise1x128") and str(b_recipe).endswith("BlockWise128x128")
    assert a.is_contiguous() and b.stride() == (1, k) and n % 16 == k % 16 == m % 16 == 0
    assert a_scale.shape == (m, k // 128) and a_scale.stride() == (1, m)
    assert b_scale.shape == (-(-(k // 128) // 4) * 4, -(-n // 128)) and b_scale.stride() == (1, k // 128)
    wide = b.float() * b_scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:, :n]
    return ((a.float() * a_scale.repeat_interleave(128, 1)) @ wide).to(output_dtype)


@E4M3
@pytest.mark.usefixtures("rounding")
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block", [None, (128, 128)], ids=str)
def test_products_that_round_what_is_multiplied(block: Block, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not NATIVE:
        monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(132, 1 << 17))
        if block is not None:
            monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm_of_blocks)
    elif not chip_of(DEVICE).wgmma:
        pytest.skip("Hopper GPUs alone multiply blocks so")
    dtype = torch.bfloat16 if NATIVE else torch.float16  # the interpreter's bfloat16 is not exact
    for m, n, k in ((21, 80, 512), *([(257, 6144, 4096), (4096, 256, 1536)] if NATIVE else [])):
        weight, scale, wide = scaled(1, n * (2 if gated else 1), k, block=block)
        wide, scale = wide / 30, scale / 30
        x, bias = normal(0, m, k + 8, dtype=dtype)[:, :k], normal(3, len(weight), dtype=dtype)
        got = runtime.TritonKernels(DEVICE).rounded_linear(x, weight, scale, block, bias, gated=gated)
        codes, x_scale = rounded_linear.rounded(x, None if block is None else 128, m)
        by_hand = codes.float() * x_scale.T.repeat_interleave(k // len(x_scale), 1)
        assert got.dtype == dtype and got.shape == (m, n)
        assert relative_error(got, product(by_hand, wide, bias, gated)) < 2e-2
        assert relative_error(got, product(x, wide, bias, gated)) < 6e-2


@BLOCKS
@pytest.mark.parametrize(
    "tiles",
    [
        (MoETile(16, 32, 32, 4, 2), MoETile(16, 32, 32, 4, 2)),
        (MoETile(16, 32, 32, 4, 2, swap=True), MoETile(16, 32, 32, 4, 2, swap=True)),
        (MoETile(8, 32, 32, 4, 2, swap=True, splits=4), MoETile(8, 32, 32, 4, 2, splits=2)),
    ],
    ids=["plain", "swapped", "in splits"],
)
def test_experts(tiles: tuple[MoETile, MoETile], block: Block) -> None:
    """The last of the splits end within a tile of columns, or have none."""
    num_experts, k, hidden, middle = 6, 3, 96, 64
    w1, s1, wide1 = scaled(1, num_experts, 2 * middle, hidden, block=block)
    second = block and (32, 32)  # apart from the first's
    w2, s2, wide2 = scaled(3, num_experts, hidden, middle, block=second)
    for tokens in (1, 9):
        x, weights = normal(0, tokens, hidden), normal(4, tokens, k).abs()
        ids = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)]).int().to(DEVICE)
        want = experts_sum(x, wide1, wide2, weights, ids)
        parts = moe.experts(x, w1, w2, weights, ids, tiles, scales=(s1, s2), blocks=(block, second))
        assert relative_error(parts.view(tokens, k, hidden).sum(1), want) < 1e-5


@E4M3
@pytest.mark.usefixtures("rounding")
@BLOCKS
@pytest.mark.parametrize("swap", [False, True])
def test_experts_that_round_what_is_multiplied(swap: bool, block: Block) -> None:
    """A group of a row ends within a tile of columns, and the last one early."""
    num_experts, k, hidden, middle, tokens = 5, 2, 160, 192, 9
    w1, s1, wide1 = scaled(1, num_experts, 2 * middle, hidden, block=block)
    w2, s2, wide2 = scaled(3, num_experts, hidden, middle, block=block)
    tiles = (MoETile(16, 32, 32, 4, 2, swap), MoETile(16, 32, 32, 4, 2, swap))
    x, weights = normal(0, tokens, hidden, dtype=torch.float16), normal(4, tokens, k).abs()
    x *= torch.logspace(-2, 0, tokens, device=DEVICE)[:, None]
    ids = torch.stack([torch.randperm(num_experts)[:k] for _ in range(tokens)]).int().to(DEVICE)
    parts = moe.experts(x, w1, w2, weights, ids, tiles, scales=(s1 / 16, s2 / 16), blocks=(block, block), rounds=True)
    got = parts.view(tokens, k, hidden).sum(1)
    for number, row in enumerate(got):  # each row by itself: a scale of another would not show among all
        want = experts_sum(x[number, None].float(), wide1 / 16, wide2 / 16, weights[number, None], ids[number, None])
        assert 1e-3 < relative_error(row, want[0]) < 8e-2


@pytest.mark.parametrize(("hidden", "middle", "top_k"), [(1120, 32, 2), (32, 576, 2), (40, 96, 3)])
@BLOCKS
def test_the_experts_of_one_token(
    block: Block, hidden: int, middle: int, top_k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several rounds of columns, all experts' rows at once, or neither."""
    if not NATIVE:  # fewer programs: the interpreter runs them one by one
        monkeypatch.setattr(moe_token, "_SCALED_MIDDLE", ((32, 1024, 4),) * 2)
        monkeypatch.setattr(moe_token, "_SCALED_OUT", ((32, 256, 4),) * 2)
    block = block and (32, block[1])
    w1, s1, wide1 = scaled(1, 3, 2 * middle, hidden, block=block)
    w2, s2, wide2 = scaled(3, 3, hidden, middle, block=block)
    x, weights = normal(0, 1, hidden), normal(4, 1, top_k).abs()
    ids = torch.tensor([[2, 0, 1][:top_k]], dtype=torch.int32, device=DEVICE)
    got = moe_token.token_experts(x, w1, w2, weights, ids, scales=(s1, s2), blocks=(block, block))
    assert relative_error(got, experts_sum(x, wide1, wide2, weights, ids)) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE or not chip_of(DEVICE).wgmma, reason="needs a Hopper GPU, whose matrix units these use")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("block", [None, (32, 128), (64, 256)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), [(13, 64, 96), (65, 192, 400), (256, 1216, 1008)])
def test_medium_rows(m: int, n: int, k: int, block: Block, dtype: torch.dtype) -> None:
    for gated, tile in (
        (False, MediumTile(16, 1, 4)),
        (True, MediumTile(16, 3, 4, early=2)),
        (False, MediumTile(64, 2, 4, share=True)),
        (True, MediumTile(64, 3, 4)),
        (False, MediumTile(32, 3, 6, share=True)),
        (True, MediumTile(128, 2, 4)),
        (False, MediumTile(128, 2, 4, share=True)),
    ):
        weight, scale, wide = scaled(1, n * (2 if gated else 1), k, block=block)
        x, bias = normal(0, m, k + 8, dtype=dtype)[:, :k], normal(3, len(weight), dtype=dtype)
        for given in (bias, None):
            got = medium_linear.medium_linear(x, weight, given, tile, gated=gated, scale=scale, block=block)
            assert relative_error(got, product(x, wide, given, gated)) < TOLERANCE[dtype], tile
        if not gated:
            parts = medium_linear.linear_parts(
                x, weight, MediumTile(tile.block_m, tile.groups, tile.num_stages, splits=2, share=tile.share),
                scale=scale, block=block,
            )  # fmt: skip
            assert relative_error(parts.view(m, 2, n).sum(1), product(x, wide, None, False)) < 1e-4, tile


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("block", [None, (128, 128), (64, 64), (32, 96)], ids=str)
def test_every_cut_fits(block: Block, chip: Chip) -> None:
    for n, k in ((6144, 4096), (4096, 12288), (12288, 4096), (192, 4096), (4096, 192), (9216, 4096)):
        for gated in (False, True):
            for m in (1, 2, 16, 17, 32, 33, 64):
                tile = small_linear.choose_scaled_tile(m, n, k, block, chip, gated=gated)
                assert tile is not None
                assert block is None or (block[0] % tile.block_n == 0 and (m == 1 or block[1] % tile.block_k == 0))
                rows = tile.block_n * (2 if gated else 1) + 2 * max(16, m)
                assert m == 1 or rows * tile.block_k * tile.num_stages <= chip.shared_bytes
                assert tile.split_k == 1 or chip.splits
            assert small_linear.choose_scaled_tile(65, n, k, block, chip, gated=gated) is None
    for pairs, middle in itertools.product((8, 64, 512, 1024, 1536, 4096, 32768), (192, 768)):
        tiles = moe.choose_scaled_tiles(pairs, 128, middle, (block, None), splits=chip.wgmma)
        assert largest_tile(block, tiles[0].block_n, tiles[0].block_k) == (tiles[0].block_n, tiles[0].block_k)
        assert tiles[0].block_m == tiles[1].block_m
        assert all(tile.splits == 1 or chip.wgmma for tile in tiles)


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 2, 16, 17, 64, 65, 128, 129, 256, 257])
def test_cuts_of_medium_rows(m: int, gated: bool, parts: bool) -> None:
    for n, k in ((6144, 4096), (4096, 12288), (12288, 4096), (1536, 4096), (9216, 4096)):
        for block in (None, (128, 128), (64, 64)):
            tile = medium_linear.choose_scaled_tile(m, n, k, block, H200, gated=gated, parts=parts)
            if not 2 <= m <= 256 or block == (64, 64):
                assert tile is None
                continue
            if tile is None:
                narrow = n == 1536 and m <= 8 and not gated  # `small_linear` cuts these finer
                assert narrow if not parts else gated or n > 4224 or m > 128
                continue
            assert tile.block_m >= min(m, 128)
            assert not tile.share or tile.num_stages % tile.groups == 0
            ring = (2 * tile.block_m + 64 * (1 if tile.share else tile.groups)) * 128 * tile.num_stages
            sums = (tile.groups - 1) * 64 * tile.block_m * 4 if tile.share else 0
            assert tile.num_stages >= 2 and ring + sums < 232_448
    assert medium_linear.choose_scaled_tile(m, 6144, 4096, None, Chip(132, 232_448), gated=gated) is None
