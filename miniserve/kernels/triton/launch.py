"""How the Triton kernels are launched: tile sizes per platform and shape, and how many splits fill a device.

Pure data and arithmetic, importable without Triton, so that a table of every launch can be made on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Platform = Literal["cuda", "hip"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel's tile and launch options. block_m: query rows of a tile; block_n: keys of a tile (both powers of
    two); waves_per_eu: AMD's hint for the register allocator, 0 = none."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    waves_per_eu: int = 0

    def options(self, platform: Platform) -> dict[str, int]:
        """The keyword arguments that Triton takes beside a kernel's own."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"waves_per_eu": self.waves_per_eu} if platform == "hip" else {})


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# Rows: (platform, largest bytes of one key [padded head_dim x itemsize], keys per tile, warps, stages).
# A tile of keys and one of values per stage have to fit beside each other: 64 KiB of LDS on gfx942, 227 KiB on sm_90.
_DECODE: tuple[tuple[Platform, int, int, int, int], ...] = (
    ("cuda", 128, 128, 4, 3),
    ("cuda", 256, 64, 4, 3),
    ("cuda", 512, 64, 4, 2),
    ("cuda", 1024, 16, 4, 2),
    ("hip", 128, 128, 4, 2),
    ("hip", 256, 64, 4, 2),
    ("hip", 512, 32, 4, 2),
    ("hip", 1024, 16, 4, 2),
)
_EXTEND: tuple[tuple[Platform, int, int, int, int, int], ...] = (  # as above, with query rows before the keys
    ("cuda", 128, 128, 64, 4, 3),
    ("cuda", 256, 128, 64, 8, 3),
    ("cuda", 512, 64, 32, 4, 2),
    ("cuda", 1024, 32, 16, 4, 2),
    ("hip", 128, 128, 64, 4, 1),
    ("hip", 256, 128, 64, 4, 1),
    ("hip", 512, 64, 32, 4, 1),
    ("hip", 1024, 32, 16, 4, 1),
)
_MLA: tuple[tuple[Platform, int, int, int, int, int], ...] = (  # platform, most heads, query rows, keys, warps, stages
    ("cuda", 16, 16, 32, 4, 3),
    ("cuda", 32, 32, 32, 4, 2),
    ("cuda", 1 << 30, 64, 32, 8, 2),
    ("hip", 16, 16, 16, 4, 1),
    ("hip", 1 << 30, 32, 16, 4, 1),
)


def decode_launch(platform: Platform, head_dim: int, kv_itemsize: int, group: int) -> Launch:
    """The launch of `paged_decode`; group: query heads per kv head, 16..64 of which share a tile."""
    key_bytes = next_power_of_2(head_dim) * kv_itemsize
    for of, most, block_n, warps, stages in _DECODE:
        if of == platform and key_bytes <= most:
            return Launch(max(16, min(64, next_power_of_2(group))), block_n, warps, stages)
    raise ValueError(f"no decode launch for head_dim {head_dim} of {kv_itemsize} bytes")


def extend_launch(platform: Platform, head_dim: int, kv_itemsize: int, rows: int) -> Launch:
    """The launch of `paged_extend`; rows: most query tokens of a request times query heads per kv head."""
    key_bytes = next_power_of_2(head_dim) * kv_itemsize
    for of, most, block_m, block_n, warps, stages in _EXTEND:
        if of == platform and key_bytes <= most:
            if rows <= 32 and block_m > 32:
                return Launch(32, block_n, 4, stages)
            return Launch(block_m, block_n, warps, stages)
    raise ValueError(f"no extend launch for head_dim {head_dim} of {kv_itemsize} bytes")


def mla_launch(platform: Platform, num_heads: int) -> Launch:
    """The launch of `mla_decode`, whose tile is 576 wide at any dtype."""
    for of, most, block_m, block_n, warps, stages in _MLA:
        if of == platform and num_heads <= most:
            return Launch(block_m, block_n, warps, stages)
    raise ValueError(f"no MLA launch on {platform}")


def choose_splits(
    batch: int, head_tiles: int, max_seq_len: int, block_n: int, num_sms: int, *, programs_per_sm: int = 2
) -> int:
    """How many programs share one row's keys: as many as fill the device once, never more than the row has tiles.

    head_tiles: programs that one row needs at least (kv heads, times the tiles of a group above 64). Fixed when a graph
    is captured; every split then takes its share of the length that it finds on the device.
    """
    fill = num_sms * programs_per_sm // (batch * head_tiles)
    return max(1, min(fill, cdiv(max_seq_len, block_n)))
