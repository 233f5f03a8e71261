"""A CPU's noted forward passes: what they give is, bit for bit, what the same steps give from Python."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_real import CPU, KERNELS, MAX_LEN, generate, make_matchers, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

import miniserve
from miniserve import LLM
from miniserve.attention.backends.cpu_attn import CpuBackend
from miniserve.attention.context import StepContext
from miniserve.attention.layouts import LAYOUTS
from miniserve.attention.metadata import StepBatch, decode_rows
from miniserve.config import SchedulerConfig
from miniserve.core import Grammar, RequestOutput, SamplingParams
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.kernels.native import NativeKernels
from miniserve.kernels.native_calls import replay
from miniserve.kernels.step_tensors import RowState
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.loader import dummy_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model
from miniserve.runner import native_graph
from miniserve.runner.native_arena import plan_arena
from miniserve.runner.native_graph import NativeGraphs
from miniserve.runner.runner import ModelRunner
from miniserve.runner.sampler import Sampler
from miniserve.runner.served import ServedModel
from miniserve.runner.state import GraphInputs, StepState
from miniserve.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.skipif(
    KERNELS is None or not KERNELS.has_bf16_dot, reason="a pass is native as a whole only with AVX512-BF16"
)
ROWS = 6
BUILT_IN = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"
SHAPE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LEN,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 48, "tie_word_embeddings": True}
MOE = QWEN3 | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
MODELS: dict[str, dict[str, Any]] = {
    "biases": {"attention_bias": True, "mlp_bias": True},
    "norms of q and k, tied": QWEN3,
    "window": {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 20},
}


def make_model(
    path: Path, settings: dict[str, Any], dtype: torch.dtype = torch.bfloat16, kernels: NativeKernels | None = KERNELS
) -> CausalLM:
    (path / "config.json").write_text(json.dumps(SHAPE | settings))
    model = build_model(load_model_config(path), BuildOptions(dtype=dtype, kv_dtype=dtype, device=CPU, native=kernels))
    dummy_weights(model, seed=1)
    return model


def make_engine(
    model: CausalLM, layout: str, *, graphs: bool, num_blocks: int = 64, num_draft_tokens: int = 0
) -> EngineLoop:
    assert KERNELS is not None
    backend = CpuBackend(LAYOUTS[layout](16))
    caches = [backend.layout.allocate(spec, num_blocks, CPU) for spec in model.attention_specs]
    served = ServedModel(model, backend, caches)
    state = StepState(ROWS, MAX_LEN, 16, CPU)
    sampler = Sampler(ROWS, model.config.vocab_size, CPU, frozenset({7}))
    noted = NativeGraphs(served, KERNELS, rows_of(state, sampler), sampler.params) if graphs else None
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=16,
        max_num_seqs=ROWS,
        max_num_batched_tokens=64,
        max_model_len=MAX_LEN,
        eos_token_ids=frozenset({7}),
        num_draft_tokens=num_draft_tokens,
    )
    runner = ModelRunner(served, state, sampler, noted)
    matchers = make_matchers(model.config.vocab_size, config.eos_token_ids)
    return EngineLoop(Scheduler(config), runner, StepLog(None, ROWS), matchers, overlap=False)


def rows_of(state: StepState, sampler: Sampler) -> RowState:
    return RowState(state.tables, state.lens, sampler.last_tokens, sampler.num_outputs)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each replay, as they come."""
    seen: list[int] = []

    def spy(words: torch.Tensor, num_threads: int) -> None:
        seen.append(len(words))
        replay(words, num_threads)

    monkeypatch.setattr(native_graph, "replay", spy)
    return seen


STEM = [3, 9, 4, 17, 5, 3, 9, 4, 17, 6, 3, 9, 4]
# Of equal lengths on all machines: which token a row of random weights comes to depends on how theirs round.
DRAWN = {"max_tokens": 40, "ignore_eos": True}
REQUESTS = [
    ([*STEM, n], SamplingParams(temperature=temperature, seed=n, min_tokens=n, logprobs=logprobs, **DRAWN))
    for n, (temperature, logprobs) in enumerate([(0.0, None), (0.0, 2), (0.8, 1), (0.0, 0), (0.0, None)])
]
ARRIVALS = [0, 3, 9, 30, 31]


def told(outputs: list[list[RequestOutput]]) -> list[object]:
    return [(tokens(of_one), [entry for output in of_one for entry in output.logprobs or ()]) for of_one in outputs]


@pytest.mark.parametrize("layout", ["linear", "shuffled"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_that_come_and_go(name: str, layout: str, tmp_path: Path, replays: list[int]) -> None:
    model = make_model(tmp_path, MODELS[name])
    want = generate(make_engine(model, layout, graphs=False), REQUESTS, ARRIVALS)
    assert not replays
    got = generate(make_engine(model, layout, graphs=True), REQUESTS, ARRIVALS)
    assert told(got) == told(want)
    assert len(replays) > 60
    assert len(set(replays)) == 2, "as many calls for any number of rows, and one less where the sampler draws"


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_masked_rows_are_drawn_natively_beside_others(
    num_draft_tokens: int, tmp_path: Path, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = [
        {"temperature": 0.0, "ignore_eos": True},
        {"temperature": 0.0, "grammar": Grammar("regex", "[0-9a-c]{20}")},
        {"seed": 2, "grammar": Grammar("regex", "[0-9a-c]*"), "ignore_eos": True},
        {"seed": 3, "top_k": 5, "ignore_eos": True},
        {"seed": 4, "logprobs": 1, "max_tokens": 6, "ignore_eos": True},
    ]
    requests = [([*STEM, n], SamplingParams(**{"max_tokens": 30, **each})) for n, each in enumerate(drawn)]
    model = make_model(tmp_path, QWEN3)
    want = generate(make_engine(model, "shuffled", graphs=False), requests, ARRIVALS)
    masked, calls = NativeGraphs.masked, []
    monkeypatch.setattr(NativeGraphs, "masked", lambda self, masks: calls.append(masks) or masked(self, masks))
    engine = make_engine(model, "shuffled", graphs=True, num_draft_tokens=num_draft_tokens)
    assert told(generate(engine, requests, ARRIVALS)) == told(want)
    assert len(replays) > 20 and len(calls) > 10


def test_guesses_are_rows_like_others(tmp_path: Path, replays: list[int]) -> None:
    model = make_model(tmp_path, QWEN3)
    want = generate(make_engine(model, "shuffled", graphs=False, num_draft_tokens=3), REQUESTS, ARRIVALS)
    engine = make_engine(model, "shuffled", graphs=True, num_draft_tokens=3)
    assert told(generate(engine, REQUESTS, ARRIVALS)) == told(want)
    assert engine.stats.num_accepted_tokens > 0
    assert replays


def test_preempted_rows_come_back(tmp_path: Path, replays: list[int]) -> None:
    model = make_model(tmp_path, {})
    requests = [([*STEM, n], SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)) for n in range(ROWS)]
    want = generate(make_engine(model, "shuffled", graphs=False, num_blocks=14), requests)
    engine = make_engine(model, "shuffled", graphs=True, num_blocks=14)
    assert told(generate(engine, requests)) == told(want)
    assert engine.stats.num_preemptions > 0
    assert len(replays) > 60


@pytest.mark.parametrize(
    ("settings", "dtype"), [(MOE, torch.bfloat16), ({}, torch.float32)], ids=["experts", "a product of PyTorch's"]
)
def test_a_pass_with_torch_in_it_runs_from_python(
    settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path, replays: list[int]
) -> None:
    model = make_model(tmp_path, settings, dtype)
    want = generate(make_engine(model, "linear", graphs=False), REQUESTS, ARRIVALS)
    assert told(generate(make_engine(model, "linear", graphs=True), REQUESTS, ARRIVALS)) == told(want)
    assert not replays


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["linear", "shuffled"])
def test_every_attention_that_the_kernels_have(layout: str, threads: int, tmp_path: Path, replays: list[int]) -> None:
    """Steps of random numbers of rows and lengths, with a window, softcap and sinks, bit for bit."""
    kernels = NativeKernels(threads)
    model = make_model(tmp_path, {}, kernels=kernels)
    for layer in model.model.layers:
        attention: Any = layer.self_attn.attn
        attention.spec = dataclasses.replace(attention.spec, sliding_window=24, softcap=20.0, sinks=True)
        attention.sinks = torch.linspace(-1.0, 1.0, 4)
    backend = CpuBackend(LAYOUTS[layout](16))
    backend._kernels = kernels
    generator = torch.Generator().manual_seed(0)
    caches = [backend.layout.allocate(spec, 64, CPU) for spec in model.attention_specs]
    for cache in caches:
        cache.key.normal_(generator=generator)
        cache.value.normal_(generator=generator)
    state = StepState(ROWS, MAX_LEN, 16, CPU)
    sampler = Sampler(ROWS, model.config.vocab_size, CPU, frozenset())
    graphs = NativeGraphs(ServedModel(model, backend, caches), kernels, rows_of(state, sampler), sampler.params)
    with torch.inference_mode():
        for step in range(24):
            rows = torch.randperm(ROWS, generator=generator)[: int(integers(generator, 1, ROWS + 1, 1))]
            blocks = torch.randperm(64, generator=generator)[: 8 * ROWS].view(ROWS, 8)
            state.tables[:, :8].copy_(blocks)  # the last column is a spare one
            state.lens.copy_(integers(generator, 0, MAX_LEN, ROWS))
            sampler.last_tokens.copy_(integers(generator, 0, 160, ROWS))
            positions = state.lens[rows]
            slots = state.tables[rows, positions // 16].long() * 16 + positions % 16
            decode = decode_rows(state.tables[rows], positions.int() + 1, MAX_LEN, None)
            context = StepContext(backend, caches, backend.build(StepBatch(slots, decode)))
            want = model.compute_logits(model(sampler.last_tokens[rows], positions, context))
            if step % 2:
                assert torch.equal(graphs.drawn(len(rows), inputs_of(rows))[1], want)
            else:
                assert torch.equal(
                    graphs.greedy(len(rows), inputs_of(rows)), torch.from_numpy(np.argmax(want.float().numpy(), -1))
                )
                assert torch.equal(sampler.last_tokens[rows], torch.from_numpy(np.argmax(want.float().numpy(), -1)))
            assert torch.equal(state.lens[rows], positions + 1)
    assert len(replays) == 24 - ROWS, "each number of rows was noted at its first step"


def inputs_of(rows: torch.Tensor) -> GraphInputs:
    return GraphInputs(rows.tolist(), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int32))


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=generator)


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_an_engine_replays_unless_told_not_to(enforce_eager: bool, replays: list[int]) -> None:
    llm = LLM(str(BUILT_IN), device="cpu", dtype="bfloat16", max_model_len=64, enforce_eager=enforce_eager)
    llm.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True), progress=False)
    assert bool(replays) != enforce_eager


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_memory_is_shared_only_by_what_is_not_needed_together(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=9))
    tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    numbers = st.integers(0, len(sizes) - 1)
    calls = data.draw(st.lists(st.lists(numbers, max_size=3), min_size=1, max_size=20))
    result = data.draw(numbers)
    pointers = [(tensors[index].data_ptr(), number) for number, call in enumerate(calls) for index in call]
    pointers.append((data.draw(st.sampled_from([0, 12345])), len(calls) - 1))  # of something else
    offsets, end = plan_arena(pointers, tensors, tensors[result])
    uses = {index: [n for n, call in enumerate(calls) if index in call] for index in range(len(sizes))}
    uses[result].append(len(pointers))
    spans = {index: (min(found), max(found)) for index, found in uses.items() if found}
    assert offsets.keys() == {tensors[index].data_ptr() for index in spans}
    for index, (first, last) in spans.items():
        start = offsets[tensors[index].data_ptr()]
        assert start % 64 == 0
        assert start + sizes[index] <= end
        for other, (other_first, other_last) in spans.items():
            if other != index and first <= other_last and other_first <= last:
                other_start = offsets[tensors[other].data_ptr()]
                assert start + sizes[index] <= other_start or other_start + sizes[other] <= start
