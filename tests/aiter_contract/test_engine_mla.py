"""The whole engine on the stand-in for aiter with the built-in model of DeepSeek's architecture: latent attention and
routed experts solve its problems as in PyTorch."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from engine_support import MAX_TOKENS, STOP, prompts_of, score, stand_in

import miniserve
from miniserve.core import SamplingParams
from miniserve.llm import LLM

MODEL = str(Path(miniserve.__file__).parent / "assets" / "tiny-deepseek")
COUNT, CU_NUM = 8, 6  # more rows than workgroups: a workgroup has several, and some rows are split


def generate(calls: list[object], **options: str) -> list[str]:
    """Greedy answers, prefilled in chunks, so that there are extends too. calls: emptied once the engine is loaded."""
    engine = LLM(
        MODEL,
        progress=False,
        max_model_len=768,
        max_num_seqs=24,
        max_num_batched_tokens=256,
        enable_prefix_caching=True,
        self_check=False,  # whose calls are not the step's
        **options,
    )
    calls.clear()
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop=STOP)
    return [generation.outputs[0].text for generation in engine.generate(prompts_of(COUNT)[0], params)]


@pytest.fixture(scope="module")
def reference() -> list[str]:
    return generate([], device="cpu", attention_backend="TORCH_MLA", dtype="float32")


@pytest.mark.parametrize(
    ("arch", "kv_cache_dtype", "backend"),
    [
        *product(["gfx942", "gfx950"], ["auto", "fp8"], ["auto"]),
        # The engine's own kernels: to them the GPUs differ in their fp8 alone.
        ("gfx950", "auto", "TRITON_MLA"),
        ("gfx942", "fp8", "TRITON_MLA"),
    ],
)
def test_the_problems_are_solved(arch: str, kv_cache_dtype: str, backend: str, reference: list[str]) -> None:
    with stand_in(arch, CU_NUM) as module:
        calls = module._standin.calls
        texts = generate(calls, device="cpu", attention_backend=backend, kv_cache_dtype=kv_cache_dtype)
        called = {" ".join(call) for call in calls}
    assert score(texts, prompts_of(COUNT)[1]) >= 0.95
    same = sum(text == expected for text, expected in zip(texts, reference, strict=True))
    assert same >= 0.9 * COUNT
    latent = {"mla_decode_fwd persistent", "get_mla_metadata_v1", "flash_attn_varlen_func ck"}
    assert {call.strip() for call in called} == {"fused_moe No"} | (latent if backend == "auto" else set())
