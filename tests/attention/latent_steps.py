"""Random steps of latent attention over a paged cache, with what the formula in float64 gives for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from attention_reference import relative_error
from attention_steps import Case, padded_batch, rounded, step_batch, with_padding
from hypothesis import strategies as st

from miniserve.attention.backends.base import Backend
from miniserve.attention.layouts import KVCache, LatentLayout
from miniserve.attention.metadata import StepBatch
from miniserve.attention.spec import AttentionSpec, LatentDims

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class LatentTestLayer:
    """A `LatentLayer` for tests. key [H, nope_dim, kv_lora_rank], value [H, v_head_dim, kv_lora_rank]."""

    spec: AttentionSpec
    key: torch.Tensor
    value: torch.Tensor
    kv_scale: torch.Tensor = field(default_factory=lambda: torch.ones(1))
    layer_index: int = 0

    def absorb(self, q_nope: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thn,hnc->thc", q_nope, self.key)

    def expand(self, kv_c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.einsum("tc,hnc->thn", kv_c, self.key), torch.einsum("tc,hvc->thv", kv_c, self.value)

    def project_out(self, latent_out: torch.Tensor) -> torch.Tensor:
        return torch.einsum("thc,hvc->thv", latent_out, self.value).flatten(1)

    def attend_one(self, q: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """q [H, nope_dim + rope_dim] at the last of latents [L, kv_lora_rank + rope_dim] -> float64 [H * v_dim]."""
        rank = self.key.shape[-1]
        kv_c, k_pe = latents.double()[:, :rank], latents.double()[:, rank:]
        k = torch.einsum("lc,hnc->lhn", kv_c, self.key.double())
        v = torch.einsum("lc,hvc->lhv", kv_c, self.value.double())
        k = torch.cat([k, k_pe[:, None].expand(-1, k.shape[1], -1)], dim=-1)
        weights = (torch.einsum("hd,lhd->hl", q.double(), k) * self.spec.scale).softmax(-1)
        return torch.einsum("hl,lhv->hv", weights, v).flatten()


@st.composite
def latent_cases(draw: st.DrawFn) -> Case:
    """A layer, a block size, and rows as (tokens in the cache, new tokens): decode rows first, then extends."""
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    rank, rope = draw(st.sampled_from([16, 40, 64])), draw(st.sampled_from([4, 16]))
    spec = AttentionSpec(
        num_heads=draw(st.sampled_from([1, 3, 16])),
        num_kv_heads=1,
        head_dim=rank + rope,
        scale=draw(st.sampled_from([0.125, 0.3])),
        dtype=dtype,
        kv_dtype=dtype,
        latent=LatentDims(rank, rope, draw(st.sampled_from([8, 24])), draw(st.sampled_from([8, 20]))),
    )
    block_size = draw(st.sampled_from([1, 8, 16]))
    boundaries = [0, 1, 7, 8, 15, 16, 17, 48, 50]
    decodes = [(draw(st.sampled_from(boundaries)), 1) for _ in range(draw(st.integers(0, 4)))]
    chunks = [
        (draw(st.sampled_from(boundaries)), draw(st.sampled_from([1, 2, 16, 37])))
        for _ in range(draw(st.integers(0 if decodes else 1, 4)))
    ]
    return spec, block_size, [*decodes, *sorted(chunks, key=lambda chunk: not chunk[0])], len(decodes)


@dataclass(frozen=True)
class LatentStep:
    """One step of one layer; want float64 [num_tokens, num_heads * v_head_dim], of the tokens that are not padding."""

    layer: LatentTestLayer
    layout: LatentLayout
    cache: KVCache
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    batch: StepBatch
    want: torch.Tensor

    def run(self, backend: Backend[Any]) -> torch.Tensor:
        return backend.attend_latent(self.layer, self.inputs, self.cache, backend.build(self.batch))

    def check(self, backend: Backend[Any], tolerance: float | None = None) -> None:
        out = self.run(backend)
        assert out.shape == (len(self.inputs[0]), self.want.shape[1])
        assert out.dtype == self.layer.spec.dtype
        assert relative_error(out[: len(self.want)], self.want) < (tolerance or TOLERANCE[self.layer.spec.dtype])

    def padded(self, count: int = 2) -> LatentStep:
        """As `Step.padded`."""
        q_nope, q_pe, kv_c, k_pe = (with_padding(tensor, count) for tensor in self.inputs)
        return replace(self, inputs=(q_nope, q_pe, kv_c, k_pe), batch=padded_batch(self.batch, count))


def make_latent_step(case: Case, seed: int, kv_scale: float = 1.0) -> LatentStep:
    """A cache that holds the rows' contexts, and their new tokens. kv_scale: of an fp8 cache, whose rounding `want` has
    in what it reads from the cache: all of a decode row, a chunk's context."""
    spec, block_size, rows, num_decodes = case
    dims = spec.latent
    assert dims is not None
    generator = torch.Generator().manual_seed(seed)

    def draw_tensor(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(spec.dtype)

    weights = (
        draw_tensor(spec.num_heads, size, dims.kv_lora_rank, scale=dims.kv_lora_rank**-0.5)
        for size in (dims.nope_dim, dims.v_head_dim)
    )
    layer = LatentTestLayer(spec, *weights, torch.tensor([kv_scale]))
    layout = LatentLayout(block_size)
    width = max(-(-(cached + new) // block_size) for cached, new in rows)
    num_blocks = len(rows) * width + 2
    tables = torch.randperm(num_blocks, generator=generator)[: len(rows) * width].view(len(rows), width)
    cache = layout.allocate(spec, num_blocks, torch.device("cpu"))
    latents = [draw_tensor(cached + new, spec.head_dim) for cached, new in rows]
    parts = (dims.kv_lora_rank, dims.rope_dim)

    def slots(row: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return tables[row][positions // block_size] * block_size + positions % block_size

    for row, (cached, _) in enumerate(rows):
        kv_c, k_pe = latents[row][:cached].split(parts, dim=-1)
        layout.write(cache, kv_c, k_pe, slots(row, 0, cached), layer.kv_scale, layer.kv_scale)
    kv_c, k_pe = torch.cat([latents[row][cached:] for row, (cached, _) in enumerate(rows)]).split(parts, dim=-1)
    q = draw_tensor(len(kv_c), spec.num_heads, dims.nope_dim + dims.rope_dim)
    mapping = torch.cat([slots(row, cached, cached + new) for row, (cached, new) in enumerate(rows)])
    if spec.kv_dtype.itemsize == 1:
        for row, (cached, _) in enumerate(rows):
            read = slice(0, None if row < num_decodes else cached)
            latents[row][read] = rounded(latents[row][read], spec.kv_dtype, kv_scale).to(spec.dtype)
    ends = ((row, end) for row, (cached, new) in enumerate(rows) for end in range(cached + 1, cached + new + 1))
    want = [layer.attend_one(q[index], latents[row][:end]) for index, (row, end) in enumerate(ends)]
    batch = step_batch(rows, num_decodes, tables, mapping)
    q_nope, q_pe = q.split((dims.nope_dim, dims.rope_dim), dim=-1)
    return LatentStep(layer, layout, cache, (q_nope, q_pe, kv_c, k_pe), batch, torch.stack(want))
