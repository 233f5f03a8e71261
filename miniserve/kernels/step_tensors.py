"""What a decode step reads and writes at fixed addresses, so that it can be recorded and replayed."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass(frozen=True, slots=True)
class RowState:
    """State of all rows: tables int32 [max_num_seqs, width]; lens, last_tokens, num_outputs int64 [max_num_seqs]."""

    tables: torch.Tensor
    lens: torch.Tensor
    last_tokens: torch.Tensor
    num_outputs: torch.Tensor


@dataclass(frozen=True, slots=True)
class StepTensors:
    """One step's inputs, contiguous, [batch] or [batch, width]. rows int64, negative in padding (a GPU's alone);
    input_ids, positions, slots int64; seq_lens, block_tables int32. Padding rows get length 0 and slot -1."""

    rows: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor

    @classmethod
    def allocate(cls, batch: int, width: int, device: torch.device) -> StepTensors:
        """Zeros, and no rows."""
        rows = torch.full((batch,), -1, dtype=torch.int64, device=device)
        ids, positions, slots = (torch.zeros_like(rows) for _ in range(3))  # each by itself: all are aligned
        lens = torch.zeros(batch, dtype=torch.int32, device=device)
        return cls(rows, ids, positions, slots, lens, torch.zeros(batch, width, dtype=torch.int32, device=device))

    def first(self, count: int) -> StepTensors:
        """Those of the first `count` entries."""
        return StepTensors(*(getattr(self, field.name)[:count] for field in fields(self)))
