"""The whole engine on the stand-in for aiter: the built-in model solves its problems over every path of both GPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from aiter_standin import environment, read_calls
from engine_support import MAX_TOKENS, STOP, prompts_of, score, stand_in

import miniserve
from miniserve.attention.contracts import CONTRACTS
from miniserve.core import SamplingParams
from miniserve.llm import LLM
from tools.quantise import KINDS, quantise

# Each, and in how many documents: 8 compute units let ASM kernels run from 5 rows of the model's 4 heads on.
CU_NUM = 8
DEEPSEEK = Path(miniserve.__file__).parent / "assets" / "tiny-deepseek"
PATHS = [
    (contract.name, layout, 8 if (contract.name, layout) == ("ROCM_AITER_FA", "shuffled") else 4)
    for contract in CONTRACTS
    if "gfx942" in contract.archs or "gfx*" in contract.archs
    for layout in contract.layouts
    if not contract.latent
]
DECODE = {
    ("ROCM_ATTN", "shuffled"): {"paged_attention_rocm hip"},
    ("ROCM_AITER_FA", "linear"): {"paged_attention_v1 hip"},
    ("ROCM_AITER_FA", "shuffled"): {"paged_attention_rocm hip", "paged_attention_common asm", "pa_fwd_asm asm"},
    ("ROCM_AITER_UNIFIED_ATTN", "linear"): {"unified_attention 2d"},
    ("ROCM_AITER_UNIFIED_ATTN", "shuffled"): {"unified_attention 2d"},
    ("ROCM_AITER_GLUON", "shuffled"): {"pa_decode_gluon ", "unified_attention 2d"},
}


def generate(count: int, calls: list[object], **options: Any) -> list[str]:
    """Greedy answers, prefilled in chunks, so that there are extends too. calls: emptied once the engine is loaded."""
    engine = LLM(
        progress=False,
        max_model_len=768,
        max_num_seqs=24,
        max_num_batched_tokens=256,
        enable_prefix_caching=True,
        **options,
    )
    calls.clear()
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, stop=STOP)
    return [generation.outputs[0].text for generation in engine.generate(prompts_of(count)[0], params)]


@pytest.fixture(scope="module")
def reference() -> list[str]:
    return generate(8, [], device="cpu", attention_backend="TORCH_ATTN", dtype="float32")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("backend", "layout", "count"), PATHS)
def test_every_path_solves_the_problems(arch: str, backend: str, layout: str, count: int, reference: list[str]) -> None:
    # gfx942 has an fp8 of its own. Its paths over other caches verify guesses below, and are checked at their start.
    for kv_cache_dtype in ("auto", "fp8") if count == 8 else ("fp8",) if arch == "gfx942" else ("auto",):
        with stand_in(arch, CU_NUM) as module:
            texts = generate(
                count,
                module._standin.calls,
                device="cpu",
                attention_backend=backend,
                kv_layout=layout,
                kv_cache_dtype=kv_cache_dtype,
                self_check=False,
            )
            called = {" ".join(call) for call in module._standin.calls}
        assert score(texts, prompts_of(count)[1]) >= 0.95, kv_cache_dtype
        same = sum(text == expected for text, expected in zip(texts, reference[:count], strict=True))
        assert same >= 0.9 * count, kv_cache_dtype
        decodes = {call for call in called if call.startswith(("pa", "unified"))}
        assert decodes == DECODE.get((backend, layout), set()), kv_cache_dtype


@pytest.mark.parametrize(("backend", "layout"), sorted({path[:2] for path in PATHS}))
def test_every_path_verifies_guesses(backend: str, layout: str, reference: list[str]) -> None:
    """In its own decode kernel: a guess is a row like any other."""
    with stand_in("gfx942", CU_NUM) as module:
        calls = module._standin.calls
        texts = generate(4, calls, device="cpu", attention_backend=backend, kv_layout=layout, speculative="ngram:4")
        decodes = {" ".join(call) for call in calls if call[0].startswith(("pa", "unified"))}
    assert sum(text == expected for text, expected in zip(texts, reference[:4], strict=True)) >= 3
    assert decodes == DECODE.get((backend, layout), set())


@pytest.mark.parametrize(
    ("arch", "kind", "source", "kv_cache_dtype", "called"),
    [
        ("gfx942", "fp8-block", "tiny-qwen3", "auto", ("gemm_a8w8_blockscale", "")),
        ("gfx950", "fp8-block", "tiny-qwen3", "auto", ("gemm_a8w8_blockscale", "")),
        ("gfx942", "quark-kv", "tiny-qwen3", "fp8", ("paged_attention_rocm", "hip")),
        ("gfx950", "fp8-block", "tiny-deepseek", "auto", ("fused_moe", "per_1x128")),
    ],
)
def test_checkpoints_in_8_bits_solve_the_problems(
    arch: str, kind: str, source: str, kv_cache_dtype: str, called: tuple[str, str], tmp_path: Path
) -> None:
    """Made of the built-in models. gfx942 reads their codes for half as much."""
    quantise(KINDS[kind], DEEPSEEK.parent / source, tmp_path / source)
    with stand_in(arch, CU_NUM) as module:
        calls = module._standin.calls
        texts = generate(6, calls, device="cpu", model=str(tmp_path / source), kv_cache_dtype=kv_cache_dtype)
        assert called in calls
    assert score(texts, prompts_of(6)[1]) == 1.0


def test_without_aiter_none_of_it_is_called(reference: list[str]) -> None:
    with stand_in("gfx942", CU_NUM) as module:
        calls = module._standin.calls
        texts = generate(6, calls, device="cpu", aiter=False)
        assert not calls
    assert sum(text == expected for text, expected in zip(texts, reference[:6], strict=True)) >= 5


def test_the_table_of_paths_is_whole() -> None:
    assert set(DECODE) | set(product(["TRITON_ATTN"], ["linear", "shuffled"])) == {path[:2] for path in PATHS}


FLASH_FP8 = "--attention-backend ROCM_AITER_FA --kv-layout shuffled --kv-cache-dtype fp8"


@pytest.mark.parametrize(
    ("arch", "command", "calls", "no_calls", "told"),
    [
        (
            "gfx950",
            f"serve {FLASH_FP8}",
            {("pa_fwd_asm", "asm"), ("paged_attention_rocm", "hip")},
            "cache",  # the engine's own kernel norms, turns and writes
            [
                "ROCM_AITER_FA over the shuffled KV layout",
                "fp8 KV cache: float8_e4m3fn",
                "rope with cache write by triton rope_and_write",
            ],
        ),
        (
            "gfx942",
            f"serve {DEEPSEEK}",
            {("mla_decode_fwd", "persistent"), ("get_mla_metadata_v1", ""), ("fused_moe", "No")},
            "paged",
            ["ROCM_AITER_MLA over the latent KV layout", "experts by aiter fused_moe"],
        ),
    ],
    ids=["tiny-qwen3", "tiny-deepseek"],
)
def test_over_http_in_a_process_of_its_own(
    arch: str, command: str, calls: set[tuple[str, str]], no_calls: str, told: list[str], tmp_path: Path
) -> None:
    called, output = serve_problems(f"{command} --no-self-check", arch, 8, tmp_path)
    assert calls <= called
    assert not [call for call in called if no_calls in call[0]]
    assert all(line in output for line in told)


@pytest.mark.skipif("ALL_PATHS" not in os.environ, reason="takes minutes; set ALL_PATHS=1")
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(
    ("model", "backend", "layout", "count"),
    [
        *(("", *path) for path in PATHS),
        *((str(DEEPSEEK), name, "latent", 6) for name in ("ROCM_AITER_MLA", "TRITON_MLA")),
    ],
)
def test_every_path_over_http(
    model: str, backend: str, layout: str, count: int, arch: str, kv_cache_dtype: str, tmp_path: Path
) -> None:
    command = f"serve {model} --attention-backend {backend} --kv-layout {layout}"
    called, output = serve_problems(f"{command} --kv-cache-dtype {kv_cache_dtype}", arch, count, tmp_path)
    assert f"{backend} over the {layout} KV layout" in output
    assert {tuple(call.split(" ")) for call in DECODE.get((backend, layout), ())} <= called


def serve_problems(command: str, arch: str, count: int, tmp_path: Path) -> tuple[set[tuple[str, ...]], str]:
    """Start the command's server on the stand-in, ask it `count` problems at once, and check its answers. Returns what
    was called of aiter, and what the server said."""
    log, output = tmp_path / "calls", tmp_path / "output"
    prompts, asked = prompts_of(count)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [*command.split(), "--device", "cpu", "--port", str(port), "--max-num-batched-tokens", "512"]
    log.touch()
    with output.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve_emulated", *arguments],
            stdout=stream,
            stderr=stream,
            env=environment(arch, CU_NUM, log=log) | {"OMP_NUM_THREADS": "1"},
        )
    try:
        wait_until_ready(port, process, output)
        with ThreadPoolExecutor(count) as pool:
            texts = list(pool.map(lambda prompt: complete(port, prompt), prompts))
    finally:
        process.terminate()
        process.wait(timeout=30)
    assert score(texts, asked) >= 0.95
    return set(read_calls(log)), output.read_text()


def wait_until_ready(port: int, process: subprocess.Popen[bytes], output: Path) -> None:
    deadline = time.monotonic() + 480  # a machine at work loads slowly
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            assert process.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)


def complete(port: int, prompt: str) -> str:
    body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "stop": STOP}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        text: str = json.load(response)["choices"][0]["text"]
    return text
