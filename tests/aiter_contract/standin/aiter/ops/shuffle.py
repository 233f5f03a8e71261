"""aiter.ops.shuffle: expert weights as the CK and ASM kernels read them."""

from __future__ import annotations

import torch
from aiter._standin import require


def shuffle_weight(x, layout=(16, 16), use_int4=False, is_guinterleave=False, gate_up=False, pad_k_to=0):
    """[..., N, K] -> the same shape, tiles of 16 rows by 32 columns permuted; marked by the attribute is_shuffled, that
    nn.Parameter(...) loses."""
    require(
        layout == (16, 16) and not (use_int4 or is_guinterleave or pad_k_to), "the stand-in covers the plain shuffle"
    )
    rows, columns = x.shape[-2:]
    assert rows % 16 == 0, f"{rows} % 16 == {rows % 16}"
    assert columns % 32 == 0, f"{columns} % 32 == {columns % 32}"
    lanes = 16 // x.element_size()
    tiles = _bytes(x).view(-1, rows // 16, 16, columns // 32, 32 // lanes, lanes)
    result = tiles.permute(0, 1, 3, 4, 2, 5).contiguous().view(x.shape).view(x.dtype)
    result.is_shuffled = True
    return result


def unshuffled(x: torch.Tensor) -> torch.Tensor:
    """The inverse, for the stand-in's own use."""
    rows, columns = x.shape[-2:]
    lanes = 16 // x.element_size()
    tiles = _bytes(x).view(-1, rows // 16, columns // 32, 32 // lanes, 16, lanes)
    return tiles.permute(0, 1, 4, 2, 3, 5).contiguous().view(x.shape).view(x.dtype)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8) if x.element_size() == 1 else x.contiguous()
