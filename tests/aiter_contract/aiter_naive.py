"""Formulas written out to test the stand-in against: paged planes element by flat offset, attention key by key."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch


def key_offset(layout: str, b: int, o: int, h: int, d: int, shape: tuple[int, int, int], x: int) -> int:
    """Where (block, offset in it, head, dim) lies in a dense plane of blocks of (block_size, kv_heads, head_dim)."""
    bs, kh, dim = shape
    base = b * bs * kh * dim
    return {
        "linear": base + o * kh * dim + h * dim + d,
        "hnd": base + h * bs * dim + o * dim + d,
        "packed": base + h * dim * bs + d // x * bs * x + o * x + d % x,
        "v0": base + h * dim * bs + d * bs + o,
        "shuffled": base + h * dim * bs + o // x * dim * x + d * x + o % x,
    }[layout]


def view_shape(layout: str, num_blocks: int, shape: tuple[int, int, int], x: int) -> tuple[int, ...]:
    bs, kh, dim = shape
    return {
        "linear": (num_blocks, bs, kh, dim),
        "hnd": (num_blocks, kh, bs, dim),
        "packed": (num_blocks, kh, dim // x, bs, x),
        "v0": (num_blocks, kh, dim, bs),
        "shuffled": (num_blocks, kh, bs // x, dim, x),
    }[layout]


@cache
def offsets(layout: str, num_blocks: int, shape: tuple[int, int, int], x: int) -> torch.Tensor:
    """Where each element of [num_blocks, *shape], taken in order, lies in a dense plane."""
    block_size, kv_heads, dim = shape
    return torch.tensor(
        [
            key_offset(layout, b, o, h, d, shape, x)
            for b in range(num_blocks)
            for o in range(block_size)
            for h in range(kv_heads)
            for d in range(dim)
        ]
    )


def plane(layout: str, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [num_blocks, block_size, kv_heads, head_dim] laid out."""
    num_blocks, *rest = tokens.shape
    shape, x = (rest[0], rest[1], rest[2]), 16 // tokens.element_size()
    raw = tokens.view(torch.uint8) if x == 16 else tokens
    flat = torch.empty_like(raw).view(-1)
    flat[offsets(layout, num_blocks, shape, x)] = raw.reshape(-1)
    return flat.view(tokens.dtype).view(view_shape(layout, num_blocks, shape, x))


@dataclass(frozen=True)
class Paged:
    """Random sequences in a pool of blocks: what a decode step reads."""

    k: torch.Tensor  # [num_blocks, block_size, kv_heads, head_dim], the last block full of NaN
    v: torch.Tensor
    tables: torch.Tensor  # int32 [S, width], -1 beyond a sequence's blocks
    lens: torch.Tensor  # int32 [S]
    q: torch.Tensor  # [S, heads, head_dim]

    @property
    def scratch(self) -> dict[str, torch.Tensor]:
        s, heads, dim = self.q.shape
        partitions = -(-int(self.lens.max()) // 256)
        return {
            "exp_sums": torch.zeros(s, heads, partitions),
            "max_logits": torch.zeros(s, heads, partitions),
            "tmp_out": torch.zeros(s, heads, partitions, dim, dtype=self.q.dtype),
        }

    def tokens(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence i's keys and values [len, kv_heads, head_dim]."""
        block_size = self.k.shape[1]
        ids = self.tables[i, : -(-int(self.lens[i]) // block_size)].long()
        wide = (t.float()[ids].flatten(0, 1)[: int(self.lens[i])] for t in (self.k, self.v))
        k, v = wide
        return k, v


def paged(
    lens: list[int],
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 128,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    kv_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Paged:
    random = torch.Generator().manual_seed(seed)
    blocks = [-(-n // block_size) for n in lens]
    ids = torch.randperm(sum(blocks), generator=random)
    tables = torch.full((len(lens), max(blocks) + 1), -1, dtype=torch.int32)
    for i, own in enumerate(ids.split(blocks)):
        tables[i, : len(own)] = own
    shape = (sum(blocks) + 1, block_size, kv_heads, dim)
    k, v = (torch.randn(shape, generator=random).to(kv_dtype or dtype) for _ in range(2))
    for t in (k, v):
        t[-1] = float("nan")
    q = torch.randn(len(lens), heads, dim, generator=random).to(dtype)
    return Paged(k, v, tables, torch.tensor(lens, dtype=torch.int32), q)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    softcap: float = 0.0,
    window: int = 0,
    alibi: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    causal: bool = True,
) -> torch.Tensor:
    """q [Q, H, D] the last Q positions of k, v [L, KH, D] -> float64 [Q, H, Dv], one head and query at a time."""
    num_q, heads, _ = q.shape
    length, kv_heads = k.shape[:2]
    out = torch.zeros(num_q, heads, v.shape[2], dtype=torch.float64)
    for i in range(num_q):
        last = length - num_q + i
        first = max(0, last - window + 1) if window else 0
        end = last + 1 if causal else length
        for h in range(heads):
            keys, values = (t[first:end, h * kv_heads // heads].double() for t in (k, v))
            scores = keys @ q[i, h].double() * scale
            scores = softcap * torch.tanh(scores / softcap) if softcap else scores
            if alibi is not None:
                scores = scores + float(alibi[h]) * (torch.arange(first, end) - last)
            weights = torch.exp(scores)
            total = weights.sum() + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
            out[i, h] = weights @ values / total
    return out


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
