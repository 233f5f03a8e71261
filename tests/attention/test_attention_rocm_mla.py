"""Latent attention on GPUs, by way of what stands in for their kernels on a CPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from attention_steps import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from latent_steps import LatentStep, latent_cases, make_latent_step

from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.triton_mla import TritonLatentBackend, torch_latent_kernels
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.core import UserError

torch.set_num_threads(1)
FP8 = {"mi300x": torch.float8_e4m3fnuz, "mi355x": torch.float8_e4m3fn}
MLA = AttentionSpec(16, 1, 576, 0.1, torch.bfloat16, torch.bfloat16, latent=LatentDims(512, 64, 128, 128))


def options(step: LatentStep, device: str = "mi300x", **changes: Any) -> BackendOptions:
    given: dict[str, Any] = {
        "specs": (step.layer.spec,),
        "routes": (),
        "platform": NAMED_PLATFORMS[device],
        "device": torch.device("cpu"),
        "max_rows": 8,
        "max_seq_len": 600,
    }
    return BackendOptions(**(given | changes))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=latent_cases(), fp8=st.booleans(), kv_scale=st.sampled_from([0.25, 1.0]), seed=st.integers(0, 99))
def test_triton_mla_is_what_the_formula_gives(case: Case, fp8: bool, kv_scale: float, seed: int) -> None:
    if fp8:
        case = (dataclasses.replace(case[0], kv_dtype=torch.float8_e4m3fn), *case[1:])
    step = make_latent_step(case, seed, kv_scale if fp8 else 1.0)
    step.check(TritonLatentBackend(step.layout, torch_latent_kernels(), options(step)))


@pytest.mark.parametrize("device", ["mi300x", "mi355x", "h100", "a100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_mla_serves_every_gpu_it_was_compiled_for(device: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(MLA, dtype=dtype, kv_dtype=dtype)
    assert select([spec], NAMED_PLATFORMS[device], block_size=16, backend="TRITON_MLA").layout == "latent"
    fp8 = dataclasses.replace(spec, kv_dtype=NAMED_PLATFORMS[device].fp8_dtype)
    if device == "a100":
        with pytest.raises(UserError, match=r"reads an fp8 KV cache on sm_89\+ or gfx942 or gfx950, not on sm_80"):
            select([fp8], NAMED_PLATFORMS[device], block_size=16, backend="TRITON_MLA")
        assert select([fp8], NAMED_PLATFORMS[device], block_size=16).backend == "TORCH_MLA"
    else:
        assert select([fp8], NAMED_PLATFORMS[device], block_size=16, backend="TRITON_MLA").layout == "latent"


def test_latents_larger_than_the_kernels_tile_go_to_pytorch() -> None:
    wide = dataclasses.replace(MLA, head_dim=1088, latent=LatentDims(1024, 64, 128, 128))
    choice = select([wide], NAMED_PLATFORMS["h100"], block_size=16)
    assert choice.backend == "TORCH_MLA"
    assert ("TRITON_MLA", "latent", "it does not take head_dim 1088") in choice.rejected
