"""TRITON_MLA over the Triton kernels: whole steps of latent attention against the formula in float64."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import pytest
import torch
from latent_steps import TOLERANCE, LatentStep, make_latent_step
from triton_support import DEVICE, DTYPES, HALVES, NATIVE

from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.triton_mla import TritonLatentBackend
from miniserve.attention.metadata import StepBatch, chunk_rows, decode_rows
from miniserve.attention.platform import NAMED_PLATFORMS, detect_platform
from miniserve.attention.spec import AttentionSpec, LatentDims, LatentRope

SMALL = AttentionSpec(16, 1, 80, 0.2, torch.float16, torch.float16, latent=LatentDims(64, 16, 24, 20))
DEEPSEEK = AttentionSpec(16, 1, 576, 192**-0.5, torch.float16, torch.float16, latent=LatentDims(512, 64, 128, 128))
ROWS = [(0, 1), (15, 1), (16, 1), (70, 1), (40, 20), (16, 1), (0, 33), (0, 1)]
Thing = TypeVar("Thing")


def moved(thing: Thing) -> Thing:
    """With every tensor in it on the device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(DEVICE)
    if isinstance(thing, tuple) and not hasattr(thing, "_fields"):
        return tuple(moved(item) for item in thing)  # type: ignore[return-value]
    if is_dataclass(thing):
        changes: dict[str, Any] = {field.name: moved(getattr(thing, field.name)) for field in fields(thing)}
        return replace(thing, **changes)  # type: ignore[type-var]
    return thing


def made(spec: AttentionSpec, rows: list[tuple[int, int]] = ROWS, num_decodes: int = 4, **terms: Any) -> LatentStep:
    step = make_latent_step((spec, 16, rows, num_decodes), 0, **terms)
    key = step.cache.key.to(DEVICE)
    return moved(replace(step, cache=replace(step.cache, key=key, value=key[..., : step.cache.value.shape[-1]])))


def backend(step: LatentStep, max_rows: int = 8) -> TritonLatentBackend:
    spec = step.layer.spec
    platform = detect_platform(DEVICE, spec.dtype) if NATIVE else NAMED_PLATFORMS["h100"]
    options = BackendOptions(
        specs=(spec,), routes=(), platform=platform, device=DEVICE, max_rows=max_rows, max_seq_len=128
    )
    if NATIVE:
        return TritonLatentBackend(step.layout, options)
    # The interpreter has no flash attention: as on AMD, PyTorch's operations take the chunks.
    amd = replace(options, platform=NAMED_PLATFORMS["mi300x"])
    return TritonLatentBackend(step.layout, amd)


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_all_kinds(dtype: torch.dtype) -> None:
    spec = replace(SMALL, dtype=dtype, kv_dtype=dtype)
    step = made(spec)
    step.check(backend(step), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_it_norms_and_rotates(dtype: torch.dtype) -> None:
    """By a norm and angles that change nothing."""
    step = made(replace(SMALL, dtype=dtype, kv_dtype=dtype))
    tokens, rope_dim = step.inputs[3].shape
    cosines, weight = torch.ones(tokens, rope_dim // 2), torch.full((64,), 2.0**10, dtype=dtype, device=DEVICE)
    how = LatentRope(weight, 2.0**20, torch.cat([cosines, 0 * cosines], dim=1).to(DEVICE), True)
    rotates = backend(step)
    assert rotates.fuses_rope
    out = rotates.attend_latent(step.layer, step.inputs, step.cache, rotates.build(step.batch), how)
    errors = (out.double() - step.want).norm(dim=1) / step.want.norm(dim=1)
    assert float(errors.max()) < max(2e-5, 3 * TOLERANCE[dtype])


def test_contexts_longer_than_a_piece() -> None:
    step = made(SMALL, [(100, 1), (90, 30), (40, 20)], 1)
    small = backend(step)
    small.context_tokens = 64
    step.check(small)


@pytest.mark.parametrize("dtype", HALVES)
def test_the_dimensions_of_deepseek(dtype: torch.dtype) -> None:
    step = made(replace(DEEPSEEK, dtype=dtype, kv_dtype=dtype), [(40, 1), (2, 1), (20, 9), (0, 17)], 2)
    step.check(backend(step), TOLERANCE[dtype])


def test_an_fp8_cache() -> None:
    step = made(replace(SMALL, kv_dtype=torch.float8_e4m3fn), kv_scale=0.5)
    step.check(backend(step), 1e-2 if NATIVE else 3e-2)  # the interpreter rounds towards zero


def test_a_padding_row_writes_and_reads_nothing() -> None:
    step = made(SMALL, [(5, 1), (30, 1)], 2)
    decode = step.batch.decode
    assert decode is not None
    lens = torch.tensor([6, 0], dtype=torch.int32, device=DEVICE)
    slots = step.batch.slot_mapping.clone()
    slots[1] = -1
    before = step.cache.key.clone()
    batch = StepBatch(slots, decode_rows(decode.block_tables, lens, 128, None))
    out = replace(step, batch=batch).run(backend(step))
    assert torch.allclose(out[0].double(), step.want[0], atol=4e-3)
    assert not out[1].any()
    assert int((step.cache.key != before).any(-1).sum()) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="needs a GPU to capture a graph on")
def test_a_captured_decode_reads_what_lies_in_its_tensors_when_it_is_replayed() -> None:
    step, other = made(SMALL, ROWS[:4], 4), made(SMALL, [(50, 1), (3, 1), (99, 1), (64, 1)], 4)
    made_for = backend(step)
    inputs = tuple(tensor.clone() for tensor in step.inputs)
    decode = step.batch.decode
    assert decode is not None
    width = 8
    tables = torch.zeros(4, width, dtype=torch.int32, device=DEVICE)
    lens, slots = decode.seq_lens.clone(), step.batch.slot_mapping.clone()
    cache = step.layout.allocate(SMALL, 64, DEVICE)

    def fill(of: LatentStep) -> None:
        rows = of.batch.decode
        assert rows is not None
        for tensor, value in zip(inputs, of.inputs, strict=True):
            tensor.copy_(value)
        tables[:, : rows.block_tables.shape[1]] = rows.block_tables
        lens.copy_(rows.seq_lens)
        slots.copy_(of.batch.slot_mapping)
        cache.key[: of.cache.key.shape[0]].copy_(of.cache.key)

    def run(of: LatentStep) -> torch.Tensor:
        batch = StepBatch(slots, decode_rows(tables, lens, 128, None))
        return made_for.attend_latent(of.layer, inputs, cache, made_for.build(batch))

    fill(step)
    run(step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(step)
    for of in (other, step):
        fill(of)
        graph.replay()
        assert torch.allclose(out.double(), of.want, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="needs a GPU to capture a graph on")
@pytest.mark.parametrize("dtype", HALVES)
def test_captured_chunks_are_those_that_lie_in_the_tensors_when_it_is_replayed(dtype: torch.dtype) -> None:
    """Where Hopper's kernel takes them: without anything cached, as many of them and as long as the graph has room."""
    spec = replace(DEEPSEEK, dtype=dtype, kv_dtype=dtype)
    rows, tokens, most, width = 4, 256, 4, 16
    steps = [
        made(spec, [(40, 1), (2, 1), (0, 17), (0, 100), (0, 1)], 2),
        made(spec, [(9, 1), (15, 1), (70, 1), (0, 256)], 3),
        made(spec, [(0, 128), (0, 64), (0, 3), (0, 33)], 0),
    ]
    made_for = backend(steps[0])
    if not made_for.chunks_in_graphs:
        pytest.skip("these chunks need Hopper's matrix units")
    inputs = tuple(each.new_zeros(rows + tokens, *each.shape[1:]) for each in steps[0].inputs)
    tables, lens = (torch.zeros(rows + most, *size, dtype=torch.int32, device=DEVICE) for size in ((width,), ()))
    starts, slots = torch.zeros(most + 1, dtype=torch.int32, device=DEVICE), torch.zeros(rows + tokens, device=DEVICE)
    slots, cache = slots.long(), steps[0].layout.allocate(spec, 256, DEVICE)
    cu_decode = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE)

    def fill(of: LatentStep) -> torch.Tensor:
        """Returns where the step's tokens lie."""
        decode, prefill = of.batch.decode, of.batch.prefill
        assert prefill is not None and of.batch.extend is None
        count, chunks = 0 if decode is None else decode.end, len(prefill.query_lens)
        at = torch.cat([torch.arange(count), rows + torch.arange(prefill.end - count)]).to(DEVICE)
        for fixed, given in zip(inputs, of.inputs, strict=True):
            fixed.fill_(torch.nan)
            fixed[at] = given
        slots.fill_(-1)
        slots[at] = of.batch.slot_mapping
        lens.zero_()
        for group, first in ((decode, 0), (prefill, rows)):
            if group is not None:
                end = first + len(group.seq_lens)
                lens[first:end] = group.seq_lens
                tables[first:end, : group.block_tables.shape[1]] = group.block_tables
        starts.fill_(prefill.end - count)
        starts[: chunks + 1] = prefill.cu_query_lens
        cache.key[: of.cache.key.shape[0]].copy_(of.cache.key)
        return at

    def run(of: LatentStep) -> torch.Tensor:
        decode = decode_rows(tables[:rows], lens[:rows], 128, cu_query_lens=cu_decode)
        none = (0,) * (most - 1)
        prefill = chunk_rows(rows, (tokens, *none), (0, *none), starts, lens[rows:], tables[rows:])
        batch = StepBatch(slots, decode, None, prefill)
        return made_for.attend_latent(of.layer, inputs, cache, made_for.build(batch))

    fill(steps[0])
    run(steps[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(steps[0])
    for of in (*steps[1:], steps[0]):
        at = fill(of)
        # The layer's weights are captured: the same in all steps, as their seed is.
        graph.replay()
        errors = (out[at].double() - of.want).norm(dim=1) / of.want.norm(dim=1)
        assert float(errors.max()) < 3 * TOLERANCE[dtype]
