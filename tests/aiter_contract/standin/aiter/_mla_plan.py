"""How persistent MLA's work is laid down: as csrc/kernels/mla/metadata/v1_2_device.cuh does, pages being of one token.

Blocks of `granularity` tokens are dealt to the workgroups in order, to each as many; a tile of query rows whose keys
more than one takes is summed from partial results afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

OVERHEAD = 16  # blocks that a piece of work costs beside its keys


class Work(NamedTuple):
    """Query rows and keys, [start, end) each, of one row of the batch; partial: where its result goes, -1 for none."""

    batch: int
    partial: int
    q_start: int
    q_end: int
    kv_start: int
    kv_end: int
    kv_after: int  # keys of the row beyond it


@dataclass
class Plan:
    """works, workgroup after workgroup; the works of workgroup c are [work_indptr[c], work_indptr[c + 1]). Tile t is
    summed from partial_map[reduce_indptr[t] : reduce_indptr[t + 1]], if any, into the query rows final_map[t]."""

    works: list[Work] = field(default_factory=list)
    work_indptr: list[int] = field(default_factory=lambda: [0])
    reduce_indptr: list[int] = field(default_factory=lambda: [0])
    final_map: dict[int, tuple[int, int]] = field(default_factory=dict)
    partial_map: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Step:
    """q_spans, kv_spans: of each row, [start, end); a folded layer's come `fold` times each, as the kernel sees them.
    packed: query rows times heads of a tile; splits_q: whether a row may have several tiles."""

    q_spans: list[tuple[int, int]]
    kv_spans: list[tuple[int, int]]
    heads: int
    fold: int
    packed: int
    splits_q: bool
    granularity: int
    max_qlen: int
    causal: bool
    workgroups: int
    num_splits: int

    def blocks(self, batch: int) -> int:
        start, end = self.kv_spans[batch]
        return -(-(end - start) // self.granularity)

    def tiles(self, batch: int) -> int:
        start, end = self.q_spans[batch]
        if not self.splits_q:
            return 1
        return end - start if self.heads * 2 > self.packed else -(-(end - start) * self.heads // self.packed)

    def payload(self) -> int:
        """What a workgroup takes, in blocks."""
        total = sum((self.blocks(batch) + OVERHEAD) * self.tiles(batch) for batch in range(len(self.q_spans)))
        return -(-total // self.num_splits) + OVERHEAD


def plan(step: Step) -> Plan:
    return _parallel(step) if step.max_qlen == 1 and not step.splits_q and step.fold == 1 else _sequential(step)


def _parallel(step: Step) -> Plan:
    """One query token a row. A row without keys gets a work without keys, or none where the workgroup is full."""
    made, payload = Plan(), step.payload()
    each, room, workgroup, partial = payload - OVERHEAD, payload, 0, 0
    ends = [-1] * (step.workgroups + 1)
    for batch, ((q_start, q_end), (kv_start, kv_end)) in enumerate(zip(step.q_spans, step.kv_spans, strict=True)):
        blocks = step.blocks(batch)
        if blocks + OVERHEAD <= room:
            cuts, first = [0, blocks], workgroup
            room -= blocks + OVERHEAD
        else:
            head, first = room - OVERHEAD, workgroup
            if head <= 0:  # nothing more in this workgroup
                head, first = 0, workgroup + 1
                ends[first] = len(made.works)
            fresh = -(-(blocks - head) // each)
            cuts = [*([0] if head else []), *range(head, blocks, each), blocks] if fresh else []
            room = payload - (blocks - head - (fresh - 1) * each + OVERHEAD)
            workgroup += fresh
        pieces = list(pairwise(cuts))
        for index, (begin, end) in enumerate(pieces):
            stop = min(kv_start + end * step.granularity, kv_end)
            at = partial + index * (q_end - q_start) if len(pieces) > 1 else -1
            span = (kv_start + begin * step.granularity, stop)
            made.works.append(Work(batch, at, q_start, q_end, *span, kv_end - stop))
            if index < len(pieces) - 1:
                ends[first + index + 1] = len(made.works)
        if len(pieces) > 1:
            made.final_map[batch] = (q_start, q_end)
            made.partial_map += [partial + index * (q_end - q_start) for index in range(len(pieces))]
            partial += len(pieces) * (q_end - q_start)
        made.reduce_indptr.append(len(made.partial_map))
    made.work_indptr += [len(made.works) if end < 0 else end for end in ends[1:]]
    return made


def _sequential(step: Step) -> Plan:
    """Any number of query tokens. A causal tile's keys end where its last query's do; fewer keys than `max_qlen` are
    not left to the next workgroup."""
    made, payload = Plan(), step.payload()
    batch = tile = block = splits = partial = 0
    tail = False
    for _ in range(step.workgroups):
        room = payload
        while batch < len(step.q_spans):
            (first, last), (kv_begin, kv_stop) = step.q_spans[batch], step.kv_spans[batch]
            tiles = step.tiles(batch)
            size = -(-(last - first) // tiles)
            remaining = step.blocks(batch) - block
            q_start = first + tile * size
            q_end = min(q_start + size, last)
            hidden = tiles - 1 - (q_start // step.fold % (last - first) if step.fold > 1 else tile)
            hidden = max(hidden, 0) if step.causal else 0
            kv_start = kv_begin + block * step.granularity
            whole = tail or room >= remaining + OVERHEAD
            if not whole and room <= OVERHEAD:
                break
            taken = remaining if whole else room - OVERHEAD
            kv_end = min(kv_start + taken * step.granularity, kv_stop - hidden)
            left = kv_stop - kv_end
            if whole and (tail or 0 < left < step.max_qlen):
                kv_end = kv_stop - hidden
            if not whole and left < step.max_qlen:
                tail = True
                continue
            at = partial if splits or not whole else -1
            made.works.append(Work(batch, at, q_start, q_end, kv_start, kv_end, kv_stop - kv_end))
            splits += 1
            partial += size if at >= 0 else 0
            if not whole:
                block += taken
                break
            room -= remaining + OVERHEAD
            if splits > 1:
                made.final_map[len(made.reduce_indptr) - 1] = (q_start, q_end)
                made.partial_map += [partial - size * back for back in range(splits, 0, -1)]
            made.reduce_indptr.append(len(made.partial_map))
            block = splits = 0
            tail = False
            tile = 0 if tile == tiles - 1 else tile + 1
            batch += tile == 0
        made.work_indptr.append(len(made.works))
    return made


def folded_spans(lens: list[int], fold: int) -> list[tuple[int, int]]:
    """[start, end) of rows of these lengths, one after the other, each `fold` times."""
    ends = list(accumulate(lens))
    return [(end - length, end) for length, end in zip(lens, ends, strict=True) for _ in range(fold)]
