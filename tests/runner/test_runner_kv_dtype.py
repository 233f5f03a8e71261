"""--kv-cache-dtype through the whole engine on a CPU: what it is, what serves it, what is refused."""

from __future__ import annotations

import pytest

from miniserve.config import EngineConfig
from miniserve.core import SamplingParams, UserError
from miniserve.llm import LLM

PROMPT = "Question: Ann has 4 apples and buys 3 more. How many apples does she have?\nAnswer:"


def answer(**options: str) -> tuple[str, list[str]]:
    engine = LLM(progress=False, max_model_len=256, max_num_seqs=4, device="cpu", **options)
    text = engine.generate(PROMPT, SamplingParams(max_tokens=40, temperature=0.0, stop=["\n\n"]))[0].outputs[0].text
    return text, engine.info.attention


def test_an_fp8_cache_serves() -> None:
    expected, _ = answer()
    text, told = answer(kv_cache_dtype="fp8")
    assert text == expected
    assert told[0].startswith("TORCH_ATTN")
    assert "fp8 KV cache: float8_e4m3fn" in told
    assert any("CPU_ATTN" in line and "it does not read an fp8 KV cache" in line for line in told)


def test_another_dtype_than_the_model_s_is_left_to_what_converts() -> None:
    text, told = answer(kv_cache_dtype="float32", dtype="bfloat16")
    assert text == answer()[0]
    assert told[0].startswith("TORCH_ATTN")


def test_what_no_path_can_is_refused() -> None:
    with pytest.raises(UserError, match=r"--attention-backend CPU_ATTN: .*it does not read an fp8 KV cache"):
        answer(kv_cache_dtype="fp8", attention_backend="CPU_ATTN")
    with pytest.raises(UserError, match="--kv-cache-dtype 'int4' is not known; choose one of auto"):
        EngineConfig(kv_cache_dtype="int4")
