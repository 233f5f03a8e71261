"""Reading blocks by layout, and attention in float32. Index formulas: see each reader (offsets in a dense plane)."""

from __future__ import annotations

import torch


def take(plane: torch.Tensor, block_ids: torch.Tensor) -> torch.Tensor:
    """plane[block_ids] in float32; through bytes where the CPU cannot index the dtype."""
    narrow = plane.element_size() == 1
    found = (plane.view(torch.uint8) if narrow else plane)[block_ids.long().clamp(0, plane.shape[0] - 1)]
    return (found.view(plane.dtype) if narrow else found).float()


def wrapped(ids: torch.Tensor, num_bytes: int) -> torch.Tensor:
    """What blocks (or tokens) of so many bytes are read in place of `ids` where the offset has 32 bits."""
    return ids.long() * num_bytes % 2**32 // num_bytes


def linear(plane: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[NB, BS, KH, D] at ids [S, n] -> [S, n*BS, KH, D]. Offset b*BS*KH*D + o*KH*D + h*D + d."""
    return take(plane, ids).flatten(1, 2)


def packed_key(plane: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[NB, KH, D/x, BS, x] -> [S, n*BS, KH, D]. Offset b*KH*D*BS + h*D*BS + (d//x)*BS*x + o*x + d%x."""
    return take(plane, ids).permute(0, 1, 4, 2, 3, 5).flatten(4).flatten(1, 2)


def packed_value(plane: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """5-D (shuffled) [NB, KH, BS/x, D, x]: b*KH*D*BS + h*D*BS + (o//x)*D*x + d*x + o%x; 4-D (v0) [NB, KH, D, BS]:
    b*KH*D*BS + h*D*BS + d*BS + o. -> [S, n*BS, KH, D]."""
    if plane.dim() == 4:
        return take(plane, ids).permute(0, 1, 4, 2, 3).flatten(1, 2)
    return take(plane, ids).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    lens: torch.Tensor,
    scale: float,
    *,
    window: int = 0,
    softcap: float = 0.0,
    alibi: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    right: int | None = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [S, Q, H, D], k [S, L, KH, D], v [S, L, KH, Dv] -> float32 [S, Q, H, Dv] and the natural log-sum-exp [S, Q, H].

    A query at positions[s, i] sees keys j < lens[s] with position - window < j (window 0: all) and j <= position +
    right (right None: all). counts [S, L]: how often a key is counted, in place of lens. A row that sees nothing is 0
    with a log-sum-exp of -inf. Softcap comes before alibi, as in the HIP kernels; sinks only join the sum.
    """
    s, num_q, heads, _ = q.shape
    length, kv_heads = k.shape[1:3]
    j = torch.arange(length)
    seen = (j < lens[:, None])[:, None].expand(s, num_q, length)
    if right is not None:
        seen = seen & (j <= positions[..., None] + right)
    if window > 0:
        seen = seen & (j > positions[..., None] - window)
    if counts is not None:
        seen = (counts > 0)[:, None].expand(s, num_q, length)
    grouped = q.float().view(s, num_q, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("sqkgd,slkd->skgql", grouped, k) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi is not None:
        scores += alibi.float().view(1, kv_heads, -1, 1, 1) * (j - positions[..., None])[:, None, None]
    if counts is not None:
        scores += counts.float().log()[:, None, None, None]
    scores = scores.masked_fill(~seen[:, None, None], float("-inf"))
    top = scores.amax(-1) if length else scores.new_full(scores.shape[:-1], float("-inf"))
    sink = None if sinks is None else sinks.float().view(1, kv_heads, -1, 1)
    top = top if sink is None else torch.maximum(top, sink)
    weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0)[..., None])
    total = weights.sum(-1) + (0.0 if sink is None else torch.exp(sink - top))
    v = v.masked_fill(~seen.any(1)[..., None, None], 0.0)  # a masked slot may hold anything, NaN too
    out = torch.einsum("skgql,slkd->sqkgd", weights / total.masked_fill(total == 0, 1.0)[..., None], v)
    lse = (top + total.log()).permute(0, 3, 1, 2)
    return out.flatten(2, 3), lse.flatten(2, 3)


def poison(*tensors: torch.Tensor | None) -> None:
    """Fill with NaN, integers and bytes with 0xFF (a NaN in every float that may be read from them)."""
    for t in tensors:
        if t is not None:
            t.fill_(float("nan") if t.is_floating_point() else -1 if t.dtype != torch.uint8 else 255)
