"""Steps with chunks in graphs: what is laid out and padded for them, over the Triton kernels. Without a GPU the work
that a graph would hold runs again in place of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from thread_ranks import one_kernel_at_a_time, run_ranks
from triton_support import DEVICE, NATIVE, on_gpu

import miniserve
from miniserve.attention.backends.base import Backend, BackendOptions
from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.attention.backends.torch_mla import TorchLatentBackend
from miniserve.attention.backends.triton_attn import TritonBackend
from miniserve.attention.backends.triton_mla import TritonLatentBackend
from miniserve.attention.layouts import LAYOUTS
from miniserve.attention.platform import NAMED_PLATFORMS, detect_platform
from miniserve.config import SchedulerConfig
from miniserve.core import Request, SamplingParams
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.loader import load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model
from miniserve.parallel.group import Alone, Group
from miniserve.runner import chunk_graph
from miniserve.runner.chunk_graph import ChunkGraphs
from miniserve.runner.runner import ModelRunner
from miniserve.runner.sampler import Sampler
from miniserve.runner.served import ServedModel
from miniserve.runner.state import StepInputs, StepState
from miniserve.scheduler.scheduler import Scheduler

ASSETS = Path(miniserve.__file__).parent / "assets"
ROWS, LONGEST, BLOCK = 3, 64, 16
PROMPTS = (5, 4, 30, 20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers("tiny-qwen3", tmp_path_factory)


@pytest.fixture(scope="module")
def latent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_layers("tiny-deepseek", tmp_path_factory)


def two_layers(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first ones of a built-in model: Triton's interpreter takes its time."""
    folder = tmp_path_factory.mktemp("model")
    raw = json.loads((ASSETS / model / "config.json").read_text())
    dropped = tuple(f"model.layers.{number}." for number in range(2, raw["num_hidden_layers"]))
    raw |= {"num_hidden_layers": 2, "layer_types": raw.get("layer_types", [])[:2] or None}
    (folder / "config.json").write_text(json.dumps(raw))
    weights = load_file(ASSETS / model / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(dropped)}
    save_file(kept, folder / "model.safetensors")
    return folder


def load(folder: Path, group: Group) -> CausalLM:
    options = BuildOptions(dtype=torch.float32, kv_dtype=torch.float32, device=torch.device(DEVICE), group=group)
    model = build_model(load_model_config(folder), options)
    load_weights(model, folder)
    return model


def serve(model: CausalLM, layout_name: str, make_graphs: Callable[..., ChunkGraphs] | None) -> dict[str, list[int]]:
    """Without graphs: over PyTorch's attention."""
    layout = LAYOUTS[layout_name](BLOCK)
    options = BackendOptions(
        specs=tuple(model.attention_specs),
        routes=(),
        platform=detect_platform(DEVICE, torch.float32) if NATIVE else NAMED_PLATFORMS["h100"],
        device=DEVICE,
        max_rows=ROWS,
        max_seq_len=LONGEST,
    )
    kinds: tuple[type[Backend[Any]], type[Backend[Any]]] = (TorchBackend, TritonBackend)
    if layout_name == "latent":
        kinds = TorchLatentBackend, TritonLatentBackend
    backend = kinds[0](layout)
    if make_graphs is not None:
        backend = kinds[1](layout, options)
        backend.chunks_in_graphs = 2
    caches = [layout.allocate(spec, 32, DEVICE) for spec in model.attention_specs]
    served, graphs = ServedModel(model, backend, caches), None
    if make_graphs is not None:
        graphs = make_graphs(served, block_size=BLOCK, max_num_seqs=ROWS, max_seq_len=LONGEST)
        with torch.inference_mode():
            graphs.capture()
    runner = ModelRunner(
        served,
        StepState(ROWS, LONGEST, BLOCK, DEVICE),
        Sampler(ROWS, model.config.vocab_size, DEVICE, frozenset(), seed=0, group=model.options.group),
        chunk_graphs=graphs,
    )
    config = SchedulerConfig(
        num_blocks=32, block_size=BLOCK, max_num_seqs=ROWS, max_num_batched_tokens=24, max_model_len=LONGEST
    )
    loop = EngineLoop(Scheduler(config), runner, StepLog(None, ROWS), overlap=False)
    rng = random.Random(0)
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    for number, length in enumerate(PROMPTS):
        prompt = [rng.randrange(2000) for _ in range(length)]
        loop.add(Request(request_id=str(number), prompt_token_ids=prompt, params=params))
    tokens: dict[str, list[int]] = {}
    while loop.has_work:
        for output in loop.step():
            tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
    return tokens


class Counted(ChunkGraphs):
    def __init__(self, *args: Any, **sizes: Any) -> None:
        super().__init__(*args, **sizes)
        self.steps: list[bool] = []  # whether a graph held it
        self.contexts: list[bool] = []  # whether chunks had cached tokens

    def run(self, inputs: StepInputs) -> torch.Tensor | None:
        hidden = super().run(inputs)
        self.steps.append(hidden is not None)
        self.contexts.append(inputs.batch.extend is not None)
        return hidden


def counted(made: list[Counted]) -> Callable[..., ChunkGraphs]:
    """Makes graphs and adds them to `made`."""

    def make(*args: Any, **sizes: Any) -> ChunkGraphs:
        made.append(Counted(*args, **sizes))
        return made[-1]

    return make


@pytest.fixture
def few_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_graph, "_TOKENS", (16, 24))
    if not NATIVE:
        monkeypatch.setattr(chunk_graph, "_record", run_again)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.parametrize("layout", ["shuffled", pytest.param("linear", marks=on_gpu)])
def test_tokens_are_those_of_steps_without_graphs(layout: str, folder: Path) -> None:
    model, made = load(folder, Alone()), list[Counted]()
    expected = serve(model, layout, None)
    assert serve(model, layout, counted(made)) == expected
    assert len(expected) == len(PROMPTS)
    (graphs,) = made
    assert graphs.steps.count(True) >= 2 and graphs.steps.count(False) >= 1  # the first step has too many chunks


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.skipif(NATIVE, reason="PyTorch's operations, which take chunks in float32, cannot be captured")
def test_chunks_of_latent_attention_are_in_graphs_where_nothing_of_them_is_cached(latent_folder: Path) -> None:
    model, made = load(latent_folder, Alone()), list[Counted]()
    expected = serve(model, "latent", None)
    assert serve(model, "latent", counted(made)) == expected
    (graphs,) = made
    assert graphs.steps.count(True) >= 1 and graphs.contexts.count(True) >= 1
    assert not any(in_graph and cached for in_graph, cached in zip(graphs.steps, graphs.contexts, strict=True))


@pytest.mark.usefixtures("few_graphs")
@pytest.mark.skipif(NATIVE, reason="threads with graphs on one GPU: tests/parallel/test_parallel_gpu.py")
def test_ranks_replay_alike(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_kernel_at_a_time(monkeypatch)
    expected = serve(load(folder, Alone()), "shuffled", None)

    def found(group: Group) -> tuple[dict[str, list[int]], list[bool]]:
        made = list[Counted]()
        return serve(load(folder, group), "shuffled", counted(made)), made[0].steps

    first, second = run_ranks(2, found)
    assert first == second
    assert first[0] == expected and True in first[1]


def run_again(work: Callable[[], torch.Tensor], pool: Any) -> chunk_graph._Graph:
    hidden = torch.full_like(work(), float("nan"))
    return chunk_graph._Graph(lambda: hidden.copy_(work()), hidden)  # type: ignore[arg-type,return-value]
