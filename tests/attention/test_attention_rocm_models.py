"""What real models get on MI300X and MI355X: shapes as their config.json files have them, one GPU's share of heads."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.routes import describe_routes
from miniserve.attention.select import Choice, select
from miniserve.attention.spec import AttentionSpec
from miniserve.core import UserError

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...] = (None,)
    sinks: bool = False
    softcap: float | None = None

    def specs(self, kv_dtype: torch.dtype = BF16, tp: int = 1) -> list[AttentionSpec]:
        return [
            AttentionSpec(
                self.heads // tp,
                max(1, self.kv_heads // tp),
                self.head_dim,
                self.head_dim**-0.5,
                BF16,
                kv_dtype,
                window,
                self.softcap,
                self.sinks,
            )
            for window in self.windows
        ]


QWEN3_235B = Shape(64, 4, 128)
LLAMA_8B, LLAMA_70B, LLAMA_405B = Shape(32, 8, 128), Shape(64, 8, 128), Shape(128, 8, 128)
QWEN35_397B = Shape(32, 2, 256)
GPT_OSS = Shape(64, 8, 64, (128, None), sinks=True)
GEMMA3_27B = Shape(32, 16, 128, (1024, 1024, 1024, 1024, 1024, None))
GPUS = ("mi300x", "mi355x")


def choose(shape: Shape, gpu: str, backend: str = "auto", layout: str = "auto", fp8: bool = False) -> Choice:
    platform = NAMED_PLATFORMS[gpu]
    specs = shape.specs(platform.fp8_dtype if fp8 else BF16)
    return select(specs, platform, block_size=16, backend=backend, layout=layout)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("shape", [QWEN3_235B, LLAMA_8B, LLAMA_70B, LLAMA_405B])
def test_plain_models_have_every_path(shape: Shape, fp8: bool, gpu: str) -> None:
    assert choose(shape, gpu, fp8=fp8).backend == "ROCM_ATTN"
    decodes = {
        (backend, layout): {route.decode for route in choose(shape, gpu, backend, layout, fp8).routes}
        for backend, layout in (
            ("ROCM_ATTN", "shuffled"),
            ("ROCM_AITER_FA", "linear"),
            ("ROCM_AITER_FA", "shuffled"),
            ("ROCM_AITER_UNIFIED_ATTN", "linear"),
            ("ROCM_AITER_UNIFIED_ATTN", "shuffled"),
            ("TRITON_ATTN", "linear"),
            ("TRITON_ATTN", "shuffled"),
        )
    }
    assert list(decodes.values()) == [
        {"paged_attention_rocm"},
        {"paged_attention_v1"},
        {"paged_attention_common"},
        {"unified_attention"},
        {"unified_attention"},
        {"triton paged_decode"},
        {"triton paged_decode"},
    ]


@pytest.mark.parametrize(
    ("shape", "fp8", "gpu", "told"),
    [
        (QWEN3_235B, False, "mi300x", "from batch 10 (10 x 64 heads > 608) ASM"),
        (QWEN3_235B, False, "mi355x", "from batch 9 (9 x 64 heads > 512) ASM"),
        (QWEN3_235B, True, "mi300x", "HIP at any batch"),  # 16 query heads per KV head
        (LLAMA_8B, True, "mi300x", "from batch 20 (20 x 32 heads > 608) ASM"),
        (LLAMA_405B, False, "mi355x", "from batch 5 (5 x 128 heads > 512) ASM"),
        (LLAMA_405B, True, "mi355x", "HIP at any batch"),
    ],
)
def test_the_switch_is_told_for_each_model(shape: Shape, fp8: bool, gpu: str, told: str) -> None:
    lines = describe_routes(choose(shape, gpu, "ROCM_AITER_FA", "shuffled", fp8))
    assert told in lines[0]
    assert "prefill by flash_attn_varlen_func" in lines[0]


@pytest.mark.parametrize("gpu", GPUS)
def test_heads_of_256_are_hip_s(gpu: str) -> None:
    for backend in ("ROCM_ATTN", "ROCM_AITER_FA"):
        routes = choose(QWEN35_397B, gpu, backend, "shuffled").routes
        assert {route.decode for route in routes} == {"paged_attention_rocm"}


@pytest.mark.parametrize("gpu", GPUS)
def test_windows_with_sinks_go_to_unified_attention(gpu: str) -> None:
    choice = choose(GPT_OSS, gpu)
    assert (choice.backend, choice.layout) == ("ROCM_AITER_UNIFIED_ATTN", "linear")
    reasons = {(backend, reason) for backend, _, reason in choice.rejected}
    assert ("ROCM_ATTN", "paged_attention_rocm has no sinks") in reasons
    assert ("ROCM_ATTN", "paged_attention_rocm has no sliding window") in reasons
    assert ("ROCM_AITER_FA", "paged_attention_v1 has no sinks") in reasons
    assert choose(GPT_OSS, gpu, layout="shuffled").backend == "ROCM_AITER_UNIFIED_ATTN"
    with pytest.raises(UserError, match="paged_attention_common does not take head_dim 64"):
        choose(GPT_OSS, gpu, "ROCM_AITER_FA", "shuffled")


@pytest.mark.parametrize("gpu", GPUS)
def test_layers_with_and_without_a_window_are_told_apart(gpu: str) -> None:
    choice = choose(GEMMA3_27B, gpu)
    assert choice.backend == "ROCM_ATTN"
    prefill = "prefill by triton paged_extend; rope with cache write by triton rope_and_write"
    assert describe_routes(choice) == [
        f"5 layers of 32/16 heads of 128, window 1024: decode by triton paged_decode; {prefill}",
        f"1 layer of 32/16 heads of 128: decode by paged_attention_rocm: HIP at any batch; {prefill}",
    ]
    linear = choose(GEMMA3_27B, gpu, "ROCM_AITER_FA", "linear")
    assert {route.decode for route in linear.routes} == {"paged_attention_v1"}
