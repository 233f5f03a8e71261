"""Rows of awkward lengths in a layer's KV cache, with what float32 attention gives for them: what `self_check` runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch.nn import functional

from miniserve.attention.formula import attention_by_formula, visible_keys
from miniserve.attention.layouts import KVCache, KVLayout, decoded
from miniserve.attention.metadata import StepBatch, decode_rows
from miniserve.attention.spec import AttentionLayer, AttentionSpec, LatentLayer
from miniserve.core import Chunk, DraftRun, StepPlan
from miniserve.runner.state import StepState

# Of rows, own token counted: around a block's and a partition's end, and where the ASM kernel's last tile is partial.
LENGTHS = (240, 241, 248, 255, 256)
STALE_NAN, STALE_NOISE = "NaN", "noise"  # what the blocks hold before the rows are written


def token_shapes(spec: AttentionSpec) -> tuple[tuple[int, ...], ...]:
    """What a layer gives attention for each token: its queries, then the two that are written to the cache."""
    if (dims := spec.latent) is not None:
        heads = spec.num_heads
        return (heads, dims.nope_dim), (heads, dims.rope_dim), (dims.kv_lora_rank,), (dims.rope_dim,)
    kv = (spec.num_kv_heads, spec.head_dim)
    return (spec.num_heads, spec.head_dim), kv, kv


@dataclass(frozen=True, slots=True)
class CheckRow:
    """A sequence: its row of the step's state, its tokens (see `token_shapes`), and what attention gives for each,
    float32 [length, width]. in_fp8 [1, width]: what it gives for the last token in the arithmetic of a decode kernel
    that multiplies in fp8, where the layer's does."""

    index: int
    length: int
    tokens: tuple[torch.Tensor, ...]
    want: torch.Tensor
    in_fp8: torch.Tensor | None


class CheckStep(NamedTuple):
    """A step over some rows, each with those of its tokens, [start, end), that are new. decodes: one a row, not chunks;
    padded: with a row of padding, as a graph would run it."""

    name: str
    work: list[tuple[CheckRow, tuple[int, int]]]
    decodes: bool = False
    padded: bool = False


class Problem:
    """Rows for one layer in its cache: at most `max_seq_len` tokens long, as many of them as the pool has room for.
    stale: STALE_NAN or STALE_NOISE; fp8_products: the decode kernel multiplies in fp8 over an fp8 cache."""

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
        self._fp8_products = fp8_products and layer.spec.fp8_kv
        self.block_size, self.device = layout.block_size, cache.key.device
        self.generator = torch.Generator().manual_seed(layer.layer_index)
        lengths = dict.fromkeys((1, self.block_size, self.block_size + 1, *LENGTHS))
        tables = _tables([n for n in lengths if n <= max_seq_len], self.block_size, cache.key.shape[0])
        self._state = StepState(len(tables), max_seq_len, self.block_size, self.device)
        self._new_blocks = [(index, 0, table) for index, table in enumerate(tables.values())]
        self.used = torch.tensor([block for table in tables.values() for block in table], device=self.device)
        if stale == STALE_NAN:
            self._fill(math.nan)
        else:
            self._scribble()
        self.rows = [self._row(index, length) for index, length in enumerate(tables)]

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

    def tokens(self, step: CheckStep) -> tuple[torch.Tensor, ...]:
        """The step's inputs: as `CheckRow.tokens`, of all its rows."""
        padding = [[torch.zeros_like(tokens[:1])] * step.padded for tokens in self.rows[0].tokens]
        return tuple(
            torch.cat([row.tokens[index][start:end] for row, (start, end) in step.work] + more)
            for index, more in enumerate(padding)
        )

    def batch(self, step: CheckStep) -> StepBatch:
        """As the runner lays it out for a model; ids of tokens are of no account. Of equal decode rows the first
        writes."""
        spans = [(row.index, start, [0] * (end - start)) for row, (start, end) in step.work]
        runs = [DraftRun(*span) for span in spans] if step.decodes else []
        chunks = [] if step.decodes else [Chunk(*span, samples=False) for span in spans]
        plan = StepPlan([], [], self._new_blocks, [], chunks, runs)
        batch = self._state.prepare(plan, last_tokens=self.used).batch
        if batch.decode is None:
            return batch
        places = [place for place, *_ in spans]
        again = torch.tensor([place in places[:at] for at, place in enumerate(places)], device=self.device)
        slots = batch.slot_mapping.masked_fill(again, -1)
        if not step.padded:
            return replace(batch, slot_mapping=slots)
        tables = self._state.tables[torch.tensor([*places, 0], device=self.device)]
        decode = decode_rows(tables, functional.pad(batch.decode.seq_lens, (0, 1)), self.max_seq_len)
        return StepBatch(functional.pad(slots, (0, 1), value=-1), decode)

    def _scribble(self) -> None:
        """Fill the blocks with noise."""
        slots = (self.used[:, None] * self.block_size + torch.arange(self.block_size, device=self.device)).flatten()
        k, v = (3 * tensor for tensor in self._written(len(slots)))
        self.layout.write(self.cache, k, v, slots)

    def _row(self, index: int, length: int) -> CheckRow:
        spec, sinks = self.layer.spec, None
        queries = [self._draw(length, *shape) for shape in token_shapes(spec)[:-2]]
        written = k, v = self._written(length)
        if spec.latent is not None:
            k_nope, v = cast(LatentLayer, self.layer).expand(k)
            k = torch.cat([k_nope, written[1][:, None].expand(-1, spec.num_heads, -1)], dim=-1)
        else:
            sinks = cast(AttentionLayer, self.layer).sinks
        q = torch.cat(queries, dim=-1)
        want = reference_attention(spec, q, k, v, sinks)
        in_fp8 = reference_attention(spec, q, k, v, sinks, in_fp8=True) if self._fp8_products else None
        return CheckRow(index, length, (*queries, *written), want, in_fp8)

    def _written(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer writes for `count` tokens. For an fp8 cache: values that it holds exactly."""
        spec = self.layer.spec
        k, v = (self._draw(count, *shape) for shape in token_shapes(spec)[-2:])
        if not spec.fp8_kv:
            return k, v
        if spec.latent is not None:
            k_scale = v_scale = cast(LatentLayer, self.layer).kv_scale
        else:
            k_scale, v_scale = cast(AttentionLayer, self.layer).k_scale, cast(AttentionLayer, self.layer).v_scale
        codes = k.to(spec.kv_dtype), v.to(spec.kv_dtype)
        return decoded(codes, spec.dtype, k_scale, v_scale)

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
