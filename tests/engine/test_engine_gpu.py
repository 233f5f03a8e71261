"""The engine on a CUDA device against the engine on a CPU: marked `gpu`, run by hand with `pytest -m gpu`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from engine_real import generate, tokens

import miniserve
from miniserve.config import EngineConfig
from miniserve.core import Grammar, SamplingParams
from miniserve.engine.build import build_engine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
MODEL = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"


def run(
    device: str, layout: str, overlap: bool, kv_cache_memory: int, speculative: str | None = None
) -> list[list[int]]:
    rng = random.Random(0)
    requests = []
    for i in range(40):
        prompt = [rng.randrange(2000) for _ in range(rng.choice([1, 15, 16, 17, 90]))]
        if speculative:
            prompt = (prompt[:8] * 8)[: len(prompt)]  # something to guess from
        params = SamplingParams(
            temperature=0.0 if i % 2 else 0.8,
            top_k=20 if i % 3 else 0,
            seed=i,
            repetition_penalty=1.1 if i % 5 == 0 else 1.0,
            max_tokens=40,
            logprobs=2 if i % 4 == 0 else None,
            prompt_logprobs=1 if i % 7 == 0 else None,
            grammar=Grammar("regex", "[a-z ]{5,90}") if i % 3 == 1 else None,
        )
        requests.append((prompt, params))
    config = EngineConfig(
        device=device,
        dtype="float32",
        kv_layout=layout,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        max_model_len=512,
        kv_cache_memory=kv_cache_memory,
        async_scheduling=overlap,
        speculative=speculative if device == "cuda" else None,
    )
    engine, _ = build_engine(config, MODEL, "tiny-qwen3")
    outputs = generate(engine, requests, [rng.randrange(30) for _ in requests])
    for (prompt, params), found in zip(requests, outputs, strict=True):
        entries = [e for output in found for e in output.prompt_logprobs or []]
        assert len(entries) == (0 if params.prompt_logprobs is None else len(prompt))
    assert (engine.stats.num_accepted_tokens > 0) == (config.speculative is not None)
    return [tokens(found) for found in outputs]


def test_draws_are_the_same_in_graphs_and_without() -> None:
    rng = random.Random(1)
    requests = []
    for i in range(16):
        params = SamplingParams(
            temperature=0.0 if i % 5 == 4 else 0.9,
            top_k=30 if i % 3 == 1 else 0,
            top_p=0.9 if i % 2 else 1.0,
            min_p=0.02 if i % 4 == 3 else 0.0,
            seed=i,
            logprobs=1 if i == 7 else None,
            presence_penalty=0.5 if i == 8 else 0.0,
            # Once these two have ended, graphs draw for all masked rows.
            max_tokens=10 if i in (7, 8) else 40,
            ignore_eos=True,
            grammar=Grammar("regex", "[a-z ]*") if i % 3 == 0 else None,
        )
        requests.append(([rng.randrange(2000) for _ in range(20)], params))
    found = []
    for enforce_eager in (False, True):
        config = EngineConfig(
            device="cuda", dtype="float32", max_num_seqs=16, max_model_len=512, enforce_eager=enforce_eager
        )
        engine, _ = build_engine(config, MODEL, "tiny-qwen3")
        found.append([tokens(output) for output in generate(engine, requests, [0] * len(requests))])
    assert found[0] == found[1]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", ["linear", "shuffled"])
def test_a_gpu_gives_the_tokens_a_cpu_gives(layout: str, overlap: bool) -> None:
    # The small pool makes the GPU's run preempt, the CPU's has room.
    on_gpu = run("cuda", layout, overlap, 12 << 20)
    on_cpu = run("cpu", "linear", False, 512 << 20)
    assert on_gpu == on_cpu


@pytest.mark.parametrize("layout", ["linear", "shuffled"])
def test_a_gpu_that_guesses_gives_the_tokens_of_a_cpu_that_does_not(layout: str) -> None:
    on_gpu = run("cuda", layout, False, 12 << 20, "ngram:4")
    assert on_gpu == run("cpu", "linear", False, 512 << 20, "ngram:4")
