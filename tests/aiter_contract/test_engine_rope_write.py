"""The whole engine on the stand-in with a model that has no norm of q and k: aiter itself turns and writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from engine_support import prompts_of, stand_in
from safetensors.torch import load_file, save_file

import miniserve
from miniserve.core import SamplingParams
from miniserve.llm import LLM

BUILT_IN = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"
PATHS = [
    (backend, layout)
    for backend in ("ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_GLUON")
    for layout in ("linear", "shuffled")
    if (backend, layout) != ("ROCM_AITER_GLUON", "linear")
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The built-in model without its norms of q and k, as a Llama: it says nonsense, but with determination."""
    path = tmp_path_factory.mktemp("llama") / "model"
    shutil.copytree(BUILT_IN, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (path / "config.json").write_text(json.dumps(config))
    tensors = load_file(path / "model.safetensors")
    # What a norm would have made of q and k is about so large.
    kept = {name: t / 4 if "q_proj" in name or "k_proj" in name else t for name, t in tensors.items()}
    save_file({n: t for n, t in kept.items() if "q_norm" not in n and "k_norm" not in n}, path / "model.safetensors")
    return str(path)


def likelihoods(model: str, **options: str) -> list[float]:
    """Of every token of some prompts, prefilled in chunks beside decode rows, and of what is decoded."""
    engine = LLM(model, progress=False, max_model_len=512, max_num_seqs=8, max_num_batched_tokens=128, **options)
    params = SamplingParams(max_tokens=6, temperature=0.0, logprobs=0, prompt_logprobs=0)
    found = []
    for generation in engine.generate(prompts_of(3)[0], params):
        found += [entry.logprob for entry in generation.prompt_logprobs or () if entry is not None]
        found += [entry.logprob for entry in generation.outputs[0].logprobs or ()][:1]
    return found


@pytest.fixture(scope="module")
def expected(model: str) -> list[float]:
    return likelihoods(model, device="cpu", attention_backend="TORCH_ATTN", dtype="float32")


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(("backend", "layout"), PATHS)
def test_aiter_turns_and_writes(model: str, expected: list[float], arch: str, backend: str, layout: str) -> None:
    # In bfloat16 alone PyTorch is 0.05 off, over an fp8 cache 0.12; turned the other way, 2.7.
    # gfx942 has an fp8 of its own; otherwise both GPUs write the same.
    for kv_cache_dtype, allowed in (("auto", 0.07), ("fp8", 0.3))[arch == "gfx950" :]:
        with stand_in(arch, 16) as module:
            got = likelihoods(
                model,
                device="cpu",
                attention_backend=backend,
                kv_layout=layout,
                kv_cache_dtype=kv_cache_dtype,
                dtype="bfloat16",
            )
            writers = {call.function for call in module._standin.calls if "cache" in call.function}
        assert writers == {"fused_qk_rope_reshape_and_cache"}
        differences = [abs(one - other) for one, other in zip(got, expected, strict=True)]
        assert sum(differences) / len(differences) < allowed
