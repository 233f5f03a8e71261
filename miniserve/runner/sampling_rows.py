"""The rows' sampling parameters: a table, and its excerpt for the rows of one batch.

The table lies on the host, so that a step need not wait for the device to know what sampling needs; kernels that draw
read a copy on the device. An excerpt is made when the rows of a batch change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from miniserve.core import RowStart
from miniserve.kernels.sampling import NUM_COLUMNS, TEMPERATURE, WANTS_LOGITS, RowParams, row_numbers
from miniserve.runner.device import to_device
from miniserve.runner.sampling_edits import BatchEdit, make_edits


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """entries: batch indices of the rows that ask for logprobs; most: the largest number asked for; asked_ids: see
    `gather_logprobs`."""

    entries: slice | torch.Tensor
    most: int
    asked_ids: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """The excerpt for a list of rows. edits: those that a row needs, in the order in which they apply; logprobs: None
    where no row asks for any."""

    rows: torch.Tensor  # int64 [num_rows]
    ones: torch.Tensor  # int64 [num_rows]
    edits: list[BatchEdit]
    logprobs: LogprobRows | None
    num_logprobs: tuple[int | None, ...]


class RowTable:
    """The parameters of all rows; see `Sampler` for the arguments. `params` never move, so that graphs can hold on to
    them; on a CPU they are the table itself."""

    def __init__(
        self, max_num_seqs: int, vocab_size: int, device: torch.device, eos_token_ids: Collection[int], seed: int
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._seed = seed
        self._edits = make_edits(max_num_seqs, vocab_size, device, eos_token_ids)
        self._taken = np.zeros(max_num_seqs, dtype=np.bool_)
        self._keys = np.zeros(max_num_seqs, dtype=np.int64)
        self._prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self._numbers = np.zeros((max_num_seqs, NUM_COLUMNS), dtype=np.float32)
        self._num_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)
        self._asked_ids: dict[int, tuple[int, ...]] = {}
        # Lists, because reading a few entries is many times as fast.
        self._takes_argmax = [False] * max_num_seqs
        self._needs_sampler = [False] * max_num_seqs
        self._started: list[int] = []  # rows not yet copied to `params`
        arrays = (self._keys, self._prompt_lens, self._numbers)
        self.params = RowParams(*(torch.from_numpy(array).to(device) for array in arrays))

    def start_row(self, start: RowStart) -> None:
        row, params = start.row, start.request.params
        if self._taken[row]:
            raise ValueError(f"row {row} is taken")
        self._taken[row] = True
        self._started.append(row)
        self._keys[row] = stream_key(params.seed, start.request.request_id, self._seed)
        self._prompt_lens[row] = len(start.request.prompt_token_ids)
        self._num_logprobs[row] = -1 if params.logprobs is None else len(params.logprob_token_ids) or params.logprobs
        if params.logprob_token_ids:
            self._asked_ids[row] = params.logprob_token_ids
        edits = [edit for edit in self._edits if edit.concerns(start)]
        for edit in edits:
            edit.start_row(start)
        self._needs_sampler[row] = bool(edits) or params.logprobs is not None
        wants_logits = self._needs_sampler[row] or params.grammar is not None
        self._numbers[row] = row_numbers(params, self._vocab_size, wants_logits=wants_logits)
        self._takes_argmax[row] = bool(self._numbers[row, TEMPERATURE] == 0.0) and not wants_logits

    def stop_row(self, row: int) -> None:
        if not self._taken[row]:
            raise ValueError(f"row {row} holds no request")
        self._taken[row] = False
        self._asked_ids.pop(row, None)
        for edit in self._edits:
            edit.rows.pop(row, None)

    def upload(self) -> None:
        """Copy rows that have started since to `params`. Nothing waits."""
        if self._started and self._device.type != "cpu":
            rows = np.array(self._started)
            places = self._to_device(rows)
            self.params.keys.index_copy_(0, places, self._to_device(self._keys[rows]))
            self.params.prompt_lens.index_copy_(0, places, self._to_device(self._prompt_lens[rows]))
            self.params.numbers.index_copy_(0, places, self._to_device(self._numbers[rows]))
        self._started.clear()

    def num_outputs(self, rows: list[int], positions: list[int]) -> torch.Tensor:
        """Output tokens before these positions of the rows, int64 [num_rows]."""
        return self._to_device(np.array(positions, dtype=np.int64) + 1 - self._prompt_lens[rows])

    def take_argmax(self, rows: list[int]) -> bool:
        """Whether each row takes its most likely token and needs nothing else."""
        return all(map(self._takes_argmax.__getitem__, rows))

    def want_masks_alone(self, rows: list[int]) -> bool:
        """Whether no row's logits are edited, but for masks, or read after the draw."""
        return not any(map(self._needs_sampler.__getitem__, rows))

    def wanting_logits(self, rows: list[int]) -> npt.NDArray[np.int64]:
        """The batch indices of rows whose logits are edited before the draw, or read after it."""
        return np.flatnonzero(self._numbers[rows, WANTS_LOGITS])

    def batch(self, rows: list[int]) -> Batch:
        """The excerpt for these rows, which must all be taken."""
        host_rows = np.array(rows, dtype=np.int64)
        if not self._taken[host_rows].all():
            raise ValueError(f"row {rows[int(self._taken[host_rows].argmin())]} holds no request")
        counts = self._num_logprobs[host_rows]
        asking = np.flatnonzero(counts >= 0)
        edits = []
        for edit in self._edits:
            found = [(entry, edit.rows[row]) for entry, row in enumerate(rows) if row in edit.rows] if edit.rows else []
            if found:
                edits.append(edit.lay_out(found))
        return Batch(
            rows=self._to_device(host_rows),
            ones=torch.ones(len(rows), dtype=torch.int64, device=self._device),
            edits=edits,
            logprobs=self._logprob_rows(host_rows, asking, int(counts.max())) if len(asking) else None,
            num_logprobs=tuple(None if count < 0 else count for count in counts.tolist()),
        )

    def _logprob_rows(self, host_rows: npt.NDArray[np.int64], asking: npt.NDArray[np.int64], most: int) -> LogprobRows:
        asked: torch.Tensor | None = None
        ids = [self._asked_ids.get(row, ()) for row in host_rows[asking].tolist()]
        if any(ids):
            padded = np.full((len(ids), most), -1, np.int64)
            for index, some in enumerate(ids):
                padded[index, : len(some)] = some
            asked = self._to_device(padded)
        return LogprobRows(self.entries(asking), most, asked)

    def entries(self, entries: npt.NDArray[np.int64]) -> slice | torch.Tensor:
        """An index of these batch positions, in ascending order: a slice if they are contiguous, so that indexing
        logits is a view."""
        first, last = int(entries[0]), int(entries[-1])
        if last - first + 1 == len(entries):
            return slice(first, last + 1)
        return self._to_device(entries)

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._device)


def stream_key(seed: int | None, request_id: str, engine_seed: int) -> int:
    """The key of a request's stream of random numbers, a signed 64-bit integer.

    With a seed it depends on the seed alone; without, on the engine's seed and the request's id, so that a run can be
    repeated with the same ids and a preempted request finds its stream again.
    """
    origin = f"request {engine_seed} {request_id}" if seed is None else f"seed {seed}"
    return int.from_bytes(hashlib.blake2b(origin.encode(), digest_size=8).digest(), "little", signed=True)
