"""The runner's persistent step state: each row's block table and length, advanced by differences and never rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from miniserve.attention.metadata import Int64, QueryRows, ReadTokens, StepBatch, chunk_rows, decode_rows, table_width
from miniserve.core import Chunk, StepPlan
from miniserve.runner.device import to_device


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What a step feeds to the model. input_ids, positions: int64 [num_tokens], in the order of `StepBatch`.

    chunk_starts: the first token of each of the plan's chunks. sample_indices int64 [sampling rows]: the token of each
    row that samples; None where that is every token in order.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    batch: StepBatch
    chunk_starts: list[int]
    sample_indices: torch.Tensor | None


Int32 = np.ndarray[tuple[int], np.dtype[np.int32]]
_NO_CHANGES = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class GraphInputs:
    """What a graph's step needs from the host: the row of each token, in the same list for as long as the rows are the
    same, and new blocks: indices into the flattened block tables, and block ids. For draft runs also each token's
    position and id, which the device knows otherwise."""

    rows: list[int]
    places: Int64
    block_ids: Int32
    positions: list[int] | None = None
    token_ids: list[int] | None = None


class StepState:
    """Rows 0 … max_num_seqs-1. The host keeps every row's length and block table to build chunks from; decode rows read
    and advance a copy on the device."""

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = device
        self._tables = np.zeros((max_num_seqs, table_width(max_model_len, block_size)), dtype=np.int32)
        self._lens = np.zeros(max_num_seqs, dtype=np.int64)
        # On a CPU host and device share the same memory.
        self._device_tables = to_device(self._tables, device)
        self._device_lens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._decode_rows: list[int] = []
        self._host_rows = np.zeros(0, dtype=np.int64)
        self._device_rows: torch.Tensor | None = None
        self._counting = torch.arange(max_num_seqs + 1, dtype=torch.int32, device=device)

    @property
    def tables(self) -> torch.Tensor:
        """Block tables on the device, int32 [max_num_seqs, width]."""
        return self._device_tables

    @property
    def lens(self) -> torch.Tensor:
        """Lengths on the device, int64 [max_num_seqs]: tokens whose keys and values are in the cache."""
        return self._device_lens

    def prepare_graph(self, plan: StepPlan) -> GraphInputs:
        """As `prepare`, for a step without chunks, which a graph runs."""
        places, block_ids = self._note_blocks(plan.new_blocks)
        if plan.draft_runs:
            return GraphInputs(plan.sampling_rows, places, block_ids, plan.run_positions, _run_tokens(plan))
        self._count(plan)
        return GraphInputs(self._decode_rows, places, block_ids)

    def prepare(self, plan: StepPlan, last_tokens: torch.Tensor) -> StepInputs:
        """Apply the plan's changes and lay out its tokens. last_tokens int64 [max_num_seqs], on the device."""
        places, block_ids = self._note_blocks(plan.new_blocks)
        if len(places) and self._device.type != "cpu":
            self._device_tables.view(-1)[to_device(places, self._device)] = to_device(block_ids, self._device)
        ids, positions, slots = [], [], []
        decode = None
        if plan.num_decode_tokens:
            rows, lens, decode = self._decode(plan)
            ids.append(self._to_device(_run_tokens(plan)) if plan.draft_runs else last_tokens[rows])
            positions.append(lens)
            slots.append(self._slots(rows, lens))
        extends = [chunk for chunk in plan.chunks if chunk.start]
        prefills = [chunk for chunk in plan.chunks if not chunk.start]
        laid = extends + prefills  # in their order in the step; no row has two
        ends = accumulate((len(chunk.token_ids) for chunk in laid), initial=plan.num_decode_tokens)
        start_of = {chunk.row: start for chunk, start in zip(laid, ends, strict=False)}
        if laid:
            spans = [np.arange(c.start, c.start + len(c.token_ids), dtype=np.int64) for c in laid]
            ids.append(self._to_device([token for chunk in laid for token in chunk.token_ids]))
            positions.append(to_device(np.concatenate(spans), self._device))
            chunk_slots = [self._chunk_slots(chunk.row, span) for chunk, span in zip(laid, spans, strict=True)]
            slots.append(to_device(np.concatenate(chunk_slots), self._device))
        batch = StepBatch(
            _join(slots),
            decode,
            self._chunk_rows(extends, start_of[extends[0].row]) if extends else None,
            self._chunk_rows(prefills, start_of[prefills[0].row]) if prefills else None,
        )
        starts = [start_of[chunk.row] for chunk in plan.chunks]
        return StepInputs(_join(ids), _join(positions), batch, starts, self._sample_indices(plan, starts))

    def read_tokens(self, plan: StepPlan, inputs: StepInputs) -> ReadTokens | None:
        """The tokens that sample, of a step that was just prepared: its last layer need not compute others. None where
        that is most of them or more than the state has rows, or prompt tokens are read, too."""
        rows, indices = plan.sampling_rows, inputs.sample_indices
        most = min(plan.num_tokens // 2, len(self._lens))
        if indices is None or len(rows) > most or any(chunk.logprob_targets for chunk in plan.chunks):
            return None
        lens = np.array(plan.run_positions, dtype=np.int64) + 1
        if not rows:  # one token, as there is no step without any
            rows, indices = [plan.chunks[0].row], self._to_device([inputs.chunk_starts[0]])
            lens = np.array([plan.chunks[0].start + 1])
        else:
            others = rows[len(lens) :]
            lens = np.concatenate([lens, self._lens[others]])
        longest, device_rows = int(lens.max()), self._to_device(rows)
        tables = self._device_tables[device_rows, : table_width(longest, self._block_size)]
        seq_lens = to_device(lens.astype(np.int32), self._device)
        starts = self._counting[: len(rows) + 1]
        return ReadTokens(indices, decode_rows(tables, seq_lens, longest, lens, cu_query_lens=starts))

    def _note_blocks(self, new_blocks: list[tuple[int, int, list[int]]]) -> tuple[Int64, Int32]:
        """In the host's tables; returns them as in `GraphInputs`."""
        if not new_blocks:
            return _NO_CHANGES
        places: list[int] = []
        found: list[int] = []
        for row, index, block_ids in new_blocks:
            self._tables[row, index : index + len(block_ids)] = block_ids
            first = row * self._tables.shape[1] + index
            places += range(first, first + len(block_ids))
            found += block_ids
        return np.array(places, dtype=np.int64), np.array(found, dtype=np.int32)

    def _decode(self, plan: StepPlan) -> tuple[torch.Tensor, torch.Tensor, QueryRows]:
        """The rows, their positions (lengths before this step), and what attention reads (lengths after it). Of a draft
        run each token is a row that sees those before it."""
        if plan.draft_runs:
            rows = self._to_device([run.row for run in plan.draft_runs for _ in run.token_ids])
            host_lens = np.array(plan.run_positions, dtype=np.int64) + 1
            seq_lens = to_device(host_lens, self._device)
            positions = seq_lens - 1
        else:
            host_lens = self._count(plan)
            if self._device_rows is None:
                self._device_rows = to_device(self._host_rows, self._device)
            rows = self._device_rows
            positions = self._device_lens[rows]
            seq_lens = positions + 1
            self._device_lens[rows] = seq_lens
        longest = int(host_lens.max())
        tables = self._device_tables[rows, : table_width(longest, self._block_size)]
        starts = self._counting[: len(host_lens) + 1]
        return rows, positions, decode_rows(tables, seq_lens.to(torch.int32), longest, host_lens, cu_query_lens=starts)

    def _count(self, plan: StepPlan) -> Int64:
        """Count one more token in each of the decode rows, on the host; returns their lengths."""
        if not plan.same_rows and plan.decode_rows != self._decode_rows:
            self._decode_rows = plan.decode_rows
            self._host_rows = np.array(plan.decode_rows, dtype=np.int64)
            self._device_rows = None
        lens: Int64 = self._lens[self._host_rows] + 1
        self._lens[self._host_rows] = lens
        return lens

    def _slots(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        blocks = self._device_tables[rows, positions // self._block_size].to(torch.int64)
        return blocks * self._block_size + positions % self._block_size

    def _chunk_slots(self, row: int, span: Int64) -> Int64:
        table = self._tables[row]
        slots: Int64 = table[span // self._block_size].astype(np.int64) * self._block_size + span % self._block_size
        return slots

    def _chunk_rows(self, chunks: list[Chunk], query_start: int) -> QueryRows:
        rows = np.array([chunk.row for chunk in chunks])
        query_lens = np.array([len(chunk.token_ids) for chunk in chunks])
        context_lens = np.array([chunk.start for chunk in chunks])
        seq_lens = context_lens + query_lens
        self._lens[rows] = seq_lens
        self._device_lens[to_device(rows, self._device)] = to_device(seq_lens, self._device)
        tables = self._tables[rows, : table_width(int(seq_lens.max()), self._block_size)]
        return chunk_rows(
            query_start,
            tuple(query_lens.tolist()),
            tuple(context_lens.tolist()),
            to_device(np.concatenate([[0], query_lens.cumsum()]).astype(np.int32), self._device),
            to_device(seq_lens.astype(np.int32), self._device),
            to_device(tables, self._device),
        )

    def _sample_indices(self, plan: StepPlan, starts: list[int]) -> torch.Tensor | None:
        if not plan.chunks:
            return None
        indices = list(range(plan.num_decode_tokens))
        for chunk, start in zip(plan.chunks, starts, strict=True):
            if chunk.samples:
                indices.append(start + len(chunk.token_ids) - 1)
        return self._to_device(indices)

    def _to_device(self, values: list[int]) -> torch.Tensor:
        return to_device(np.array(values, dtype=np.int64), self._device)


def _run_tokens(plan: StepPlan) -> list[int]:
    return [token_id for run in plan.draft_runs for token_id in run.token_ids]


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
