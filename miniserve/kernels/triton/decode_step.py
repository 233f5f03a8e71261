"""The begin and end of a decode step on the device: lengths, slots and block tables of its rows; the greedy token.

So a step needs from the host only changes: which rows decode, and new blocks. Under speculation a step is `explicit`:
the host sets the row, position and token of each entry, and a row may have several.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from miniserve.kernels.step_tensors import RowState, StepTensors
from miniserve.kernels.triton.pdl import launch_options, start, wait

_VOCAB_BLOCK = 4096


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _apply_kernel(
    staged_ptr, rows_ptr, positions_ptr, ids_ptr, tables_ptr, num_rows, num_blocks,
    EXPLICIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start(PDL)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(staged_ptr + index, mask=index < num_rows)
    blocks_ptr = staged_ptr + num_rows
    if EXPLICIT:
        positions = tl.load(staged_ptr + num_rows + index, mask=index < num_rows)
        ids = tl.load(staged_ptr + 2 * num_rows + index, mask=index < num_rows)
        blocks_ptr = staged_ptr + 3 * num_rows
    places = tl.load(blocks_ptr + index, mask=index < num_blocks, other=0)
    blocks = tl.load(blocks_ptr + num_blocks + index, mask=index < num_blocks)
    wait(PDL)
    tl.store(rows_ptr + index, rows.to(tl.int64), mask=index < num_rows)
    if EXPLICIT:
        tl.store(positions_ptr + index, positions.to(tl.int64), mask=index < num_rows)
        tl.store(ids_ptr + index, ids.to(tl.int64), mask=index < num_rows)
    tl.store(tables_ptr + places, blocks, mask=index < num_blocks)


def apply_changes(
    staged: torch.Tensor, num_rows: int, num_blocks: int, step: StepTensors, tables: torch.Tensor, *, explicit: bool
) -> None:
    """Copy what the host staged for a step, int32 in pinned memory, which the kernel reads in place: `num_rows` rows,
    if `explicit` as many positions and input ids, then indices into the flattened `tables` and block ids for them,
    `num_blocks` of each."""
    _apply_kernel[(triton.cdiv(max(num_rows, num_blocks), 256),)](
        staged, step.rows, step.positions, step.input_ids, tables, num_rows, num_blocks,
        EXPLICIT=explicit, BLOCK=256, num_warps=2, **launch_options(tables.device),
    )  # fmt: skip


@triton.jit
def _advance_kernel(
    rows_ptr, tables_ptr, lens_ptr, last_ptr, ids_ptr, positions_ptr, slots_ptr, seq_lens_ptr, out_tables_ptr,
    table_width,
    EXPLICIT: tl.constexpr, BLOCK_SIZE: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start(PDL)
    wait(PDL)
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    if row < 0:
        tl.store(ids_ptr + index, tl.zeros((), tl.int64))
        tl.store(positions_ptr + index, tl.zeros((), tl.int64))
        tl.store(slots_ptr + index, tl.full((), -1, tl.int64))
        tl.store(seq_lens_ptr + index, tl.zeros((), tl.int32))
        return
    if EXPLICIT:
        position = tl.load(positions_ptr + index)
    else:
        position = tl.load(lens_ptr + row)
        tl.store(ids_ptr + index, tl.load(last_ptr + row))
        tl.store(positions_ptr + index, position)
        tl.store(lens_ptr + row, position + 1)
    tl.store(seq_lens_ptr + index, (position + 1).to(tl.int32))
    block = tl.load(tables_ptr + row * table_width + position // BLOCK_SIZE).to(tl.int64)
    tl.store(slots_ptr + index, block * BLOCK_SIZE + position % BLOCK_SIZE)
    for first in range(0, position // BLOCK_SIZE + 1, CHUNK):
        cols = first + tl.arange(0, CHUNK)
        ids = tl.load(tables_ptr + row * table_width + cols, mask=cols < table_width, other=0)
        tl.store(out_tables_ptr + index * table_width + cols, ids, mask=cols < table_width)


def advance(state: RowState, step: StepTensors, block_size: int, *, explicit: bool) -> None:
    """Count one more token for each of `step.rows` and fill in the rest of `step`; if `explicit`, fill in what follows
    from its rows and positions, and do not change `state`."""
    _advance_kernel[(step.rows.shape[0],)](
        step.rows, state.tables, state.lens, state.last_tokens, step.input_ids, step.positions, step.slots,
        step.seq_lens, step.block_tables, state.tables.shape[1],
        EXPLICIT=explicit, BLOCK_SIZE=block_size, CHUNK=1024, num_warps=4, **launch_options(step.rows.device),
    )  # fmt: skip


@triton.jit
def _best_of_part_kernel(
    logits_ptr, values_ptr, ids_ptr, vocab_size, first, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    start(PDL)
    wait(PDL)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * vocab_size + cols, mask=cols < vocab_size, other=float("-inf")).to(tl.float32)
    best = tl.max(logits, axis=0)
    tl.store(values_ptr + row * PARTS + part, best)
    tl.store(ids_ptr + row * PARTS + part, first + tl.min(tl.where(logits == best, cols, vocab_size - 1), axis=0))


@triton.jit
def _hand_over_kernel(
    values_ptr, ids_ptr, rows_ptr, last_ptr, outputs_ptr, tokens_ptr, rank_stride,
    RANKS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start(PDL)
    wait(PDL)
    index = tl.program_id(0).to(tl.int64)
    parts = tl.arange(0, BLOCK)
    there = parts < RANKS * PARTS
    at = parts // PARTS * rank_stride + index * PARTS + parts % PARTS
    values = tl.load(values_ptr + at, mask=there, other=float("-inf"))
    ids = tl.load(ids_ptr + at, mask=there, other=0x7FFFFFFF)
    token = tl.min(tl.where(values == tl.max(values, axis=0), ids, 0x7FFFFFFF), axis=0).to(tl.int64)
    tl.store(tokens_ptr + index, token)
    row = tl.load(rows_ptr + index)
    if row >= 0:
        tl.store(last_ptr + row, token)
        tl.store(outputs_ptr + row, tl.load(outputs_ptr + row) + 1)


def best_words(logits: torch.Tensor, first: int, most_words: int) -> torch.Tensor:
    """What `hand_over` takes of one rank: the best of each part of its words, of which the first has the id `first`.
    logits: any float, [batch, words]; most_words: the largest number of words on any rank. Returns int32 [2, batch,
    parts]: the bits of the logits as float32, and ids."""
    batch, parts = len(logits), triton.cdiv(most_words, _VOCAB_BLOCK)
    best = torch.empty(2, batch, parts, dtype=torch.int32, device=logits.device)
    _best_of_part_kernel[(batch, parts)](
        logits, best[0].view(torch.float32), best[1], logits.shape[1], first,
        PARTS=parts, BLOCK=_VOCAB_BLOCK, num_warps=4, **launch_options(logits.device),
    )  # fmt: skip
    return best


def hand_over(best: torch.Tensor, rows: torch.Tensor, state: RowState, tokens: torch.Tensor) -> None:
    """The best of all ranks' `best_words`, [ranks, 2, batch, parts], of equals the lowest id, into `tokens` int64
    [batch] and, where `rows` is not negative, as that row's last token."""
    ranks, _, batch, parts = best.shape
    _hand_over_kernel[(batch,)](
        best.view(torch.float32), best[:, 1], rows, state.last_tokens, state.num_outputs, tokens, best.stride(0),
        RANKS=ranks, PARTS=parts, BLOCK=triton.next_power_of_2(ranks * parts), num_warps=1,
        **launch_options(best.device),
    )  # fmt: skip
