# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Sharing one row's keys among several programs, and merging what they found.

Split-KV as in Flash-Decoding (Dao et al. 2023): splits take equal shares of their row's tiles. The row's length
is read on the device, so that nothing is planned on the CPU per step. The splits' partial results are merged by their
log-sum-exp (base 2), either by the last split to arrive or by a second kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from miniserve.kernels.triton.launch import Platform, next_power_of_2, scratch_sizes
from miniserve.kernels.triton.pdl import launch_options, start, wait
from miniserve.kernels.triton.quick_launch import quick


@dataclass(frozen=True, slots=True)
class DecodeScratch:
    """Scratch memory between splits and merge. partial: float32, head_dim values per (row, head, split); lse: float32,
    one per (row, head, split), base 2; arrivals: int32, one per (row, head tile), zero between launches."""

    partial: torch.Tensor
    lse: torch.Tensor
    arrivals: torch.Tensor

    @staticmethod
    def allocate(
        launches: Iterable[tuple[int, int]], num_heads: int, head_dim: int, device: torch.device
    ) -> DecodeScratch:
        """Large enough for each (rows, num_splits) of `launches`."""
        entries, counters = scratch_sizes(launches, num_heads)
        return DecodeScratch(
            torch.empty(entries * head_dim, dtype=torch.float32, device=device),
            torch.empty(entries, dtype=torch.float32, device=device),
            torch.zeros(counters, dtype=torch.int32, device=device),
        )


def scratch_arrays(scratch: DecodeScratch | None, num_splits: int) -> tuple[torch.Tensor | None, ...]:
    """partial, lse, arrivals. Raises ValueError if scratch is needed and missing."""
    if scratch is not None:
        return scratch.partial, scratch.lse, scratch.arrivals
    if num_splits > 1:
        raise ValueError("a split decode needs scratch memory")
    return None, None, None


def fuses_merge(on: Platform, heads: int, head_dim: int, num_splits: int, most_values: int) -> bool:
    """Whether the last split to arrive should merge `heads` heads itself. With more than `most_values` float32 values a
    separate kernel is faster than one program.

    On AMD the merge is a separate kernel until an in-kernel one has been tested across its dies.
    """
    return on == "cuda" and next_power_of_2(heads) * next_power_of_2(head_dim) * num_splits <= most_values


def merge_splits(
    scratch: DecodeScratch,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    block_n: int,
    num_splits: int,
    window: int | None = None,
    settled: bool = False,
) -> None:
    """Merge the partial results of every row and head into out [rows, heads, head_dim]; rows of length 0 are skipped.
    settled: seq_lens may be read before earlier kernels are done, as of `paged_decode`."""
    rows, heads, head_dim = out.shape
    _merge_kernel[(heads, rows)](
        scratch.partial, scratch.lse, seq_lens, out, *out.stride()[:2], window or 0, num_splits,
        HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=next_power_of_2(head_dim), BLOCK_N=block_n,
        HAS_WINDOW=window is not None, SETTLED=settled, **launch_options(out.device),
    )  # fmt: skip


@triton.jit
def share_of(split, seq_len, window, num_splits, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """A split's share of a row's visible keys: (first key of the row, first tile, one past the last tile, how many
    splits have any). Shares differ by one tile at most; the first splits have the larger ones, the last may have
    none."""
    low = tl.maximum(seq_len - window, 0) if HAS_WINDOW else 0
    first = low // BLOCK_N
    tiles = tl.cdiv(seq_len, BLOCK_N) - first
    splits = tl.maximum(tl.minimum(num_splits, tiles), 1)
    share = tiles // splits
    more = tiles - share * splits
    begin = first + split * share + tl.minimum(split, more)
    end = begin + tl.where(split < splits, share + (split < more).to(tl.int32), 0)
    return low, begin, end, splits


@triton.jit
def last_to_arrive(arrivals, splits):
    """Count this program; whether it is the last of `splits` and can read the others' stores. Resets the count."""
    # The barrier orders all threads' stores before the one thread's release, which goes before the count.
    tl.debug_barrier()
    is_last = tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu") == splits - 1
    if is_last:
        tl.store(arrivals, 0)
    return is_last


@quick
@triton.jit(do_not_specialize=["window", "num_splits"])
def _merge_kernel(
    partial, lse, seq_lens, out, out_row, out_head, window, num_splits,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr,
    SETTLED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: one head of one row. A padding row has its zeros from the decode kernel already."""
    start(PDL)
    if not SETTLED:
        wait(PDL)
    head = tl.program_id(0)
    row = tl.program_id(1)
    seq_len = tl.load(seq_lens + row)
    if SETTLED:
        wait(PDL)
    if seq_len > 0:
        splits = share_of(0, seq_len, window, num_splits, BLOCK_N, HAS_WINDOW)[3]
        heads = head + tl.arange(0, 1)
        merge_tile(
            partial, lse, out, row, heads, heads < HEADS, splits, num_splits, out_row, out_head,
            HEADS, HEAD_DIM, BLOCK_D, 1,
        )  # fmt: skip


@triton.jit
def merge_tile(
    partial, lse, out, row, heads, live, splits, num_splits, out_row, out_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MERGE_M: tl.constexpr,
    VALUES: tl.constexpr = 8192,
):  # fmt: skip
    """Weight `splits` partial results of MERGE_M heads by exp2(lse), as many splits at once as have VALUES together,
    and write the sum."""
    CHUNK: tl.constexpr = VALUES // (MERGE_M * BLOCK_D) if MERGE_M * BLOCK_D < VALUES else 1
    entry = (row * HEADS + heads).to(tl.int64)[:, None] * num_splits + tl.arange(0, CHUNK)[None, :]  # [M, CHUNK]
    d = tl.arange(0, BLOCK_D)
    best = tl.full([MERGE_M], float("-inf"), tl.float32)
    total = tl.zeros([MERGE_M], tl.float32)
    acc = tl.zeros([MERGE_M, BLOCK_D], tl.float32)
    for at in range(0, splits, CHUNK):
        there = live[:, None] & (at + tl.arange(0, CHUNK) < splits)[None, :]
        weight = tl.load(lse + entry + at, mask=there, other=float("-inf"))
        share = tl.load(
            partial + (entry + at)[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=there[:, :, None] & (d < HEAD_DIM)[None, None, :],
            other=0.0,
        )
        higher = tl.where(live, tl.maximum(best, tl.max(weight, 1)), 0.0)
        decay = tl.exp2(best - higher)
        weight = tl.exp2(weight - higher[:, None])
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None] + tl.sum(share * weight[:, :, None], 1)
        best = higher
    acc = acc / tl.where(live, total, 1.0)[:, None]
    out_at = out + row.to(tl.int64) * out_row + heads[:, None] * out_head + d[None, :]
    tl.store(out_at, acc.to(out.dtype.element_ty), mask=live[:, None] & (d < HEAD_DIM)[None, :])
