"""Linear layers for 2 to 256 rows: how they are cut, and what they give on a Hopper GPU (Gluon has no interpreter)."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from triton_support import DEVICE, NATIVE, normal, relative_error

from miniserve.kernels.triton import hopper_extend, hopper_mla, large_linear, medium_linear, runtime
from miniserve.kernels.triton.medium_linear import _CUTS, MediumTile, choose_medium_tile, choose_parts_tile
from miniserve.kernels.triton.small_linear import Chip, chip_of
from miniserve.models.layers import ops

HOPPER = Chip(132, 232_448, wgmma=True)
SHAPES = [(3072, 1024), (1024, 2048), (2816, 2048), (12288, 4096), (4096, 12288), (151936, 4096), (1000, 1020)]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE or not chip_of(DEVICE).wgmma, reason="needs a Hopper GPU, whose matrix units these use")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("block_m", "groups"), [(16, 1), (32, 1), *_CUTS])
@pytest.mark.parametrize(("m", "n", "k"), [(13, 40, 96), (65, 200, 264), (256, 1208, 1000)])
def test_products(m: int, n: int, k: int, block_m: int, groups: int, gated: bool, dtype: torch.dtype) -> None:
    x, weight = normal(0, m, k + 8, dtype=dtype)[:, :k], normal(1, n * (2 if gated else 1), k, dtype=dtype)
    bias = normal(2, len(weight), dtype=dtype)
    held = block_m // 2 + 40 if block_m <= 128 else None
    for given, registers in ((bias, None), (None, held)):
        tile = MediumTile(block_m, groups, 4, early=block_m // 64, registers=registers)
        got = medium_linear.medium_linear(x, weight, given, tile, gated=gated)
        want = torch.nn.functional.linear(x.float(), weight.float(), None if given is None else given.float())
        assert relative_error(got, ops.silu_and_mul(want) if gated else want) < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE or not chip_of(DEVICE).wgmma, reason="needs a Hopper GPU, whose matrix units these use")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("splits", [1, 2, 3])
@pytest.mark.parametrize(("m", "n", "k"), [(13, 40, 96), (65, 200, 264), (256, 4096, 12288)])
def test_parts(m: int, n: int, k: int, splits: int, dtype: torch.dtype) -> None:
    x, weight = normal(0, m, k, dtype=dtype), normal(1, n, k, dtype=dtype)
    block_m = max(16, m // 64 * 64)
    tile = MediumTile(block_m, 1, 4, splits=splits, registers=block_m // 2 + 40 if splits > 1 and m < 256 else None)
    parts = medium_linear.linear_parts(x, weight, tile)
    assert parts.dtype == torch.float32
    got, want = parts.view(m, splits, n), x.float() @ weight.float().T
    assert relative_error(got.sum(1), want) < 1e-4, "parts are not rounded"
    assert splits == 1 or k < 64 * splits or relative_error(got[:, 0], want) > 0.1


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 2, 8, 32, 48, 64, 65, 96, 128, 129, 192, 256, 257])
def test_every_cut_fits_and_of_many_rows_runs_in_one_round(m: int, n: int, k: int, gated: bool) -> None:
    assert choose_medium_tile(m, n, k, 2, Chip(304, 65536), gated=gated) is None
    assert choose_medium_tile(m, n, k, 4, HOPPER, gated=gated) is None
    tile = choose_medium_tile(m, n, k, 2, HOPPER, gated=gated)
    if tile is None:
        return
    assert 1 < m <= 256
    assert k % 8 == 0
    outputs = tile.groups * (32 if gated else 64)
    assert m <= 64 or -(-m // tile.block_m) * -(-n // outputs) <= 132
    assert tile.num_stages >= 3
    assert (tile.block_m + 64 * tile.groups) * 64 * 2 * tile.num_stages < 232_448


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [1, 2, 8, 16, 32, 64, 96, 128, 192, 256, 257])
def test_parts_run_in_one_round_and_are_rows_of_a_tile_at_least(m: int, n: int, k: int) -> None:
    assert choose_parts_tile(m, n, k, 4, HOPPER) is None
    assert choose_parts_tile(m, n, k, 2, Chip(132, 232_448)) is None
    tile = choose_parts_tile(m, n, k, 2, HOPPER)
    if tile is not None:
        assert 1 < m <= 256
        assert tile.splits > 1
        assert k // tile.splits >= 64
        assert -(-m // tile.block_m) * -(-n // (64 * tile.groups)) * tile.splits <= 132


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("m", [8, 16, 17, 32, 64, 96, 128, 129, 256])
def test_the_norms_programs_find_room_beside_those_whose_parts_they_sum(m: int, n: int, k: int) -> None:
    tile = choose_parts_tile(m, n, k, 2, HOPPER)
    if tile is None:
        return
    shares = 2 * tile.num_stages * (tile.block_m + 64 * tile.groups) * 128 <= 232_448
    assert (tile.registers is None) == (not 16 < m <= 128 or shares), "two rings would share a multiprocessor"
    if tile.registers is not None:
        warps, norm = 4 * (tile.groups + 1), 8 * 32 * 64  # registers of one of the norm's programs, at most
        assert tile.registers % 8 == 0
        assert warps * 32 * tile.registers + norm <= 65_536


def test_shapes_of_an_8b_model() -> None:
    assert choose_medium_tile(8, 12288, 4096, 2, HOPPER, gated=True) == MediumTile(16, 3, 8, early=8)
    assert choose_medium_tile(256, 12288, 4096, 2, HOPPER, gated=True) == MediumTile(256, 3, 4, early=2)
    assert choose_medium_tile(8, 6144, 4096, 2, HOPPER, gated=False) == MediumTile(16, 1, 16, early=16)
    assert choose_medium_tile(128, 6144, 4096, 2, HOPPER, gated=False) == MediumTile(128, 1, 8, early=2, registers=104)
    assert choose_medium_tile(256, 6144, 4096, 2, HOPPER, gated=False) is None, "the vendor's library is faster"
    assert choose_medium_tile(64, 151936, 4096, 2, HOPPER, gated=False) == MediumTile(64, 3, 7, early=7, registers=72)
    assert choose_parts_tile(8, 4096, 4096, 2, HOPPER) == MediumTile(16, 2, 8, splits=4)
    assert choose_parts_tile(64, 4096, 4096, 2, HOPPER) is None, "reading the parts would take longer"
    assert choose_parts_tile(64, 4096, 12288, 2, HOPPER) == MediumTile(64, 2, 8, splits=4, registers=72)
    assert choose_parts_tile(256, 4096, 12288, 2, HOPPER) is None
    assert choose_parts_tile(32, 1024, 2048, 2, HOPPER) == MediumTile(32, 1, 8, splits=6)


@pytest.mark.parametrize("module", [medium_linear, large_linear, hopper_extend, hopper_mla])
def test_a_gluon_that_does_not_work_leaves_its_work_to_others(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(device: torch.device) -> None:
        raise AttributeError("mbarrier has no expect")

    name, gpu = module.__name__.rpartition(".")[2], torch.device("cuda")
    monkeypatch.setattr(module, "try_out", fail)
    monkeypatch.setattr(runtime, "chip_of", lambda device: HOPPER)
    assert runtime.gluon_kernels(name, gpu, "it runs slower") is None
    assert "so it runs slower: AttributeError('mbarrier has no expect')" in caplog.text
    monkeypatch.setattr(module, "try_out", lambda device: None)
    assert runtime.gluon_kernels(name, gpu, "it runs slower") is module
    assert runtime.gluon_kernels(name, torch.device("cpu"), "it runs slower") is None
    monkeypatch.setattr(runtime, "chip_of", lambda device: Chip(304, 65536))
    assert runtime.gluon_kernels(name, gpu, "it runs slower") is None


@pytest.mark.parametrize(("rows", "middle", "takes"), [
    (256, 12288, False), (320, 12288, False), (512, 12288, True), (768, 12288, False), (4096, 12288, True),
    (1024, 3072, False), (2048, 3072, True),
])  # fmt: skip
def test_swiglu_of_many_rows_is_taken_where_the_last_round_is_full(rows: int, middle: int, takes: bool) -> None:
    x, weight = torch.empty(rows, 64, dtype=torch.bfloat16), torch.empty(2 * middle, 64, dtype=torch.bfloat16)
    assert large_linear.can_gate(x, weight, HOPPER) is takes
    assert not large_linear.can_gate(x, weight.float(), HOPPER)
    assert not large_linear.can_gate(x[:, 1:], weight[:, 1:], HOPPER)
