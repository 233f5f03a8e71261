"""Rows of awkward lengths in a layer's KV cache, with what float32 attention gives for them: what `self_check` runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from miniserve.attention.formula import attention_by_formula, visible_keys
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows, StepBatch, chunk_rows, decode_rows, table_width
from miniserve.attention.spec import AttentionLayer, AttentionSpec, LatentLayer

# Of rows, own token counted: around a block's and a partition's end, and where the ASM kernel's last tile is partial.
LENGTHS = (240, 241, 248, 255, 256)
Work = list[tuple["CheckRow", tuple[int, int]]]
STALE_NAN, STALE_NOISE = "NaN", "noise"  # what the blocks hold before the rows are written


@dataclass(frozen=True, slots=True)
class CheckRow:
    """A sequence: its blocks, and for each of its tokens the query, key and value (of latent attention: both queries,
    kv_c and k_pe), and what attention gives, float32 [length, width]. in_fp8 [1, width]: what it gives for the last
    token in the arithmetic of a decode kernel that multiplies in fp8, where the layer's does."""

    length: int
    blocks: torch.Tensor
    tokens: tuple[torch.Tensor, ...]
    want: torch.Tensor
    in_fp8: torch.Tensor | None


class Problem:
    """Rows for one layer in its cache: at most `max_seq_len` tokens long, as many of them as the pool has room for.
    stale: STALE_NAN or STALE_NOISE; fp8_products: the decode kernel multiplies in fp8 over an fp8 cache. Work is a list
    of rows, each with those of its tokens, [start, end), that are a step's."""

    def __init__(
        self,
        layout: KVLayout,
        layer: AttentionLayer | LatentLayer,
        cache: KVCache,
        max_seq_len: int,
        stale: str,
        fp8_products: bool,
    ) -> None:
        self.layout, self.layer, self.cache, self.max_seq_len = layout, layer, cache, max_seq_len
        self._fp8_products = fp8_products and layer.spec.kv_dtype.itemsize == 1
        self.block_size, self.device = layout.block_size, cache.key.device
        self.generator = torch.Generator().manual_seed(layer.layer_index)
        lengths = dict.fromkeys((1, self.block_size, self.block_size + 1, *LENGTHS))
        tables = _tables([n for n in lengths if n <= max_seq_len], self.block_size, cache.key.shape[0])
        self.used = torch.tensor([block for table in tables.values() for block in table], device=self.device)
        if stale == STALE_NAN:
            self._fill(math.nan)
        else:
            self._scribble()
        self.rows = [self._row(length, blocks) for length, blocks in tables.items()]

    def clear(self) -> None:
        """Zero the blocks."""
        self._fill(0.0)

    def _fill(self, value: float) -> None:
        for plane in (self.cache.key, self.cache.value):
            if plane.dtype.itemsize > 1:
                plane.index_fill_(0, self.used, value)
            else:
                code = torch.tensor([value]).to(plane.dtype).view(torch.uint8)
                plane.view(torch.uint8).index_fill_(0, self.used, int(code))

    def tokens(self, work: Work, padded: bool = False) -> list[torch.Tensor]:
        """The step's inputs: as `CheckRow.tokens`, of all of work; padded: with a row more."""
        padding = [[torch.zeros_like(tokens[:1])] if padded else [] for tokens in self.rows[0].tokens]
        return [
            torch.cat([row.tokens[index][start:end] for row, (start, end) in work] + more)
            for index, more in enumerate(padding)
        ]

    def decode_batch(self, work: Work, padded: bool = False) -> StepBatch:
        """A token a row, which the first of equal rows writes; padded: as a step captured in a graph has it, and with a
        row of padding."""
        lens = [row.length for row, _ in work] + [0] * padded
        slots: dict[int, int] = {}  # by place in the step
        for place, (row, _) in enumerate(work):
            slot = int(row.blocks[-1]) * self.block_size + (row.length - 1) % self.block_size
            slots[place] = -1 if slot in slots.values() else slot
        longest = self.max_seq_len if padded else max(lens)
        tables = self._table([row for row, _ in work], len(lens), longest)
        host = None if padded else np.array(lens, dtype=np.int64)
        decode = decode_rows(tables, self._tensor(lens, torch.int32), longest, host)
        return StepBatch(self._tensor([*slots.values()] + [-1] * padded, torch.int64), decode)

    def chunk_batch(self, work: Work) -> StepBatch:
        """Chunks, those with context first."""
        slots = [
            int(row.blocks[token // self.block_size]) * self.block_size + token % self.block_size
            for row, (start, end) in work
            for token in range(start, end)
        ]
        groups, at = [], 0
        for group in ([item for item in work if item[1][0]], [item for item in work if not item[1][0]]):
            groups.append(self._chunks(group, at) if group else None)
            at += sum(end - start for _, (start, end) in group)
        return StepBatch(self._tensor(slots, torch.int64), None, *groups)

    def _chunks(self, group: Work, query_start: int) -> QueryRows:
        lens = [end - start for _, (start, end) in group]
        return chunk_rows(
            query_start,
            tuple(lens),
            tuple(start for _, (start, _) in group),
            self._tensor([0, *np.cumsum(lens).tolist()], torch.int32),
            self._tensor([end for _, (_, end) in group], torch.int32),
            self._table([row for row, _ in group], len(group), max(end for _, (_, end) in group)),
        )

    def _table(self, rows: list[CheckRow], height: int, longest: int) -> torch.Tensor:
        width = table_width(longest, self.block_size)
        table = torch.zeros(height, width, dtype=torch.int32)
        for index, row in enumerate(rows):
            table[index, : len(row.blocks)] = row.blocks[:width]
        return table.to(self.device)

    def _tensor(self, values: list[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def _scribble(self) -> None:
        """Fill the blocks with noise."""
        slots = (self.used[:, None] * self.block_size + torch.arange(self.block_size, device=self.device)).flatten()
        k, v = (3 * tensor for tensor in self._written(len(slots)))
        self.layout.write(self.cache, k, v, slots)

    def _row(self, length: int, blocks: list[int]) -> CheckRow:
        spec = self.layer.spec
        written = self._written(length)
        if (dims := spec.latent) is not None:
            q = self._draw(length, spec.num_heads, dims.nope_dim + dims.rope_dim)
            tokens: tuple[torch.Tensor, ...] = (*q.split((dims.nope_dim, dims.rope_dim), dim=-1), *written)
            k_nope, v = cast(LatentLayer, self.layer).expand(written[0])
            k = torch.cat([k_nope, written[1][:, None].expand(-1, spec.num_heads, -1)], dim=-1)
            want, in_fp8 = reference_attention(spec, q, k, v, None), None
        else:
            q = self._draw(length, spec.num_heads, spec.head_dim)
            tokens, sinks = (q, *written), cast(AttentionLayer, self.layer).sinks
            want = reference_attention(spec, q, *written, sinks)
            in_fp8 = reference_attention(spec, q, *written, sinks, in_fp8=True) if self._fp8_products else None
        return CheckRow(length, torch.tensor(blocks), tokens, want, in_fp8)

    def _written(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer writes for `count` tokens. For an fp8 cache: values that it holds exactly."""
        spec = self.layer.spec
        if (dims := spec.latent) is not None:
            shapes = ((count, dims.kv_lora_rank), (count, dims.rope_dim))
            scales = (cast(LatentLayer, self.layer).kv_scale,) * 2
        else:
            shapes = ((count, spec.num_kv_heads, spec.head_dim),) * 2  # type: ignore[assignment]
            scales = (cast(AttentionLayer, self.layer).k_scale, cast(AttentionLayer, self.layer).v_scale)
        drawn = [self._draw(*shape) for shape in shapes]
        if spec.kv_dtype.itemsize > 1:
            return drawn[0], drawn[1]
        k, v = (
            (tensor.to(spec.kv_dtype).float() * scale).to(spec.dtype)
            for tensor, scale in zip(drawn, scales, strict=True)
        )
        return k, v

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.layer.spec.dtype).to(self.device)


def reference_attention(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *,
    in_fp8: bool = False,
) -> torch.Tensor:
    """Causal attention in float32. q [L, H, D], k [L, KH, D], v [L, KH, Dv] -> [L, H * Dv]. in_fp8: that of the last
    token alone, in the arithmetic of kernels that multiply in fp8."""
    position = torch.arange(len(q), device=q.device)
    first, fp8 = (len(q) - 1, spec.kv_dtype) if in_fp8 else (0, None)
    visible = visible_keys(position[first:, None] - position, spec.sliding_window)
    return attention_by_formula(
        q[first:], k, v, visible, scale=spec.scale, softcap=spec.softcap, sinks=sinks, fp8=fp8
    ).flatten(1)


def _tables(lengths: list[int], block_size: int, num_blocks: int) -> dict[int, list[int]]:
    """Each length's blocks, taken by turns from the pool's two ends; lengths that do not fit are left out, the longest
    first."""
    tables: dict[int, list[int]] = {}
    free = list(range(num_blocks)) if num_blocks < 4096 else [*range(2048), *range(num_blocks - 2048, num_blocks)]
    for length in lengths:
        need = -(-length // block_size)
        if need <= len(free):
            tables[length] = [free.pop(-1 if index % 2 == 0 else 0) for index in range(need)]
    return tables
