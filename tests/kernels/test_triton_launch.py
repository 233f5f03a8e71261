"""How the Triton kernels are launched."""

from __future__ import annotations

import pytest
import triton_support  # noqa: F401  (chooses Triton's interpreter before Triton is imported)

from miniserve.kernels.triton.launch import (
    Launch,
    cdiv,
    choose_splits,
    decode_launch,
    extend_launch,
    extend_splits,
    mla_launch,
)


@pytest.mark.parametrize(
    ("batch", "head_tiles", "length", "splits"),
    [
        (1, 8, 131_072, 33),  # a long context at batch 1 fills the device
        (1, 8, 1024, 16),  # never more splits than tiles
        (1, 8, 1, 1),
        (8, 8, 4096, 4),
        (64, 8, 4096, 1),
        (256, 8, 1088, 1),  # enough programs as it is: no merge
        (1000, 128, 100_000, 1),
    ],
)
def test_choose_splits_fills_the_device_once(batch: int, head_tiles: int, length: int, splits: int) -> None:
    assert choose_splits(batch, head_tiles, length, Launch(16, 64, 4, 2), 132) == splits


def test_programs_of_few_warps_come_in_greater_numbers() -> None:
    assert choose_splits(8, 8, 4096, Launch(16, 32, 2, 2), 132) == 12  # six a multiprocessor
    assert choose_splits(8, 8, 4096, Launch(16, 32, 8, 2), 132) == 4


@pytest.mark.parametrize(("pairs", "splits"), [(264, 3), (396, 2), (400, 2), (528, 2), (536, 1), (1024, 1)])
def test_rows_are_shared_while_all_programs_run_at_once(pairs: int, splits: int) -> None:
    tile = decode_launch("cuda", 128, 2, 4, pairs / 132)
    assert choose_splits(pairs // 4, 4, 4096, tile, 132) == splits
    assert tile.num_stages == (2 if splits > 1 or pairs == 1024 else 3)


@pytest.mark.parametrize("platform", ["cuda", "hip"])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 112, 128, 192, 256])
def test_there_is_a_launch_for_every_shape(head_dim: int, itemsize: int, platform: str) -> None:
    for group, rows in ((1, 16), (3, 16), (16, 16), (20, 32), (64, 32), (128, 32)):
        assert decode_launch(platform, head_dim, itemsize, group).block_m == rows  # type: ignore[arg-type]
    for rows in (1, 32, 33, 100_000):
        launch = extend_launch(platform, head_dim, itemsize, rows)  # type: ignore[arg-type]
        assert launch.block_m >= 16
    for heads in (1, 16, 17, 128):
        launch = mla_launch(platform, heads, itemsize)  # type: ignore[arg-type]
        assert cdiv(heads, launch.block_m) <= 8


@pytest.mark.parametrize(
    ("pairs", "tile"),
    [
        (528, (32, 2)),  # rows are shared
        (529, (32, 3)),  # all at once, six a multiprocessor at most
        (792, (32, 3)),
        (1024, (32, 2)),  # one round of eight
        (1280, (64, 2)),  # two of five
        (1536, (32, 3)),  # two of six
        (2048, (32, 2)),
    ],
)
def test_programs_of_a_decode_fill_their_last_round(pairs: int, tile: tuple[int, int]) -> None:
    launch = decode_launch("cuda", 128, 2, 4, pairs / 132)
    assert (launch.block_n, launch.num_stages) == tile
    assert decode_launch("cuda", 128, 1, 4, pairs) == decode_launch("cuda", 128, 1, 4)
    assert decode_launch("hip", 128, 2, 4, pairs) == decode_launch("hip", 128, 2, 4)


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="no launch"):
        decode_launch("cuda", 512, 2, 1)


@pytest.mark.parametrize(
    ("programs", "max_seq_len", "splits"), [(128, 8192, 1), (64, 8192, 2), (32, 8192, 4), (8, 131_072, 8), (8, 512, 1)]
)
def test_extend_splits_fill_the_device_where_there_are_many_keys(programs: int, max_seq_len: int, splits: int) -> None:
    assert extend_splits(programs, max_seq_len, 132) == splits
