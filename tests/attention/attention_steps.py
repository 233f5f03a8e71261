"""Random steps over a paged cache, with what attention in float64 gives for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from attention_reference import Layer, attend_one, relative_error
from hypothesis import strategies as st

from miniserve.attention.backends.base import Backend
from miniserve.attention.layouts import LAYOUTS, KVCache, KVLayout
from miniserve.attention.metadata import QueryRows, StepBatch, chunk_rows, decode_rows
from miniserve.attention.spec import AttentionSpec, QKRope
from miniserve.models.layers.ops import qk_norm_rope

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
Case = tuple[AttentionSpec, int, list[tuple[int, int]], int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A layer, a block size, and rows as (tokens in the cache, new tokens): decode rows first."""
    kv_heads = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    spec = AttentionSpec(
        num_heads=kv_heads * draw(st.sampled_from([1, 2, 5])),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([16, 40, 64, 80, 128])),
        scale=draw(st.sampled_from([0.125, 0.3])),
        dtype=dtype,
        kv_dtype=dtype,
        sliding_window=draw(st.sampled_from([None, None, 1, 7, 33])),
        softcap=draw(st.sampled_from([None, None, 5.0])),
        sinks=draw(st.booleans()),
    )
    block_size = draw(st.sampled_from([8, 16]))
    boundaries = [0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size, 50]
    decodes = [(draw(st.sampled_from(boundaries)), 1) for _ in range(draw(st.integers(0, 4)))]
    chunks = [
        (draw(st.sampled_from(boundaries)), draw(st.sampled_from([1, 2, block_size, 37])))
        for _ in range(draw(st.integers(0 if decodes else 1, 2)))
    ]
    return spec, block_size, [*decodes, *sorted(chunks, key=lambda chunk: not chunk[0])], len(decodes)


@dataclass(frozen=True)
class Step:
    """One step of one layer. q, k, v: of its new tokens; qkv, rope: what they are made of; want float64 [num_tokens,
    num_heads * head_dim], of the tokens that are not padding."""

    layer: Layer
    layout: KVLayout
    cache: KVCache
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    qkv: torch.Tensor
    rope: QKRope
    batch: StepBatch
    want: torch.Tensor

    def run(self, backend: Backend[Any]) -> torch.Tensor:
        return self.attend(backend, backend.build(self.batch))

    def attend(self, backend: Backend[Any], meta: object) -> torch.Tensor:
        """As a model calls it."""
        if backend.fuses_rope:
            return backend.attend_qkv(self.layer, self.qkv, self.rope, self.cache, meta)
        return backend.attend(self.layer, (self.q, self.k, self.v), self.cache, meta)

    def check(self, backend: Backend[Any], tolerance: float | None = None) -> None:
        out = self.run(backend)
        assert out.shape == (len(self.q), self.want.shape[1])
        assert out.dtype == self.layer.spec.dtype
        error = relative_error(out[: len(self.want)], self.want)
        assert error < (tolerance or TOLERANCE[self.layer.spec.dtype])

    def padded(self, count: int = 2) -> Step:
        """This step of decode rows alone as a graph runs it: with rows of padding, whose tokens are NaN."""
        q, k, v, qkv, cos_sin = (
            with_padding(tensor, count) for tensor in (self.q, self.k, self.v, self.qkv, self.rope.cos_sin)
        )
        batch, rope = padded_batch(self.batch, count), replace(self.rope, cos_sin=cos_sin)
        return replace(self, q=q, k=k, v=v, qkv=qkv, rope=rope, batch=batch)


def make_step(case: Case, layout_name: str, seed: int, scales: tuple[float, float] = (1.0, 1.0)) -> Step:
    """A cache that holds the rows' contexts, and their new tokens. scales: of an fp8 cache, whose rounding `want` has
    in every key and value."""
    spec, block_size, rows, num_decodes = case
    generator = torch.Generator().manual_seed(seed)

    def draw_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(spec.dtype)

    layout = LAYOUTS[layout_name](block_size)
    width = max(-(-(cached + new) // block_size) for cached, new in rows)
    num_blocks = len(rows) * width + 2
    tables = torch.randperm(num_blocks, generator=generator)[: len(rows) * width].view(len(rows), width)
    tables[0, 0] = num_blocks - 1 if not (tables == num_blocks - 1).any() else tables[0, 0]  # the highest id takes part
    cache = layout.allocate(spec, num_blocks, torch.device("cpu"))
    sinks = torch.randn(spec.num_heads, generator=generator) if spec.sinks else None
    k_scale, v_scale = (torch.tensor([scale]) for scale in scales)
    layer = Layer(spec, sinks, 0, k_scale, v_scale)
    keys = [draw_tensor(cached + new, spec.num_kv_heads, spec.head_dim) for cached, new in rows]
    values = [draw_tensor(cached + new, spec.num_kv_heads, spec.head_dim) for cached, new in rows]

    def slots(row: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return tables[row][positions // block_size] * block_size + positions % block_size

    for row, (cached, _) in enumerate(rows):
        layout.write(cache, keys[row][:cached], values[row][:cached], slots(row, 0, cached), k_scale, v_scale)
    raw_k = torch.cat([keys[row][cached:] for row, (cached, _) in enumerate(rows)])
    new_v = torch.cat([values[row][cached:] for row, (cached, _) in enumerate(rows)])
    qkv = torch.cat([draw_tensor(len(raw_k), spec.num_heads, spec.head_dim), raw_k, new_v], dim=1)
    angles = 9 * torch.randn(len(qkv), spec.head_dim // 2, generator=generator)
    weights = (draw_tensor(spec.head_dim), draw_tensor(spec.head_dim)) if spec.qk_norm else (None, None)
    rope = QKRope(torch.cat([angles.cos(), angles.sin()], dim=1), *weights, 1e-6)
    # As in a fused qkv: q, k and v are strided views of one tensor.
    heads = (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)
    q, new_k, new_v = qkv.split(heads, dim=1)
    q, new_k, new_v = torch.cat([*qk_norm_rope(q, new_k, rope), new_v], 1).split(heads, 1)
    ends = np.cumsum([new for _, new in rows])
    keys = [
        torch.cat([key[:cached], new_k[end - new : end]])
        for key, (cached, new), end in zip(keys, rows, ends, strict=True)
    ]
    mapping = torch.cat([slots(row, cached, cached + new) for row, (cached, new) in enumerate(rows)])
    if spec.kv_dtype.itemsize == 1:
        keys = [rounded(key, spec.kv_dtype, scales[0]) for key in keys]
        values = [rounded(value, spec.kv_dtype, scales[1]) for value in values]
    lengths = ((row, end) for row, (cached, new) in enumerate(rows) for end in range(cached + 1, cached + new + 1))
    want = [
        attend_one(layer, q[index], keys[row][:end], values[row][:end]).flatten()
        for index, (row, end) in enumerate(lengths)
    ]
    batch = step_batch(rows, num_decodes, tables, mapping)
    return Step(layer, layout, cache, q, new_k, new_v, qkv.flatten(1), rope, batch, torch.stack(want))


def with_padding(tokens: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([tokens, tokens.new_full((count, *tokens.shape[1:]), float("nan"))])


def padded_batch(batch: StepBatch, count: int) -> StepBatch:
    """Rows of length 0 and slot -1 behind the others, with some row's blocks; the host knows no lengths."""
    decode = batch.decode
    assert decode is not None
    assert not batch.chunks
    tables = torch.cat([decode.block_tables, decode.block_tables[:1].expand(count, -1)])
    lens = torch.cat([decode.seq_lens, decode.seq_lens.new_zeros(count)])
    slots = torch.cat([batch.slot_mapping, batch.slot_mapping.new_full((count,), -1)])
    return StepBatch(slots, decode_rows(tables, lens, decode.max_seq_len, None))


def rounded(values: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    limit = torch.finfo(dtype).max
    return (values.float() / scale).clamp(-limit, limit).to(dtype).float() * scale


def step_batch(
    rows: list[tuple[int, int]], num_decodes: int, tables: torch.Tensor, slot_mapping: torch.Tensor
) -> StepBatch:
    """Rows as (cached, new): decode rows, then those with context, then those without."""
    decode, tables = None, tables.int()
    if num_decodes:
        lens = torch.tensor([cached + 1 for cached, _ in rows[:num_decodes]], dtype=torch.int32)
        decode = decode_rows(tables[:num_decodes], lens, int(lens.max()), lens.long().numpy())
    first_prefill = next((i for i, (cached, _) in enumerate(rows) if not cached and i >= num_decodes), len(rows))
    return StepBatch(
        slot_mapping,
        decode,
        group_of(rows[num_decodes:first_prefill], tables[num_decodes:first_prefill], num_decodes),
        group_of(rows[first_prefill:], tables[first_prefill:], sum(new for _, new in rows[:first_prefill])),
    )


def group_of(rows: list[tuple[int, int]], tables: torch.Tensor, query_start: int) -> QueryRows | None:
    if not rows:
        return None
    new = torch.tensor([new for _, new in rows])
    cached = torch.tensor([cached for cached, _ in rows])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int()
    return chunk_rows(
        query_start, tuple(new.tolist()), tuple(cached.tolist()), starts, (cached + new).int(), tables.contiguous()
    )
