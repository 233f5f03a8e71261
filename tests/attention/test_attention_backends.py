"""Every backend, layout and dtype against attention in float64, on steps that mix decode, extend and prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_reference import Layer, attend_one, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.cpu_attn import CpuBackend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.paged_kernels import torch_kernels
from miniserve.attention.backends.torch_attn import DecodeMetadata, TorchBackend
from miniserve.attention.backends.triton_attn import TritonBackend
from miniserve.attention.layouts import LAYOUTS, KVLayout
from miniserve.attention.metadata import ChunkRows, DecodeRows, StepBatch
from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionSpec
from miniserve.kernels import native

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"C++ kernels: {native.unavailable_reason()}"
)


def make_backend(name: str, layout: KVLayout, spec: AttentionSpec) -> Backend[Any]:
    if name == "TRITON_ATTN":
        options = BackendOptions(
            specs=(spec,),
            routes=(),
            platform=Platform("gfx942", 304, emulated=True),
            device=torch.device("cpu"),
            max_rows=8,
            max_seq_len=256,
        )
        return TritonBackend(layout, torch_kernels(), options)
    return CpuBackend(layout, native.load()) if name == "CPU_ATTN" else TorchBackend(layout)


@st.composite
def cases(draw: st.DrawFn) -> tuple[AttentionSpec, int, list[tuple[int, int]], int]:
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


def check(name: str, case: tuple[AttentionSpec, int, list[tuple[int, int]], int], layout_name: str, seed: int) -> None:
    spec, block_size, rows, num_decodes = case
    if LAYOUTS[layout_name].refusal(spec, block_size):
        return
    generator = torch.Generator().manual_seed(seed)

    def draw_tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(spec.dtype)

    layout = LAYOUTS[layout_name](block_size)
    width = max(-(-(cached + new) // block_size) for cached, new in rows)
    num_blocks = len(rows) * width + 2
    tables = torch.randperm(num_blocks, generator=generator)[: len(rows) * width].view(len(rows), width)
    tables[0, 0] = num_blocks - 1 if not (tables == num_blocks - 1).any() else tables[0, 0]  # the highest id takes part
    cache = layout.allocate(spec, num_blocks, torch.device("cpu"))
    layer = Layer(spec, torch.randn(spec.num_heads, generator=generator) if spec.sinks else None)
    keys = [draw_tensor(cached + new, spec.num_kv_heads, spec.head_dim) for cached, new in rows]
    values = [draw_tensor(cached + new, spec.num_kv_heads, spec.head_dim) for cached, new in rows]

    def slots(row: int, start: int, end: int) -> torch.Tensor:
        positions = torch.arange(start, end)
        return tables[row][positions // block_size] * block_size + positions % block_size

    for row, (cached, _) in enumerate(rows):
        layout.write(cache, keys[row][:cached], values[row][:cached], slots(row, 0, cached))
    new_k = torch.cat([keys[row][cached:] for row, (cached, _) in enumerate(rows)])
    new_v = torch.cat([values[row][cached:] for row, (cached, _) in enumerate(rows)])
    # As in a fused qkv: q, k and v are strided views of one tensor.
    q = draw_tensor(len(new_k), spec.num_heads, spec.head_dim)
    fused = torch.cat([q, new_k, new_v], dim=1)
    q, new_k, new_v = fused.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    mapping = torch.cat([slots(row, cached, cached + new) for row, (cached, new) in enumerate(rows)])
    backend = make_backend(name, layout, spec)
    out = backend.attend(layer, q, new_k, new_v, cache, backend.build(step_batch(rows, num_decodes, tables, mapping)))
    want = torch.cat(
        [
            attend_one(layer, q[index], keys[row][:end], values[row][:end]).flatten()[None]
            for index, (row, end) in enumerate(
                (row, end) for row, (cached, new) in enumerate(rows) for end in range(cached + 1, cached + new + 1)
            )
        ]
    )
    assert out.shape == want.shape
    assert out.dtype == spec.dtype
    assert relative_error(out, want) < TOLERANCE[spec.dtype]


def step_batch(
    rows: list[tuple[int, int]], num_decodes: int, tables: torch.Tensor, slot_mapping: torch.Tensor
) -> StepBatch:
    """Rows as (cached, new): decode rows, then those with context, then those without."""
    decode, tables = None, tables.int()
    if num_decodes:
        lens = torch.tensor([cached + 1 for cached, _ in rows[:num_decodes]], dtype=torch.int32)
        decode = DecodeRows(tables[:num_decodes], lens, int(lens.max()), lens.long().numpy())
    first_prefill = next((i for i, (cached, _) in enumerate(rows) if not cached and i >= num_decodes), len(rows))
    return StepBatch(
        slot_mapping,
        decode,
        chunk_rows(rows[num_decodes:first_prefill], tables[num_decodes:first_prefill], num_decodes),
        chunk_rows(rows[first_prefill:], tables[first_prefill:], sum(new for _, new in rows[:first_prefill])),
    )


def chunk_rows(rows: list[tuple[int, int]], tables: torch.Tensor, query_start: int) -> ChunkRows | None:
    if not rows:
        return None
    new = torch.tensor([new for _, new in rows])
    cached = torch.tensor([cached for cached, _ in rows])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), new.cumsum(0)]).int()
    return ChunkRows(
        query_start, tuple(new.tolist()), tuple(cached.tolist()), starts, (cached + new).int(), tables.contiguous()
    )


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), layout=st.sampled_from(["linear", "shuffled"]), seed=st.integers(0, 999))
def test_torch_backend_matches_the_reference(
    case: tuple[AttentionSpec, int, list[tuple[int, int]], int], layout: str, seed: int
) -> None:
    check("TORCH_ATTN", case, layout, seed)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), layout=st.sampled_from(["linear", "shuffled"]), seed=st.integers(0, 999))
def test_triton_backend_asks_its_kernels_for_the_right_thing(
    case: tuple[AttentionSpec, int, list[tuple[int, int]], int], layout: str, seed: int
) -> None:
    """With PyTorch's twins of the Triton kernels, which run on a CPU; the kernels themselves are tests/kernels'."""
    check("TRITON_ATTN", case, layout, seed)


@needs_native
@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases(), layout=st.sampled_from(["linear", "shuffled"]), seed=st.integers(0, 999))
def test_cpu_backend_matches_the_reference(
    case: tuple[AttentionSpec, int, list[tuple[int, int]], int], layout: str, seed: int
) -> None:
    check("CPU_ATTN", case, layout, seed)


@needs_native
@pytest.mark.parametrize("layout_name", ["linear", "shuffled"])
def test_decode_does_not_depend_on_its_neighbours(layout_name: str) -> None:
    """The same row alone and among others, bit for bit, so that a request's tokens do not depend on the batch."""
    spec = AttentionSpec(8, 4, 64, 0.125, torch.bfloat16, torch.bfloat16)
    layout = LAYOUTS[layout_name](16)
    cache = layout.allocate(spec, 40, torch.device("cpu"))
    cache.key.normal_(generator=torch.Generator().manual_seed(1))
    cache.value.normal_(generator=torch.Generator().manual_seed(2))
    q = torch.randn(9, 8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(4))[:36].view(9, 4).int()
    lens = torch.tensor([1, 16, 17, 64, 33, 5, 48, 2, 63], dtype=torch.int32)
    backend = make_backend("CPU_ATTN", layout, spec)
    assert isinstance(backend, CpuBackend)
    together = backend.decode(Layer(spec), q, cache, DecodeMetadata(tables, lens))
    for row in range(9):
        one = slice(row, row + 1)
        alone = backend.decode(Layer(spec), q[one], cache, DecodeMetadata(tables[one], lens[one]))
        assert torch.equal(alone, together[one])
