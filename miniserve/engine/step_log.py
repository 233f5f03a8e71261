"""What the last steps were and how long each part of them took: a ring of records, and sums over all steps.

It costs a few microseconds a step, so it is always on. How much context the decode rows read is counted along with the
plans, in O(1) for a step whose rows are those of the step before.
"""

from __future__ import annotations

import time
from collections import deque
from functools import lru_cache

import numpy as np

from miniserve.core import Step, StepPlan, StepRecord, StepTotals, StepTraffic
from miniserve.engine.roofline import kv_bytes, weight_bytes

RING_SIZE = 1024


class StepLog:
    """Steps are `open`ed once launched, in the order of their launches, and `close`d in the same order. `traffic` None:
    bytes are unknown. `max_num_seqs` bounds the row numbers. `clock` counts seconds from an arbitrary point."""

    def __init__(self, traffic: StepTraffic | None, max_num_seqs: int) -> None:
        self.clock = time.perf_counter
        self.totals = StepTotals()
        self._context = None if traffic is None else _Context(traffic, max_num_seqs)
        self._weights = lru_cache(maxsize=max_num_seqs)(lambda n: 0 if traffic is None else weight_bytes(traffic, n))
        self._sums = 0.0 if traffic is None else traffic.sums
        self._ring: deque[StepRecord] = deque(maxlen=RING_SIZE)
        self._to_wall = time.time() - self.clock()
        self._number = 0

    def open(self, step: Step) -> None:
        """Note what the step computes and reads."""
        plan, record = step.plan, step.record
        record.rows, record.chunks, record.tokens = plan.num_decode_tokens, len(plan.chunks), plan.num_tokens
        if plan.chunks:
            record.kind = "mixed" if record.rows else "prefill"
        if self._context is not None:
            record.weight_bytes = self._weights(record.tokens)
            record.kv_bytes = self._context.read(plan)

    def close(self, step: Step) -> float:
        """To be called when the results have been taken in. Returns the seconds that the step took: of the device and
        its wait for the step where it has a clock, else of what the host did and waited."""
        record, totals = step.record, self.totals
        record.number = self._number
        record.start += self._to_wall
        if step.after_rest:
            record.idle = None
        self._number += 1
        self._ring.append(record)
        host = record.schedule + record.launch + record.update
        took = host + record.wait if record.device is None else record.device + (record.idle or 0.0)
        totals.prefill_tokens += record.tokens - record.rows
        if record.kind == "mixed":
            totals.mixed_steps += 1
            totals.mixed_seconds += took
            totals.mixed_rows += record.rows
        elif record.kind == "prefill":
            totals.prefill_steps += 1
            totals.prefill_seconds += took
        else:
            totals.decode_steps += 1
            totals.decode_seconds += took
            totals.decode_rows += record.rows
            totals.padded_rows += max(0, record.bucket - record.rows)
            totals.weight_bytes += record.weight_bytes or 0
            totals.kv_bytes += record.kv_bytes or 0
            totals.sum_seconds += self._sums
            if record.idle is not None:
                totals.timed_host += host
                totals.timed_idle += record.idle
        return took

    def records(self, limit: int = RING_SIZE) -> list[StepRecord]:
        """The last `limit` steps that are done, the oldest first."""
        records = list(self._ring)
        return records[max(0, len(records) - limit) :]


class _Context:
    """Follows the length of every row's context through the plans, to know what attention reads."""

    def __init__(self, traffic: StepTraffic, max_num_seqs: int) -> None:
        self._traffic = traffic
        self._lens = np.zeros(max_num_seqs, dtype=np.int64)
        self._rows = np.zeros(0, dtype=np.int64)
        self._ahead = 0  # tokens by which the decoding rows are longer than `_lens` says
        self._windows = [_Window(window, size) for window, size in traffic.kv]

    def read(self, plan: StepPlan) -> int:
        """Bytes of cache that a step reads; plans must come in order."""
        if not plan.same_rows:
            self._lens[self._rows] += self._ahead
            self._rows, self._ahead = np.array(plan.decode_rows, dtype=np.int64), 0
            lens = self._lens[self._rows]
            for window in self._windows:
                window.restart(lens)
        self._ahead += 1
        total = 0
        for window in self._windows:
            total += window.advance(self._ahead)
        total += sum(kv_bytes(self._traffic, position + 1) for position in plan.run_positions)
        for chunk in plan.chunks:
            seq_len = self._lens[chunk.row] = chunk.start + len(chunk.token_ids)
            total += kv_bytes(self._traffic, seq_len)
        return total


class _Window:
    """What decode rows read in the layers of one window (tokens, None: of no bound), all of them growing by a token a
    step. `size`: bytes of a token in these layers."""

    def __init__(self, window: int | None, size: int) -> None:
        self._window, self._size = window, size
        self._tokens = 0
        self._growing = 0  # rows that are not longer than the window yet
        self._room: list[int] = []  # tokens they may still grow by, the least last

    def restart(self, lens: np.ndarray[tuple[int], np.dtype[np.int64]]) -> None:
        self._growing, self._room = len(lens), []
        if self._window is None:
            self._tokens = int(lens.sum())
        else:
            self._tokens = int(np.minimum(lens, self._window).sum())
            self._room = sorted((self._window - lens).tolist(), reverse=True)

    def advance(self, steps: int) -> int:
        """Bytes that the step reads which is the `steps`-th since `restart`."""
        room = self._room
        while room and room[-1] < steps:
            room.pop()
            self._growing -= 1
        self._tokens += self._growing
        return self._tokens * self._size
