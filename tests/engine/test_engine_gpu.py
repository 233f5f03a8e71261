"""The engine on a CUDA device against the engine on a CPU: marked `gpu`, run by hand with `pytest -m gpu`."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_real import generate, tokens
from tokenizers import Tokenizer

import miniserve
from miniserve.config import EngineConfig
from miniserve.core import Grammar, RequestOutput, SamplingParams
from miniserve.engine.build import build_engine
from miniserve.runner.chunk_graph import ChunkGraphs
from miniserve.runner.state import StepInputs
from tools.quantise import KINDS, quantise
from tools.tiny_data import completion_prompt, final_answer, problems

# Every engine has a pool of its own size, so that several workers can share a GPU (`-n 4 --dist load`).
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
MODEL = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"


@cache  # several tests compare with one run on the CPU
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
            device="cuda",
            dtype="float32",
            max_num_seqs=16,
            max_model_len=512,
            kv_cache_memory=256 << 20,
            enforce_eager=enforce_eager,
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


SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "intermediate_size": 3072},
    "experts": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_key_value_heads": 4,
    },
    "latent": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "intermediate_size": 2048,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 512,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 16,
        "num_attention_heads": 16,
    },
}
COMMON = {
    "hidden_size": 2048,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 8192,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


def distances(found: list[list[RequestOutput]], others: list[list[RequestOutput]]) -> list[float]:
    """How far two runs' logits behind the same tokens are from each other, of their spread: a figure for each output
    token up to the first one that differs."""
    far = []
    for one, other in zip(found, others, strict=True):
        for a, b in zip(*([e for output in run for e in output.logprobs or []] for run in (one, other)), strict=True):
            assert a.top_ids == b.top_ids
            logprobs = torch.tensor([a.top_logprobs, b.top_logprobs], dtype=torch.float64)
            far.append(float((logprobs[0] - logprobs[1]).std() / logprobs[1].std()))
            if a.token_id != b.token_id:
                break
    return far


# A cold engine compiles for half a minute: each shape and each layout is here once, and in the next test the other way
# round, of dense models the built-in one, whose kernels are there already.
@pytest.mark.parametrize(("shape", "layout"), [("dense", "linear"), ("experts", "shuffled"), ("latent", "auto")])
def test_no_request_waits_for_a_kernel_to_be_compiled(shape: str, layout: str, tmp_path: Path) -> None:
    import triton

    (tmp_path / "config.json").write_text(json.dumps(COMMON | SHAPES[shape]))
    config = EngineConfig(device="cuda", load_format="dummy", kv_layout=layout, kv_cache_memory=4 << 30)
    engine, _ = build_engine(config, tmp_path, shape)
    compiled: list[str] = []

    def note(**found: Any) -> None:
        compiled.append(found["repr"])

    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        rng = random.Random(0)
        requests = []
        for i in range(300):
            # The first ones decode alone; then prompts of all lengths come beside some to 256 rows.
            length = rng.choice([1, 5, 16, 40, 100, 500, 1024, 3000, 7000])
            params = SamplingParams(
                temperature=0.0 if i % 2 else 0.8,
                top_p=0.9 if i % 3 else 1.0,
                seed=i,
                max_tokens=rng.choice([8, 60, 200]),
                ignore_eos=True,
            )
            requests.append(([rng.randrange(8192) for _ in range(length)], params))
        generate(engine, requests, [i // 2 for i in range(300)])
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
    assert not compiled


@pytest.mark.parametrize(("shape", "layout"), [("built-in", "shuffled"), ("experts", "linear"), ("latent", "auto")])
def test_short_prompts_in_graphs_give_the_tokens_of_steps_without(
    shape: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    requests = []
    words: dict[str, Any] = {"logprobs": 1, "logprob_token_ids": [*range(0, 8192, 128)]} if shape == "latent" else {}
    for _ in range(60):
        prompt = [rng.randrange(2000) for _ in range(rng.choice([1, 17, 60, 130, 400, 900]))]
        params = SamplingParams(temperature=0.0, max_tokens=rng.choice([4, 30]), ignore_eos=True, **words)
        requests.append((prompt, params))
    if shape != "built-in":
        # Latent attention's chunks come in 16 bits alone, where near-ties would choose other experts.
        dense = {"first_k_dense_replace": COMMON["num_hidden_layers"]} if shape == "latent" else {}
        (tmp_path / "config.json").write_text(json.dumps(COMMON | SHAPES[shape] | dense))
    run, ran = ChunkGraphs.run, []

    def counted(graphs: ChunkGraphs, inputs: StepInputs) -> torch.Tensor | None:
        hidden = run(graphs, inputs)
        ran.append((hidden is not None, sum(len(group.query_lens) for group in inputs.batch.chunks)))
        return hidden

    monkeypatch.setattr(ChunkGraphs, "run", counted)
    found: list[list[list[RequestOutput]]] = []
    for enforce_eager in (False, True):
        config = EngineConfig(
            device="cuda",
            dtype="bfloat16" if shape == "latent" else "float32",
            load_format="auto" if shape == "built-in" else "dummy",
            kv_layout=layout,
            max_num_seqs=64,
            max_num_batched_tokens=1024,
            max_model_len=2048,
            kv_cache_memory=1 << 30,
            enforce_eager=enforce_eager,
        )
        engine, _ = build_engine(config, MODEL if shape == "built-in" else tmp_path, shape)
        found.append(generate(engine, requests, [i // 3 for i in range(60)]))
    if shape == "latent":
        # Padding changes tiles and so roundings. On a CPU logits of this shape in bfloat16, summed in another order or
        # beside float32, are 1 to 2 % off; another token in the middle of 60 changes them by 29 %, of 400 by 9 %.
        assert max(distances(*found)) < 0.05
    else:
        assert [*map(tokens, found[0])] == [*map(tokens, found[1])]
    assert any(in_graph and chunks > 2 for in_graph, chunks in ran)


@cache
def solved(device: str, model: Path, **more: Any) -> tuple[int, str]:
    """How many of 32 held-out problems, whose prompts come in one step, and what the engine says of its products."""
    tokenizer, asked = Tokenizer.from_file(str(model / "tokenizer.json")), list(problems("test", 2, 32))
    params = SamplingParams(temperature=0.0, max_tokens=96)
    requests = [(tokenizer.encode(completion_prompt(problem)).ids, params) for problem in asked]
    assert sum(len(prompt) for prompt, _ in requests) > 512
    config = EngineConfig(device=device, max_num_seqs=32, max_model_len=256, kv_cache_memory=64 << 20, **more)
    engine, info = build_engine(config, model, "m")
    outputs = generate(engine, requests, [0] * len(requests))
    texts = [tokenizer.decode(tokens(found)) for found in outputs]
    right = [final_answer(text) == problem.final for text, problem in zip(texts, asked, strict=True)]
    return sum(right), "\n".join(info.attention)


@pytest.mark.parametrize("kind", ["compressed-dynamic", "fp8-block"])
def test_activations_in_8_bits_keep_the_score(kind: str, tmp_path: Path) -> None:
    """On Hopper GPUs; of blocks the library takes the output projection alone, the others have too few columns."""
    quantise(KINDS[kind], MODEL, tmp_path)
    want, _ = solved("cpu", MODEL)
    rounding = torch.version.hip is None and torch.cuda.get_device_capability()[0] == 9
    for wished in (True, False):
        got, told = solved("cuda", tmp_path, fp8_activations=wished)
        assert got >= 0.99 * want > 25
        assert ("the vendor's library in 8 bits from 65 rows on" in told) == (rounding and wished)
