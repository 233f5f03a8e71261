"""How the Triton kernels are launched: tile sizes per platform and shape, and how many splits fill a device.

Pure data and arithmetic, importable without Triton, so that a table of every launch can be made on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Platform = Literal["cuda", "hip"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel's tile and launch options. block_m: query rows of a tile; block_n: keys of a tile (both powers of
    two)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """The keyword arguments that Triton takes beside a kernel's own."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# The first row that fits is used. Keys and values of all stages must fit in shared memory together (64 KiB on gfx942,
# 227 KiB on sm_90) and nothing may spill on AMD: `tools/compile_check.py` checks the tables for that.
_Row = tuple[Platform, int, int, Launch]  # platform, largest padded head_dim, largest itemsize of the cache
_DECODE: tuple[_Row, ...] = (  # block_m stands for any: it follows from the group
    ("cuda", 64, 2, Launch(0, 128, 4, 3)),
    ("cuda", 128, 1, Launch(0, 64, 4, 4)),
    ("cuda", 128, 2, Launch(0, 32, 2, 2)),
    ("cuda", 256, 2, Launch(0, 32, 4, 3)),
    ("cuda", 128, 4, Launch(0, 32, 4, 2)),
    ("cuda", 256, 4, Launch(0, 16, 4, 2)),
    ("hip", 64, 2, Launch(0, 64, 4, 2)),
    ("hip", 128, 2, Launch(0, 32, 4, 2)),
    ("hip", 256, 1, Launch(0, 32, 4, 2)),  # a tile holds two of the shuffled layout's groups at least
    ("hip", 256, 4, Launch(0, 16, 4, 2)),
)
# For one tile of the table others that are as fast, and how many programs of each a multiprocessor holds (by registers
# and shared memory, seen in the compiled code): programs that wait for a second round leave most of the device idle in
# it. Up to four pairs of a row and a kv head a multiprocessor share rows anyway, see `choose_splits`.
_SAME = Launch(0, 32, 2, 2)
_HELD = ((_SAME, 8), (Launch(0, 32, 2, 3), 6), (Launch(0, 64, 4, 2), 5))
HELD_EARLY = 6  # of the first, where they hold a tile in registers
_EXTEND: tuple[_Row, ...] = (
    ("cuda", 128, 2, Launch(128, 64, 8, 3)),
    ("cuda", 256, 2, Launch(64, 32, 8, 2)),
    ("cuda", 128, 4, Launch(64, 32, 8, 2)),
    ("cuda", 256, 4, Launch(32, 16, 8, 2)),
    ("hip", 128, 2, Launch(128, 64, 8, 1)),
    ("hip", 256, 2, Launch(64, 32, 4, 1)),
    ("hip", 256, 4, Launch(32, 16, 4, 1)),
)
_MLA: tuple[_Row, ...] = (  # by the number of heads instead of head_dim, which is 576 in every case
    ("cuda", 16, 1, Launch(16, 32, 8, 3)),
    ("cuda", 16, 2, Launch(16, 32, 4, 3)),
    ("cuda", 16, 4, Launch(16, 32, 8, 3)),
    ("cuda", 32, 4, Launch(32, 32, 8, 2)),
    ("cuda", 1 << 30, 1, Launch(32, 32, 8, 3)),
    ("cuda", 1 << 30, 2, Launch(64, 32, 8, 3)),
    ("cuda", 1 << 30, 4, Launch(16, 32, 8, 2)),
    ("hip", 16, 2, Launch(16, 16, 4, 2)),
    ("hip", 1 << 30, 2, Launch(32, 16, 4, 2)),
    ("hip", 1 << 30, 4, Launch(16, 16, 4, 1)),
)
_SPLIT_KEYS, _MOST_SPLITS = 1024, 8
_SHORT_QUERIES = 32  # rows up to which a tile of an extension is made this small


def _first(rows: tuple[_Row, ...], platform: Platform, size: int, itemsize: int) -> Launch:
    for of, largest, widest, launch in rows:
        if of == platform and size <= largest and itemsize <= widest:
            return launch
    raise ValueError(f"no launch on {platform} for {size} at {itemsize} bytes an element")


def decode_launch(platform: Platform, head_dim: int, kv_itemsize: int, group: int, pairs_per_sm: float = 0.0) -> Launch:
    """The launch of `paged_decode`; group: query heads per kv head, 16 or 32 of which share a tile. (Over the shuffled
    layout Triton 3.6 gives wrong results with 64, seen on an H100.) pairs_per_sm: rows times kv heads, for each
    multiprocessor. Measured on an H200 (docs/LAB.md)."""
    launch = _first(_DECODE, platform, next_power_of_2(head_dim), kv_itemsize)
    if launch == _SAME and platform == "cuda" and 2 * pairs_per_sm > _HELD[0][1]:
        # Where all run at once, more bytes in flight; else those of which the last round is fullest.
        deep, held = _HELD[1]
        launch = deep if pairs_per_sm <= held else max(_HELD, key=lambda each: fullness(pairs_per_sm / each[1]))[0]
    return replace(launch, block_m=max(16, min(32, next_power_of_2(group))))


def fullness(rounds: float) -> float:
    """How full a device is on average, in tenths, where its programs take so many rounds."""
    return round(rounds / math.ceil(rounds), 1)


def extend_launch(platform: Platform, head_dim: int, kv_itemsize: int, rows: int) -> Launch:
    """The launch of `paged_extend`; rows: most query tokens of a request times query heads per kv head."""
    launch = _first(_EXTEND, platform, next_power_of_2(head_dim), kv_itemsize)
    if rows <= _SHORT_QUERIES < launch.block_m:
        return replace(launch, block_m=_SHORT_QUERIES, num_warps=4)
    return launch


def extend_splits(programs: int, max_seq_len: int, num_sms: int) -> int:
    """How many programs share a tile's keys in `paged_extend`, which has as many tiles of queries as `programs` of
    them: as many as fill the device, if there are enough keys for the merge to pay."""
    return 1 if max_seq_len < _SPLIT_KEYS else max(1, min(_MOST_SPLITS, num_sms // programs))


def mla_launch(platform: Platform, num_heads: int, kv_itemsize: int) -> Launch:
    """The launch of `mla_decode`."""
    return _first(_MLA, platform, num_heads, kv_itemsize)


def scratch_sizes(launches: Iterable[tuple[int, int]], num_heads: int) -> tuple[int, int]:
    """Sizes of the splits' scratch, large enough for each (rows, num_splits): (row, head, split) entries, and (row,
    head) counters."""
    pairs = list(launches)
    entries = max((rows * splits for rows, splits in pairs), default=0) * num_heads
    return entries, max((rows for rows, _ in pairs), default=0) * num_heads


def choose_splits(
    batch: int, head_tiles: int, max_seq_len: int, launch: Launch, num_sms: int, *, programs_per_sm: int | None = None
) -> int:
    """How many programs share one row's keys: as many as fill the device once, never more than the row has tiles.

    head_tiles: programs that one row needs at least (kv heads, times the tiles of a group above 32). Fixed when a graph
    is captured; every split then takes its share of the length, which it reads on the device. programs_per_sm: by
    default two, or of two warps as many as a multiprocessor holds: if it could hold more, some would get fewer. Rows
    that would have a program a head tile are still split in two where all programs run at once without a tile in
    registers.
    """
    pairs, two_warps = batch * head_tiles, launch.num_warps == 2
    fill = num_sms * (programs_per_sm or (HELD_EARLY if two_warps else 2)) // pairs
    if programs_per_sm is None and two_warps and 2 * pairs <= num_sms * _HELD[0][1]:
        fill = max(2, fill)
    return max(1, min(fill, cdiv(max_seq_len, launch.block_n)))
