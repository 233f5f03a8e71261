# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Zeroing blocks of the paged cache as they are taken, of all layers in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.launch import cdiv

_TOKENS = 16  # whose slots one program looks at, of one plane


def plane_table(planes: Sequence[torch.Tensor]) -> torch.Tensor:
    """int64 [planes, 2]: where each plane [num_blocks, …], dense, lies, and how many words of 32 bits a block has."""
    rows = [(plane.data_ptr(), plane.stride(0) * plane.element_size() // 4) for plane in planes]
    return torch.tensor(rows, dtype=torch.int64, device=planes[0].device)


def zero_blocks(table: torch.Tensor, slots: torch.Tensor, block_size: int) -> None:
    """Zero the block of each of slots int64 [num_tokens] that is the first of its block, in every plane of `table`."""
    _zero_kernel[(len(table), cdiv(len(slots), _TOKENS))](
        table, slots, len(slots), BLOCK_SIZE=block_size, TOKENS=_TOKENS, CHUNK=1024, num_warps=4
    )


@triton.jit(do_not_specialize=["num_tokens"])
def _zero_kernel(table, slots, num_tokens, BLOCK_SIZE: tl.constexpr, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    plane = tl.load(table + 2 * tl.program_id(0)).to(tl.pointer_type(tl.int32))
    words = tl.load(table + 2 * tl.program_id(0) + 1)
    for index in range(TOKENS):
        token = tl.program_id(1) * TOKENS + index
        slot = tl.load(slots + token, mask=token < num_tokens, other=-1)
        if (slot >= 0) & (slot % BLOCK_SIZE == 0):
            block = plane + slot // BLOCK_SIZE * words
            for first in range(0, words, CHUNK):
                at = first + tl.arange(0, CHUNK)
                tl.store(block + at, tl.zeros((CHUNK,), tl.int32), mask=at < words)
