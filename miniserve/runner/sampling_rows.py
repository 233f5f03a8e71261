"""What the rows' requests ask of the sampler: a table on the host, and its excerpt for the rows of one batch.

An excerpt is made when the rows of a batch change, and holds all that their steps need as tensors on the device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from miniserve.core import InvalidRequest, RowStart, SamplingParams
from miniserve.runner.logprobs import rows_per_chunk
from miniserve.runner.sampling_draw import DrawParams
from miniserve.runner.sampling_penalties import PenaltyParams
from miniserve.runner.sampling_random import stream_key
from miniserve.runner.sampling_transfer import to_device

# Below this a draw is the argmax in all but name, and dividing by it would lose all precision (vLLM's limit).
_GREEDY_BELOW = 1e-5
# Rows with a larger top_k are drawn apart: the rows with a usual one need not pay for it.
_SMALL_TOP_K = 128

_FREE, _GREEDY, _SMALL_K, _LARGE_K, _ANY = range(5)  # how a row's token is found
_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _REPETITION, _FREQUENCY, _PRESENCE = range(7)  # columns of the table


@dataclass(frozen=True, slots=True)
class Group:
    """Rows of a batch to be drawn together. positions: their places in it, a slice where they are neighbours (so that
    indexing the logits gives a view)."""

    positions: slice | torch.Tensor
    params: DrawParams


@dataclass(frozen=True, slots=True)
class Bias:
    """places: int64, indices into the flattened logits; values: float32, to be added."""

    places: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True, slots=True)
class EarlyStops:
    """Tokens that would end a row. places: int64, indices into the flattened logits; positions and min_tokens (int64):
    the place in the batch whose they are and how many outputs that row must have first."""

    places: torch.Tensor
    positions: torch.Tensor
    min_tokens: torch.Tensor


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """positions: places in the batch of the rows that ask for logprobs; most: the largest number asked for."""

    positions: slice | torch.Tensor
    most: int


@dataclass(frozen=True, slots=True)
class Batch:
    """The excerpt for a list of rows. What no row uses is None or empty; so are the groups where a device draws."""

    rows: torch.Tensor  # int64 [num_rows]
    ones: torch.Tensor  # int64 [num_rows]
    any_greedy: bool
    groups: list[Group]
    bias: Bias | None
    early_stops: EarlyStops | None
    penalties: PenaltyParams | None
    logprobs: LogprobRows | None
    num_logprobs: tuple[int | None, ...]

    @property
    def edits_logits(self) -> bool:
        return any(edit is not None for edit in (self.bias, self.early_stops, self.penalties))


class RowTable:
    """The parameters of all rows; see `Sampler` for the arguments. `grouped`: a batch's rows are to be drawn in groups.

    `wants_logits` [max_num_seqs]: rows whose logits are edited before the draw, or read after it.
    """

    def __init__(
        self,
        max_num_seqs: int,
        vocab_size: int,
        device: torch.device,
        eos_token_ids: Collection[int],
        seed: int,
        *,
        grouped: bool,
    ) -> None:
        self._vocab_size = vocab_size
        self._grouped = grouped
        self._device = device
        self._eos_token_ids = frozenset(eos_token_ids)
        self._seed = seed
        self._kinds = np.full(max_num_seqs, _FREE, dtype=np.int8)
        self._numbers = np.zeros((max_num_seqs, 7), dtype=np.float64)
        self._keys = np.zeros(max_num_seqs, dtype=np.int64)
        self._num_logprobs = np.full(max_num_seqs, -1, dtype=np.int64)
        self._prompt_lens = np.zeros(max_num_seqs, dtype=np.int64)
        self.penalised = np.zeros(max_num_seqs, dtype=np.bool_)
        self.wants_logits = np.zeros(max_num_seqs, dtype=np.bool_)
        self._takes_argmax = [False] * max_num_seqs  # a list, because a look at a few rows is many times as fast
        self._biases: dict[int, dict[int, float]] = {}
        self._early_stops: dict[int, tuple[list[int], int]] = {}

    def start_row(self, start: RowStart) -> None:
        row, params = start.row, start.request.params
        if self._kinds[row] != _FREE:
            raise ValueError(f"row {row} is taken")
        if params.logit_bias and max(params.logit_bias) >= self._vocab_size:
            raise InvalidRequest(
                f"logit_bias has a token id beyond the vocabulary of {self._vocab_size}.", "logit_bias"
            )
        top_k = params.top_k if 0 < params.top_k < self._vocab_size else 0
        self._kinds[row] = _kind(params, top_k)
        self._numbers[row] = (
            params.temperature,
            top_k,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        self._keys[row] = stream_key(params.seed, start.request.request_id, self._seed)
        self._num_logprobs[row] = -1 if params.logprobs is None else params.logprobs
        self._prompt_lens[row] = len(start.request.prompt_token_ids)
        self.penalised[row] = params.penalised
        if params.logit_bias:
            self._biases[row] = params.logit_bias
        if len(start.output_token_ids) < params.min_tokens:
            # An id beyond the vocabulary cannot be drawn anyhow.
            stops = [i for i in self._eos_token_ids.union(params.stop_token_ids) if 0 <= i < self._vocab_size]
            self._early_stops[row] = (stops, params.min_tokens)
        self.wants_logits[row] = (
            self.penalised[row] or row in self._biases or row in self._early_stops or params.logprobs is not None
        )
        self._takes_argmax[row] = bool(self._kinds[row] == _GREEDY and not self.wants_logits[row])

    def stop_row(self, row: int) -> None:
        if self._kinds[row] == _FREE:
            raise ValueError(f"row {row} holds no request")
        self._kinds[row] = _FREE
        self._biases.pop(row, None)
        self._early_stops.pop(row, None)

    def num_outputs(self, rows: list[int], positions: list[int]) -> torch.Tensor:
        """How many output tokens there are up to these positions of the rows, int64 [num_rows]."""
        return self._to_device(np.array(positions, dtype=np.int64) + 1 - self._prompt_lens[rows])

    def take_argmax(self, rows: list[int]) -> bool:
        """Whether each row is given its most likely token and nothing more."""
        return all(map(self._takes_argmax.__getitem__, rows))

    def draw_params(self, rows: list[int]) -> tuple[npt.NDArray[np.generic], ...]:
        """What `DeviceDraw.set_rows` takes of these rows."""
        numbers = np.empty((len(rows), 5), dtype=np.float32)
        numbers[:, :4] = self._numbers[rows, : _MIN_P + 1]
        numbers[self._kinds[rows] == _GREEDY, 0] = 0.0
        numbers[:, 4] = self.wants_logits[rows]
        return np.array(rows), self._keys[rows], self._prompt_lens[rows], numbers

    def batch(self, rows: list[int]) -> Batch:
        """The excerpt for these rows, which must all be taken."""
        host_rows = np.array(rows, dtype=np.int64)
        kinds = self._kinds[host_rows]
        if not kinds.all():
            raise ValueError(f"row {rows[int(kinds.argmin())]} holds no request")
        counts = self._num_logprobs[host_rows]
        asking = np.flatnonzero(counts >= 0)
        return Batch(
            rows=self._to_device(host_rows),
            ones=torch.ones(len(rows), dtype=torch.int64, device=self._device),
            any_greedy=bool((kinds == _GREEDY).any()),
            groups=self._groups(host_rows, kinds) if self._grouped else [],
            bias=self._bias(rows) if self._biases else None,
            early_stops=self._stops(rows) if self._early_stops else None,
            penalties=self._penalties(host_rows),
            logprobs=LogprobRows(self.places(asking), int(counts.max())) if len(asking) else None,
            num_logprobs=tuple(None if count < 0 else count for count in counts.tolist()),
        )

    def _groups(self, host_rows: npt.NDArray[np.int64], kinds: npt.NDArray[np.int8]) -> list[Group]:
        step = rows_per_chunk(self._vocab_size, self._device)
        groups = []
        # A small top_k leaves a fraction of the vocabulary to work on.
        for kind, most in ((_SMALL_K, 8 * step), (_LARGE_K, step), (_ANY, step)):
            positions = np.flatnonzero(kinds == kind)
            groups += [self._group(host_rows, positions[i : i + most]) for i in range(0, len(positions), most)]
        return groups

    def _group(self, host_rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]) -> Group:
        rows = host_rows[positions]
        numbers = self._numbers[rows]
        params = DrawParams(
            keys=self._to_device(self._keys[rows]),
            temperature=self._column(numbers, _TEMPERATURE, np.float32),
            top_k=self._column(numbers, _TOP_K, np.int64),
            top_p=self._column(numbers, _TOP_P, np.float64),
            min_p=self._column(numbers, _MIN_P, np.float32),
            max_top_k=int(numbers[:, _TOP_K].max()),
            any_top_p=bool((numbers[:, _TOP_P] < 1.0).any()),
            any_min_p=bool((numbers[:, _MIN_P] > 0.0).any()),
        )
        return Group(self.places(positions), params)

    def _bias(self, rows: list[int]) -> Bias | None:
        found = [(position, self._biases[row]) for position, row in enumerate(rows) if row in self._biases]
        places = [position * self._vocab_size + token_id for position, bias in found for token_id in bias]
        if not places:
            return None
        values = [value for _, bias in found for value in bias.values()]
        return Bias(self._to_device(np.array(places, np.int64)), self._to_device(np.array(values, np.float32)))

    def _stops(self, rows: list[int]) -> EarlyStops | None:
        entries = [
            (position * self._vocab_size + token_id, position, self._early_stops[row][1])
            for position, row in enumerate(rows)
            if row in self._early_stops
            for token_id in self._early_stops[row][0]
        ]
        if not entries:
            return None
        places, positions, least = np.array(entries, dtype=np.int64).T.copy()
        return EarlyStops(self._to_device(places), self._to_device(positions), self._to_device(least))

    def _penalties(self, host_rows: npt.NDArray[np.int64]) -> PenaltyParams | None:
        positions = np.flatnonzero(self.penalised[host_rows])
        if not len(positions):
            return None
        rows = host_rows[positions]
        numbers = self._numbers[rows]
        return PenaltyParams(
            positions=self._to_device(positions),
            rows=self._to_device(rows),
            host_rows=rows,
            repetition=self._column(numbers, _REPETITION, np.float32),
            frequency=self._column(numbers, _FREQUENCY, np.float32),
            presence=self._column(numbers, _PRESENCE, np.float32),
        )

    def places(self, positions: npt.NDArray[np.int64]) -> slice | torch.Tensor:
        """An index of these places in a batch, in ascending order: a slice where they are neighbours."""
        first, last = int(positions[0]), int(positions[-1])
        if last - first + 1 == len(positions):
            return slice(first, last + 1)
        return self._to_device(positions)

    def _column(self, numbers: npt.NDArray[np.float64], column: int, dtype: type[np.generic]) -> torch.Tensor:
        return self._to_device(numbers[:, column : column + 1].astype(dtype))

    def _to_device(self, array: npt.NDArray[np.generic]) -> torch.Tensor:
        return to_device(array, self._device)


def _kind(params: SamplingParams, top_k: int) -> int:
    if params.temperature < _GREEDY_BELOW:
        return _GREEDY
    if not top_k:
        return _ANY
    return _SMALL_K if top_k <= _SMALL_TOP_K else _LARGE_K
