"""What the runner knows of a step, neutrally. A backend makes its metadata of it: what its kernels read."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


def table_width(longest: int, block_size: int) -> int:
    """Columns of the block tables of rows of up to `longest` tokens: kernels may look up the block of the next one."""
    return longest // block_size + 1


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The step's first tokens: one query token a row.

    block_tables int32 [rows, width]; seq_lens int32 [rows], counting the query's own token (0 in a padding row, of
    which there are some behind the others only: a kernel may spoil what follows a row without keys).
    max_seq_len: no row is longer, as the host knows without asking the device. host_seq_lens: the same lengths on the
    host, None where the step was captured in a graph and runs with other lengths than these. fresh: as of
    `paged_decode`.
    """

    block_tables: Tensor
    seq_lens: Tensor
    max_seq_len: int
    host_seq_lens: np.ndarray[tuple[int], np.dtype[np.int64]] | None
    fresh: int | None = None


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """Chunks of prompts, one after the other from token `query_start` of the step on.

    query_lens, context_lens (tokens already cached) are on the host; cu_query_lens int32 [rows + 1] starts at 0;
    seq_lens int32 [rows] = context + query; block_tables int32 [rows, width].
    """

    query_start: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    cu_query_lens: Tensor
    seq_lens: Tensor
    block_tables: Tensor


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Tokens lie in the order decode | extend (with cached context) | prefill (without).

    slot_mapping int64 [num_tokens]: where each token's key and value go; a negative slot is not written.
    """

    slot_mapping: Tensor
    decode: DecodeRows | None = None
    extend: ChunkRows | None = None
    prefill: ChunkRows | None = None

    @property
    def chunks(self) -> tuple[ChunkRows, ...]:
        """Those there are, in order."""
        return tuple(group for group in (self.extend, self.prefill) if group is not None)
