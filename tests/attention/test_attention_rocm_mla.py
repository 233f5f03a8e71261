"""Latent attention on GPUs, by way of what stands in for their kernels on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_steps import Case
from emulation import emulated_platform
from engine_support import stand_in
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_steps import LatentStep, make_latent_step
from test_engine_backends import Watched

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.build import build_backend
from miniserve.attention.backends.rocm_aiter_mla import AiterLatentBackend
from miniserve.attention.metadata import StepBatch, decode_rows
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec, LatentDims

torch.set_num_threads(1)
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
MLA = AttentionSpec(16, 1, 576, 0.1, torch.bfloat16, torch.bfloat16, latent=LatentDims(512, 64, 128, 128))


@pytest.mark.parametrize("device", ["mi300x", "mi355x", "h100", "h200"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_mla_serves_every_gpu_it_was_compiled_for(device: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(MLA, dtype=dtype, kv_dtype=dtype)
    for kv_dtype in (dtype, NAMED_PLATFORMS[device].fp8_dtype):
        choice = select(
            [dataclasses.replace(spec, kv_dtype=kv_dtype)], NAMED_PLATFORMS[device], block_size=16, backend="TRITON_MLA"
        )
        assert choice.layout == "latent"


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_120"])
def test_gpus_with_less_shared_memory_than_a_tile_go_to_pytorch(arch: str) -> None:
    choice = select([MLA], dataclasses.replace(NAMED_PLATFORMS["h100"], arch=arch), block_size=16)
    assert choice.backend == "TORCH_MLA"
    reasons = [reason for backend, _, reason in choice.rejected if backend == "TRITON_MLA"]
    assert reasons == [f"it runs on sm_90 or sm_100 or sm_103 or gfx942 or gfx950, not on {arch}"]


def test_latents_larger_than_the_kernels_tile_go_to_pytorch() -> None:
    wide = dataclasses.replace(MLA, head_dim=1088, latent=LatentDims(1024, 64, 128, 128))
    choice = select([wide], NAMED_PLATFORMS["h100"], block_size=16)
    assert choice.backend == "TORCH_MLA"
    assert ("TRITON_MLA", "latent", "it does not take head_dim 1088") in choice.rejected


@st.composite
def aiter_cases(draw: st.DrawFn) -> Case:
    """Layers of DeepSeek's latents in bfloat16; lengths to around what a page and a row of work have."""
    nope_dim, v_head_dim = draw(st.sampled_from([(128, 128), (16, 32), (128, 192)]))
    spec = dataclasses.replace(
        MLA,
        num_heads=draw(st.sampled_from([1, 8, 12, 16, 24, 32, 64])),
        scale=draw(st.sampled_from([192**-0.5, 0.1])),
        latent=LatentDims(512, 64, nope_dim, v_head_dim),
        kv_dtype=draw(st.sampled_from([torch.bfloat16, torch.float8_e4m3fn])),  # replaced by the arch's own
    )
    lengths = [0, 1, 15, 16, 17, 40]
    decodes = [(draw(st.sampled_from(lengths)), 1) for _ in range(draw(st.integers(0, 4)))]
    chunks = [
        (draw(st.sampled_from(lengths)), draw(st.sampled_from([1, 2, 19])))
        for _ in range(draw(st.integers(0 if decodes else 1, 3)))
    ]
    return spec, 16, [*decodes, *sorted(chunks, key=lambda chunk: not chunk[0])], len(decodes)


def make_backend(step: LatentStep, name: str, max_rows: int = 8) -> Backend[Any]:
    choice = select([step.layer.spec], emulated_platform(), block_size=step.layout.block_size, backend=name)
    return build_backend(choice, choice.options(torch.device("cpu"), max_rows, 600))


def aiter_backend(step: LatentStep) -> AiterLatentBackend:
    backend = make_backend(step, "ROCM_AITER_MLA")
    assert isinstance(backend, AiterLatentBackend)
    return backend


@pytest.mark.parametrize("arch", FP8)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    case=aiter_cases(),
    kv_scale=st.sampled_from([0.25, 1.0]),
    pieces=st.sampled_from([16, 4096]),
    seed=st.integers(0, 99),
)
def test_rocm_aiter_mla_is_what_the_formula_gives(
    arch: str, case: Case, kv_scale: float, pieces: int, seed: int
) -> None:
    spec, *rest = case
    fp8 = spec.kv_dtype.itemsize == 1
    spec = dataclasses.replace(spec, kv_dtype=FP8[arch]) if fp8 else spec
    with stand_in(arch, 4):
        step = make_latent_step((spec, *rest), seed, kv_scale if fp8 else 1.0)
        backend = aiter_backend(step)
        backend.context_tokens = pieces
        step.check(backend, 3e-2)
        if not step.batch.chunks:
            step.padded().check(backend, 3e-2)


@pytest.mark.parametrize("backend_name", ["ROCM_AITER_MLA", "TRITON_MLA", "TORCH_MLA"])
@pytest.mark.parametrize("fp8", [False, True])
def test_every_length_around_a_partition_of_256(backend_name: str, fp8: bool) -> None:
    """Decoded, as the end of a chunk, and one-token requests."""
    small = dataclasses.replace(MLA, num_heads=2, latent=LatentDims(512, 64, 16, 16))
    spec = dataclasses.replace(small, kv_dtype=FP8["gfx942"]) if fp8 else small
    decodes = [(length - 1, 1) for length in range(230, 271)]
    chunks = [(length - new, new) for length in range(230, 271) for new in (1 + length % 3,)]
    with stand_in("gfx942", 4):
        for rows, num_decodes in ((decodes, 41), ([(0, 1), *chunks, (0, 1)], 1)):
            step = make_latent_step((spec, 16, rows, num_decodes), 3, 0.5)
            for each in (step,) if step.batch.chunks else (step, step.padded()):
                each.check(make_backend(step, backend_name, max_rows=64), 3e-2)


@pytest.mark.parametrize("arch", FP8)
def test_a_step_reads_nothing_of_the_one_before(arch: str) -> None:
    """The buffers are the same, rows and lengths are not; a padding row, of length 0, harms nobody, wherever it is, and
    writes nothing."""
    with stand_in(arch, 4):
        cases = [[(40, 1), (3, 1), (16, 1)], [(0, 1)], [(5, 1), (99, 1)], [(7, 1), (30, 1), (1, 1), (15, 1)]]
        steps = [make_latent_step((MLA, 16, rows, len(rows)), seed) for seed, rows in enumerate(cases)]
        backend = aiter_backend(steps[0])
        for step in steps:
            step.check(backend, 3e-2)
        step = steps[-1]
        decode = step.batch.decode
        assert decode is not None
        lens, slots = decode.seq_lens.clone(), step.batch.slot_mapping.clone()
        lens[1], slots[1] = 0, -1
        before = step.cache.key.clone()
        batch = StepBatch(slots, decode_rows(decode.block_tables, lens, 600, None))
        out = dataclasses.replace(step, batch=batch).run(backend)
        assert torch.allclose(out[[0, 2, 3]].double(), step.want[[0, 2, 3]], atol=3e-2)
        assert torch.equal(step.cache.key, before)  # the other rows' tokens were there already


@pytest.mark.parametrize("arch", FP8)
def test_latents_that_fp8_cannot_hold_are_limited(arch: str) -> None:
    fp8 = FP8[arch]
    with stand_in(arch, 4):
        step = make_latent_step((dataclasses.replace(MLA, kv_dtype=fp8), 16, [(3, 1)], 1), 1, 0.5)
        q_nope, q_pe, kv_c, k_pe = step.inputs
        dataclasses.replace(step, inputs=(q_nope, q_pe, 1e4 * kv_c, k_pe)).run(aiter_backend(step))
        assert float(step.cache.key.float().abs().max()) == torch.finfo(fp8).max


@pytest.mark.parametrize("backend_name", ["ROCM_AITER_MLA", "TRITON_MLA", "TORCH_MLA"])
def test_every_field_of_the_metadata_is_read(backend_name: str) -> None:
    read: set[str] = set()
    known: set[str] = set()
    with stand_in("gfx942", 4):
        step = make_latent_step((MLA, 16, [(20, 1), (60, 20), (0, 9)], 1), 3)
        backend = make_backend(step, backend_name)
        meta = Watched(backend.build(step.batch), read, known)
        backend.attend_latent(step.layer, step.inputs, step.cache, meta)
    assert known
    assert read == known
