"""A decode step's forward pass on a CPU as a list of native calls: noted once as Python makes them, then replayed.

What a device graph is to a GPU this is to a CPU: a small model's step is short beside the Python around its kernels. A
pass may be replayed if nothing but native kernels, views and allocations ran in it, which is watched while it is noted;
any other keeps running from Python. The notes hold addresses: of weights and caches, which stay where they are once the
model serves; of the step's inputs, which are copied to where they were; and of what the pass computes on its way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from miniserve.attention.backends.base import Backend
from miniserve.attention.context import PagedStepContext
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import DecodeRows, StepBatch
from miniserve.kernels.native import Call, NativeKernels, record
from miniserve.models.decoder import CausalLM
from miniserve.runner.native_arena import plan_arena
from miniserve.runner.state import StepInputs

MOST_ROWS = 16  # with more, kernels take so long that the Python around them hardly counts
_ALLOCATIONS = frozenset({"aten::empty", "aten::empty_like", "aten::new_empty"})
_VIEWS = frozenset({"aten::view", "aten::slice", "aten::split_with_sizes", "aten::alias", "aten::detach"})


@dataclass(frozen=True, slots=True)
class _Graph:
    """`words` for `NativeKernels.replay`, int64; what the pass computes lies in `arena`, in the end `hidden`."""

    words: torch.Tensor
    arena: torch.Tensor
    hidden: torch.Tensor


class NativeGraphs:
    """backend: one whose `graphs` is true. tables_shape: of all rows' block tables, [max_num_seqs, width]."""

    def __init__(
        self,
        model: CausalLM,
        backend: Backend[Any],
        caches: Sequence[KVCache],
        kernels: NativeKernels,
        tables_shape: Sequence[int],
    ) -> None:
        self._model, self._backend, self._caches, self._kernels = model, backend, caches, kernels
        max_num_seqs, width = tables_shape
        most = min(MOST_ROWS, max_num_seqs)
        self._ids, self._positions, self._slots = (torch.zeros(most, dtype=torch.int64) for _ in range(3))
        self._tables = torch.zeros(most, width, dtype=torch.int32)
        self._lens = torch.zeros(most, dtype=torch.int32)
        self._arena = torch.empty(0, dtype=torch.uint8)  # of all graphs, as only one of them runs at a time
        self._graphs: dict[int, _Graph | None] = {}  # by rows; None where the pass cannot be replayed

    def run(self, inputs: StepInputs) -> torch.Tensor | None:
        """The hidden states of a step's tokens, [num_tokens, hidden_size], which the next step may overwrite; None
        where no graph holds it."""
        rows, decode = len(inputs.input_ids), inputs.batch.decode
        if decode is None or inputs.chunk_starts or rows > len(self._ids):
            return None
        known = rows in self._graphs
        graph = self._graphs.get(rows)
        if known and graph is None:
            return None
        self._ids[:rows] = inputs.input_ids
        self._positions[:rows] = inputs.positions
        self._slots[:rows] = inputs.batch.slot_mapping
        self._lens[:rows] = decode.seq_lens
        self._tables[:rows, : decode.block_tables.shape[1]] = decode.block_tables
        if graph is None:
            return self._record(rows)
        self._kernels.replay(graph.words)
        return graph.hidden

    def _record(self, rows: int) -> torch.Tensor:
        """Run the step from Python, and note it if it can be replayed."""
        longest = self._tables.shape[1] * self._backend.layout.block_size
        decode = DecodeRows(self._tables[:rows], self._lens[:rows], longest, host_seq_lens=None)
        with _Watch() as watch, record() as calls:
            metadata = self._backend.build(StepBatch(self._slots[:rows], decode))
            context = PagedStepContext(self._backend, self._caches, metadata)
            hidden: torch.Tensor = self._model(self._ids[:rows], self._positions[:rows], context)
        self._graphs[rows] = None if watch.foreign else self._make(calls, watch.allocated, hidden)
        return hidden

    def _make(self, calls: list[Call], allocated: list[torch.Tensor], hidden: torch.Tensor) -> _Graph:
        words, pointers = self._kernels.encode(calls)
        offsets, size = plan_arena([(words[place], number) for place, number in pointers], allocated, hidden)
        if len(self._arena) < size:  # graphs that are there already keep theirs
            self._arena = torch.empty(-(-size // len(hidden)) * len(self._ids), dtype=torch.uint8)
        for place, _ in pointers:
            if words[place] in offsets:
                words[place] = self._arena.data_ptr() + offsets[words[place]]
        start = offsets[hidden.data_ptr()]
        result = self._arena[start : start + hidden.nbytes].view(hidden.dtype).view(hidden.shape)
        return _Graph(torch.tensor(words, dtype=torch.int64), self._arena, result)


class _Watch(TorchDispatchMode):
    """Sees what PyTorch is asked for within: keeps what is `allocated`; `foreign`: it computed something, too."""

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
