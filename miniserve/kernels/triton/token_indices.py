# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Block tables as lists of tokens, for kernels that support only pages of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.launch import cdiv

_TILE = 1024
_PROGRAMS = 16  # of a row


def token_indices(
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    *,
    block_size: int,
    max_seq_len: int,
) -> None:
    """Write where each row's tokens lie in the cache, row after row: token p of row r at out[starts[r] + p].

    block_tables int32 [rows, width]; seq_lens int32 [rows], none above max_seq_len; starts int32 [rows + 1]: 0 and
    their sums; out int32 [tokens or more]. Lengths are read on the device alone.
    """
    rows = seq_lens.shape[0]
    if rows:
        grid = (rows, max(1, min(_PROGRAMS, cdiv(max_seq_len, _TILE))))
        _token_indices_kernel[grid](
            block_tables, seq_lens, starts, out, block_tables.stride(0), BLOCK_SIZE=block_size, TILE=_TILE
        )


@triton.jit(do_not_specialize=["table_row"])
def _token_indices_kernel(
    block_tables, seq_lens, starts, out, table_row, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """One program: tiles of one row, at a fixed stride."""
    row = tl.program_id(0)
    length = tl.load(seq_lens + row)
    table = block_tables + row.to(tl.int64) * table_row
    to = out + tl.load(starts + row).to(tl.int64)
    for begin in range(tl.program_id(1) * TILE, length, tl.num_programs(1) * TILE):
        position = begin + tl.arange(0, TILE)
        block = tl.load(table + position // BLOCK_SIZE, mask=position < length, other=0)
        tl.store(to + position, block * BLOCK_SIZE + position % BLOCK_SIZE, mask=position < length)
