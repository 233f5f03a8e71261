"""A step's attention metadata: what a kernel reads, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """The step's first tokens: one query token a row.

    block_tables int32 [rows, width]; seq_lens int32 [rows], counting the query's own token.
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class ExtendMetadata:
    """One prefill (context_len 0) or extend chunk: query tokens [query_start, query_start + query_len) of the step.

    block_ids int64 [blocks]: the row's blocks, as many as cover context_len + query_len tokens.
    """

    query_start: int
    query_len: int
    context_len: int
    block_ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """slot_mapping int64 [num_tokens]: where each token's key and value go. Decode rows come first, then the chunks."""

    slot_mapping: torch.Tensor
    decode: DecodeMetadata | None
    extends: tuple[ExtendMetadata, ...]
