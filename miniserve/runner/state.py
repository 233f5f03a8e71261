"""The runner's persistent step state: each row's block table and length, advanced by differences and never rebuilt."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from miniserve.attention.metadata import AttentionMetadata, DecodeMetadata, ExtendMetadata
from miniserve.core import Chunk, StepPlan
from miniserve.runner.sampling_transfer import to_device


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step feeds to the model. input_ids, positions: int64 [num_tokens], decode rows first, then the chunks.

    sample_indices int64 [sampling rows]: the token of each row that samples; None where that is every token in order.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    metadata: AttentionMetadata
    sample_indices: torch.Tensor | None


class StepState:
    """Rows 0 … max_num_seqs-1. The host keeps every row's length and block table to build chunks from; the device has
    its own, which decode rows read and advance there."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), dtype=np.int32)
        self._lens = np.zeros(max_num_seqs, dtype=np.int64)
        # On a CPU both sides are the same memory.
        self._device_tables = to_device(self._tables, device)
        self._device_lens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._decode_rows: list[int] = []
        self._host_rows = np.zeros(0, dtype=np.int64)
        self._device_rows = torch.zeros(0, dtype=torch.int64, device=device)

    def prepare(self, plan: StepPlan, last_tokens: torch.Tensor) -> StepInputs:
        """Apply the plan's differences and lay out its tokens. last_tokens int64 [max_num_seqs], on the device."""
        self._append_blocks(plan.new_blocks)
        ids, positions, slots = [], [], []
        decode = None
        if plan.decode_rows:
            rows, lens, decode = self._advance(plan.decode_rows)
            ids.append(last_tokens[rows])
            positions.append(lens)
            slots.append(self._slots(rows, lens))
        extends: list[ExtendMetadata] = []
        query_start = len(plan.decode_rows)
        if plan.chunks:
            chunk_ids, chunk_positions, chunk_slots = [], [], []
            for chunk in plan.chunks:
                span, slot, meta = self._chunk(chunk, query_start)
                chunk_ids += chunk.token_ids
                chunk_positions.append(span)
                chunk_slots.append(slot)
                extends.append(meta)
                query_start += len(chunk.token_ids)
            ids.append(to_device(np.array(chunk_ids, dtype=np.int64), self._device))
            positions.append(to_device(np.concatenate(chunk_positions), self._device))
            slots.append(to_device(np.concatenate(chunk_slots), self._device))
        metadata = AttentionMetadata(_join(slots), decode, tuple(extends))
        return StepInputs(_join(ids), _join(positions), metadata, self._sample_indices(plan, extends))

    def _append_blocks(self, new_blocks: list[tuple[int, int, list[int]]]) -> None:
        for row, index, block_ids in new_blocks:
            self._tables[row, index : index + len(block_ids)] = block_ids
        if new_blocks and self._device.type != "cpu":
            rows = np.concatenate([np.full(len(ids), row) for row, _, ids in new_blocks])
            columns = np.concatenate([np.arange(index, index + len(ids)) for _, index, ids in new_blocks])
            places = to_device(rows * self._tables.shape[1] + columns, self._device)
            self._device_tables.view(-1)[places] = to_device(self._tables[rows, columns], self._device)

    def _advance(self, decode_rows: list[int]) -> tuple[torch.Tensor, torch.Tensor, DecodeMetadata]:
        """The rows, their positions (lengths before this step), and their metadata (lengths after it)."""
        if decode_rows != self._decode_rows:
            self._decode_rows = decode_rows
            self._host_rows = np.array(decode_rows, dtype=np.int64)
            self._device_rows = to_device(self._host_rows, self._device)
        rows = self._device_rows
        self._lens[self._host_rows] += 1
        width = -(-int(self._lens[self._host_rows].max()) // self._block_size)
        positions = self._device_lens[rows]
        seq_lens = positions + 1
        self._device_lens[rows] = seq_lens
        tables = self._device_tables[rows, :width]
        return rows, positions, DecodeMetadata(tables, seq_lens.to(torch.int32))

    def _slots(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = self._device_tables[rows, positions // self._block_size].to(torch.int64)
        return blocks * self._block_size + positions % self._block_size

    def _chunk(
        self, chunk: Chunk, query_start: int
    ) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]], ExtendMetadata]:
        end = chunk.start + len(chunk.token_ids)
        self._lens[chunk.row] = end
        self._device_lens[chunk.row] = end
        span = np.arange(chunk.start, end, dtype=np.int64)
        table = self._tables[chunk.row]
        slots = table[span // self._block_size].astype(np.int64) * self._block_size + span % self._block_size
        blocks = table[: -(-end // self._block_size)].astype(np.int64)
        meta = ExtendMetadata(query_start, len(chunk.token_ids), chunk.start, to_device(blocks, self._device))
        return span, slots, meta

    def _sample_indices(self, plan: StepPlan, extends: list[ExtendMetadata]) -> torch.Tensor | None:
        if not plan.chunks:
            return None
        indices = list(range(len(plan.decode_rows)))
        for chunk, meta in zip(plan.chunks, extends, strict=True):
            if chunk.samples:
                indices.append(meta.query_start + meta.query_len - 1)
        return to_device(np.array(indices, dtype=np.int64), self._device)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
