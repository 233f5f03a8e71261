"""The ROCm backends on the stand-in: whatever `select` allows, on random steps, against attention in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from aiter_standin import installed
from attention_steps import Case, Step, make_step
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.attention import aiter
from miniserve.attention.backends.build import build_backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.rocm_aiter_fa import FlashBackend
from miniserve.attention.platform import emulated_platform
from miniserve.attention.select import Choice, select
from miniserve.attention.spec import AttentionSpec
from miniserve.core import UserError

BF16, FP16 = torch.bfloat16, torch.float16
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
BACKENDS = ("ROCM_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "TRITON_ATTN")
TOLERANCE = {BF16: 1.2e-2, FP16: 2.5e-3}
FP8_TOLERANCE = 6e-2  # new tokens may be read before they were rounded


@contextmanager
def stand_in(arch: str, cu_num: int = 4) -> Iterator[ModuleType]:
    """cu_num 4: from 9 heads in a step on, the ASM kernel's turn would come."""
    aiter.load.cache_clear()
    with installed(arch=arch, cu_num=cu_num) as module:
        yield module
    aiter.load.cache_clear()


def build(step: Step, choice: Choice, arch: str, **changes: int) -> object:
    options = BackendOptions(
        specs=(step.layer.spec,),
        routes=choice.routes,
        platform=emulated_platform(arch),
        device=torch.device("cpu"),
        max_rows=8,
        max_seq_len=600,
    )
    if changes and choice.backend == "ROCM_AITER_FA":
        return FlashBackend(step.layout, aiter.load(), options, **changes)
    return build_backend(choice, step.layout.block_size, options)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([BF16, FP16]))
    head_dim = draw(st.sampled_from([32, 64, 80, 128, 128, 256]))
    block_size = draw(st.sampled_from([16, 16, 32]))
    spec = AttentionSpec(
        num_heads=kv_heads * draw(st.sampled_from([1, 4, 10, 17])),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=draw(st.sampled_from([head_dim**-0.5, head_dim**-0.5, 0.3])),
        dtype=dtype,
        kv_dtype=draw(st.sampled_from([dtype, torch.float8_e4m3fn])),  # replaced by the arch's own
        sliding_window=draw(st.sampled_from([None, None, None, 1, 7, 33])),
        softcap=draw(st.sampled_from([None, None, None, 5.0])),
        sinks=draw(st.sampled_from([False, False, True])),
    )
    lengths = [0, 1, block_size - 1, block_size, 50, 240, 244, 254, 255, 300]
    decodes = [(draw(st.sampled_from(lengths)), 1) for _ in range(draw(st.integers(0, 4)))]
    chunks = [
        (draw(st.sampled_from(lengths)), draw(st.sampled_from([1, 2, 37])))
        for _ in range(draw(st.integers(0 if decodes else 1, 3)))
    ]
    return spec, block_size, [*decodes, *sorted(chunks, key=lambda chunk: not chunk[0])], len(decodes)


@pytest.mark.parametrize("arch", FP8)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    case=cases(),
    backend=st.sampled_from(BACKENDS),
    layout=st.sampled_from(["linear", "shuffled"]),
    scales=st.sampled_from([(1.0, 1.0), (0.5, 2.0), (0.03, 0.02)]),
    context_tokens=st.sampled_from([64, 32768]),
    seed=st.integers(0, 999),
)
def test_what_is_allowed_is_right(
    arch: str, case: Case, backend: str, layout: str, scales: tuple[float, float], context_tokens: int, seed: int
) -> None:
    spec, block_size, *rest = case
    if spec.kv_dtype.itemsize == 1:
        spec = replace(spec, kv_dtype=FP8[arch])
    with stand_in(arch):
        try:
            choice = select(
                [spec], emulated_platform(arch), block_size=block_size, backend=backend, layout=layout
            )
        except UserError:
            return
        step = make_step((spec, block_size, *rest), layout, seed, scales)
        fp8 = spec.kv_dtype.itemsize == 1
        step.check(build(step, choice, arch, context_tokens=context_tokens), FP8_TOLERANCE if fp8 else TOLERANCE[spec.dtype])
