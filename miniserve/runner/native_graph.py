"""A CPU's decode steps as lists of native calls: recorded once as Python makes them, then replayed.

This is for a CPU what a device graph is for a GPU: in a small model's step the Python around the kernels takes longer
than the kernels. A step can be replayed if its forward pass runs nothing but native kernels, views and allocations,
which is checked while it is recorded; other models keep running from Python. A recording holds addresses: of weights,
caches and rows' state, which do not move while the model serves; of the step's inputs; and of intermediates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miniserve.attention.metadata import StepBatch, decode_rows
from miniserve.core import TokenMasks
from miniserve.kernels.native import NativeKernels
from miniserve.kernels.native_calls import Call, encode, record, replay
from miniserve.kernels.sampling import RowParams
from miniserve.kernels.step_tensors import RowState, StepTensors
from miniserve.runner.native_arena import plan_arena
from miniserve.runner.sampling_masks import MaskRoom
from miniserve.runner.served import ServedModel
from miniserve.runner.state import GraphInputs

MOST_ROWS = 16  # with more rows the Python around the kernels hardly counts
_LARGE = 65_536  # logits that threads share to draw from them
_ALLOCATIONS = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty"})
_VIEWS = frozenset({"aten::view", "aten::slice", "aten::split_with_sizes", "aten::alias", "aten::detach"})


@dataclass(slots=True)
class _Graph:
    """Words for `replay`: of a whole step, of one without the draw, and of a draw with masks (None where the host sets
    positions). Intermediates and `logits` lie in `arena`."""

    greedy: torch.Tensor
    drawn: torch.Tensor
    arena: torch.Tensor
    logits: torch.Tensor
    masked: torch.Tensor | None = None


class NativeGraphs:
    """served: over a backend whose `graphs` is true. state, params: those of the runner's rows."""

    def __init__(self, served: ServedModel, kernels: NativeKernels, state: RowState, params: RowParams) -> None:
        self._served, self._kernels, self._state, self._params = served, kernels, state, params
        max_num_seqs, width = state.tables.shape
        self._num_rows = most = min(MOST_ROWS, max_num_seqs)
        tokens = torch.zeros(most, dtype=torch.int64)
        self._tokens = [tokens[:count] for count in range(most + 1)]
        self._step = StepTensors.allocate(most, width, state.tables.device)
        self._query_starts = torch.arange(most + 1, dtype=torch.int32)
        self._known_rows: list[int] = []
        self._arena = torch.empty(0, dtype=torch.uint8)  # of all graphs, as only one of them runs at a time
        self._masks = MaskRoom(most, served.model.config.vocab_size, state.tables.device)
        self._replayed: _Graph | None = None  # by the last step
        self._graphs: dict[tuple[int, bool], _Graph] = {}  # by rows, and whether the host sets positions and tokens

    def bucket(self, num_rows: int) -> int | None:
        """See `StepGraphs.bucket`; None where it runs from Python."""
        return num_rows if num_rows <= self._num_rows else None

    def greedy(self, bucket: int, inputs: GraphInputs) -> torch.Tensor:
        """See `StepGraphs.greedy`."""
        self._run(bucket, inputs, greedy=True)
        return self._tokens[bucket]

    def drawn(self, bucket: int, inputs: GraphInputs) -> tuple[None, torch.Tensor]:
        """See `StepGraphs.drawn`: here the sampler draws for all rows."""
        return None, self._run(bucket, inputs, greedy=False)

    def masked(self, masks: TokenMasks) -> torch.Tensor | None:
        """See `StepGraphs.masked`: for all rows."""
        graph = self._replayed
        if graph is None or graph.masked is None:
            return None
        self._masks.take(masks, len(graph.logits))
        replay(graph.masked, self._kernels.num_threads if graph.logits.numel() > _LARGE else 1)
        return self._tokens[len(graph.logits)]

    def _run(self, bucket: int, inputs: GraphInputs, *, greedy: bool) -> torch.Tensor:
        """The step's logits [bucket, vocab_size], which the next step overwrites."""
        if inputs.rows is not self._known_rows:
            self._known_rows = inputs.rows
            self._step.rows[:bucket] = torch.tensor(inputs.rows)
        explicit = inputs.positions is not None
        if explicit:
            self._step.positions[:bucket] = torch.tensor(inputs.positions)
            self._step.input_ids[:bucket] = torch.tensor(inputs.token_ids)
        graph = self._graphs.get((bucket, explicit))
        self._replayed = graph
        if graph is None:
            return self._record(bucket, explicit, greedy)
        replay(graph.greedy if greedy else graph.drawn, self._kernels.num_threads)
        return graph.logits

    def _record(self, rows: int, explicit: bool, greedy: bool) -> torch.Tensor:
        """Run the step from Python, and record it if it can be replayed."""
        step, block_size = self._step.first(rows), self._served.backend.layout.block_size
        with record(execute=True) as before:
            self._kernels.advance(self._state, step, block_size, explicit=explicit)
        with _Watch() as watch, record(execute=True) as calls:
            longest, starts = step.block_tables.shape[1] * block_size, self._query_starts[: rows + 1]
            decode = decode_rows(step.block_tables, step.seq_lens, longest, cu_query_lens=starts)
            logits = self._served.logits(step.input_ids, step.positions, StepBatch(step.slots, decode))
        with record(execute=greedy) as after:
            self._kernels.draw_next(logits, step.rows, self._params, self._state, self._tokens[rows])
        if watch.foreign:
            self._num_rows = 0
        else:
            graph = self._make([*before, *calls, *after], watch.allocated, logits)
            with record(execute=False) as masked:
                draw = (graph.logits, step.rows, self._params, self._state, self._tokens[rows], self._masks.masks)
                self._kernels.draw_next(*draw)
            graph.masked = None if explicit else torch.tensor(encode(masked)[0])
            self._graphs[rows, explicit] = graph
        return logits

    def _make(self, calls: list[Call], allocated: list[torch.Tensor], logits: torch.Tensor) -> _Graph:
        words, pointers = encode(calls)
        offsets, size = plan_arena([(words[place], number) for place, number in pointers], allocated, logits)
        if len(self._arena) < size:  # existing graphs keep theirs
            self._arena = torch.empty(-(-size // len(logits)) * len(self._step.rows), dtype=torch.uint8)
        for place, _ in pointers:
            if words[place] in offsets:
                words[place] = self._arena.data_ptr() + offsets[words[place]]
        start = offsets[logits.data_ptr()]
        moved = self._arena[start : start + logits.nbytes].view(logits.dtype).view(logits.shape)
        whole = torch.tensor(words, dtype=torch.int64)
        return _Graph(whole, whole[: -1 - len(calls[-1][1])], self._arena, moved)


class _Watch(TorchDispatchMode):
    """Watches PyTorch's operations within: keeps tensors that are `allocated`; `foreign`: it computed something,
    too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.allocated: list[torch.Tensor] = []
        self.foreign = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in _ALLOCATIONS:
            self.allocated.append(out)
        elif name not in _VIEWS:
            self.foreign = True
        return out
