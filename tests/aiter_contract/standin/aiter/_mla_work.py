"""Carrying out MLA decode's works: the plan read from its buffers and held to the call's rows, attention of each work,
and the sum of what split tiles left."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from aiter import _math
from aiter._mla_plan import Work
from aiter._standin import require

Spans = list[tuple[int, int]]


@dataclass(frozen=True)
class Works:
    """groups: the works of each workgroup that has any, in its order. tiles: the query rows of each split tile, and
    where its parts lie."""

    groups: list[list[Work]]
    tiles: list[tuple[tuple[int, int], list[int]]]


def whole_rows(q_spans: Spans, kv_spans: Spans) -> Works:
    """A workgroup for each row, as without a plan."""
    pairs = enumerate(zip(q_spans, kv_spans, strict=True))
    return Works([[Work(batch, -1, *q, *kv, 0)] for batch, (q, kv) in pairs], [])


def read_plan(buffers: tuple[torch.Tensor, ...], q_spans: Spans, kv_spans: Spans, stamp: int) -> Works:
    """The plan in the six buffers, which must be of exactly these rows, heads and dtypes."""
    pointers, work_indptr, work_info, reduce_indptr, final_map, partial_map = buffers
    owned = pointers.view(torch.int64).tolist() == [work_indptr.data_ptr(), work_info.data_ptr()]
    require(owned, "work_meta_data points at other buffers: get_mla_metadata_v1 was not given these")
    bounds, cuts = work_indptr.tolist(), reduce_indptr.tolist()
    other = "work_info_set holds the plan of another step, or of other heads or dtypes"
    require(bounds[0] == 0 and bounds == sorted(bounds) and bounds[-1] <= len(work_info), other)
    rows = work_info[: bounds[-1]].tolist()
    require(all(row[-1] == stamp for row in rows), other)
    works = [Work(*row[:-1]) for row in rows]
    require(cuts[0] == 0 and cuts == sorted(cuts) and cuts[-1] <= len(partial_map), other)
    tiles = [
        ((int(final_map[tile][0]), int(final_map[tile][1])), partial_map[begin:end].tolist())
        for tile, (begin, end) in enumerate(pairwise(cuts))
        if end > begin
    ]
    require(_covers(works, tiles, q_spans, kv_spans), other)
    return Works([works[begin:end] for begin, end in pairwise(bounds) if end > begin], tiles)


def _covers(works: list[Work], tiles: list[tuple[tuple[int, int], list[int]]], q_spans: Spans, kv_spans: Spans) -> bool:
    """Whether each row's query tokens meet each of the keys they may see once, and parts and sums belong together."""
    parts: dict[tuple[int, int, int], list[Work]] = {}
    for work in works:
        parts.setdefault((work.batch, work.q_start, work.q_end), []).append(work)
    summed = dict(tiles)
    rows = {batch: q_spans[batch][0] for batch in range(len(q_spans))}
    for (batch, q_start, q_end), pieces in sorted(parts.items()):
        if batch >= len(q_spans) or rows[batch] != q_start or q_end > q_spans[batch][1]:
            return False
        rows[batch] = q_end
        at, stop = kv_spans[batch]
        for piece in pieces:
            if piece.kv_start != at or piece.kv_end < at or piece.kv_after != stop - piece.kv_end:
                return False
            at = piece.kv_end
        least = stop - (q_spans[batch][1] - q_end)
        where = [piece.partial for piece in pieces]
        together = where == [-1] if len(pieces) == 1 else where == summed.pop((q_start, q_end), None)
        if not least <= at <= stop or not together:
            return False
    done = all(rows[batch] == end or kv_spans[batch][0] == kv_spans[batch][1] for batch, (_, end) in enumerate(q_spans))
    return done and not summed


def attend(
    works: Works,
    q: torch.Tensor,
    latents: torch.Tensor,
    q_spans: Spans,
    kv_spans: Spans,
    scale: float,
    dim_v: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [rows, H, 576] and latents [keys, 576], float32 -> [rows, H, dim_v] and log-sum-exps [rows, H].

    NaN: rows of no work; and the result of a work without keys, and of all that its workgroup does after it.
    """
    flat = [work for group in works.groups for work in group]
    out, sums = q.new_full((*q.shape[:2], dim_v), float("nan")), q.new_full(q.shape[:2], float("nan"))
    if not flat:
        return out, sums
    table = torch.tensor([work[2:6] for work in flat])
    q_lens, kv_lens = table[:, 1] - table[:, 0], table[:, 3] - table[:, 2]
    queries, keys = (torch.arange(max(int(lens.max()), 1)) for lens in (q_lens, kv_lens))
    at_q = (table[:, :1] + queries).clamp(max=len(q) - 1)
    at_kv = (table[:, 2:3] + keys).clamp(max=max(len(latents) - 1, 0))
    read = latents[at_kv][:, :, None] if len(latents) else q.new_zeros(*at_kv.shape, 1, q.shape[2])
    ends = torch.tensor([kv_spans[work.batch][1] - q_spans[work.batch][1] for work in flat])
    positions = ends[:, None] + table[:, :1] + queries - table[:, 2:3]
    got, lse = _math.attention(q[at_q], read, read[..., :dim_v], positions, kv_lens, scale)
    parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    index = 0
    for group in works.groups:
        spoilt = False
        for work in group:
            spoilt = spoilt or work.kv_start == work.kv_end
            if spoilt:
                got[index], lse[index] = float("nan"), float("nan")
            rows = slice(0, work.q_end - work.q_start)
            if work.partial < 0:
                out[work.q_start : work.q_end], sums[work.q_start : work.q_end] = got[index, rows], lse[index, rows]
            else:
                parts[work.partial] = got[index, rows], lse[index, rows]
            index += 1
    for (start, end), where in works.tiles:
        each, each_lse = (torch.stack(tensors) for tensors in zip(*(parts[at] for at in where), strict=True))
        out[start:end] = (each * each_lse.softmax(0)[..., None]).sum(0)
        sums[start:end] = each_lse.logsumexp(0)
    return out, sums
