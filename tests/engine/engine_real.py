"""Shared by the tests of the whole engine: a scheduler, a runner and a loop over a real small model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from models_support import random_settings, reference_model

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.cpu_attn import CpuBackend
from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.attention.backends.torch_mla import TorchLatentBackend
from miniserve.attention.layouts import LAYOUTS, LatentLayout
from miniserve.config import SchedulerConfig
from miniserve.core import Request, RequestOutput, SamplingParams
from miniserve.engine.grammar import Matchers, Words
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.engine.tokenizer import Tokenizer
from miniserve.kernels import native
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.loader import load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model
from miniserve.runner.runner import ModelRunner
from miniserve.runner.sampler import Sampler
from miniserve.runner.served import ServedModel
from miniserve.runner.state import StepState
from miniserve.scheduler.scheduler import Scheduler

CPU = torch.device("cpu")
KERNELS = None if native.unavailable_reason() else native.NativeKernels()
BACKENDS = ("TORCH_ATTN",) if KERNELS is None else ("CPU_ATTN", "TORCH_ATTN")
MAX_LEN = 128


@dataclass(frozen=True)
class Setup:
    """How an engine is put together; every field is something that must not change anybody's tokens."""

    backend: str = "TORCH_ATTN"
    layout: str = "linear"
    block_size: int = 16
    num_blocks: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512
    prefix_caching: bool = True
    overlap: bool = False
    num_draft_tokens: int = 0


def small_model(path: Path, architecture: str, number: int, native_ops: bool = False) -> CausalLM:
    """Our model of a random transformers checkpoint of up to MAX_LEN positions, written to `path`."""
    write_model(path, architecture, number)
    return read_model(path, native=KERNELS if native_ops else None)


def write_model(path: Path, architecture: str, number: int, **changed: Any) -> None:
    """changed: settings other than those drawn by the number."""
    settings = random_settings(architecture, number) | changed
    settings["max_position_embeddings"] = MAX_LEN
    rope = settings["rope_parameters"]
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] *= 2  # models_support stretches them to 64 positions
    reference_model(architecture, settings, seed=number).save_pretrained(path)


def read_model(path: Path, **options: Any) -> CausalLM:
    """options: of `BuildOptions`."""
    model = build_model(
        load_model_config(path), BuildOptions(dtype=torch.float32, kv_dtype=torch.float32, device=CPU, **options)
    )
    load_weights(model, path)
    return model


def make_backend(model: CausalLM, setup: Setup) -> Backend[Any]:
    """Models with latent attention have one layout and one backend, whatever the setup says."""
    if model.config.latent is not None:
        latent = TorchLatentBackend(LatentLayout(setup.block_size))
        latent.context_tokens = 11
        return latent
    layout = LAYOUTS[setup.layout](setup.block_size)
    return CpuBackend(layout) if setup.backend == "CPU_ATTN" and KERNELS else TorchBackend(layout)


def make_engine(
    model: CausalLM, setup: Setup, eos_token_ids: Iterable[int] = ()
) -> tuple[EngineLoop, Scheduler, SchedulerConfig]:
    backend = make_backend(model, setup)
    layout = backend.layout
    caches = [layout.allocate(spec, setup.num_blocks, CPU) for spec in model.attention_specs]
    eos = frozenset(eos_token_ids)
    config = SchedulerConfig(
        num_blocks=setup.num_blocks,
        block_size=setup.block_size,
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        max_model_len=MAX_LEN,
        enable_prefix_caching=setup.prefix_caching,
        eos_token_ids=eos,
        num_draft_tokens=setup.num_draft_tokens,
    )
    runner = ModelRunner(
        ServedModel(model, backend, caches),
        StepState(setup.max_num_seqs, MAX_LEN, setup.block_size, CPU),
        Sampler(setup.max_num_seqs, model.config.vocab_size, CPU, eos, group=model.options.group),
    )
    scheduler = Scheduler(config)
    matchers = make_matchers(model.config.vocab_size, eos)
    log = StepLog(None, setup.max_num_seqs)
    return EngineLoop(scheduler, runner, log, matchers, overlap=setup.overlap), scheduler, config


@cache
def make_matchers(vocab_size: int, eos_token_ids: frozenset[int]) -> Matchers:
    """Over a tokenizer whose first ids are bytes."""
    return Matchers(lambda: Words(Tokenizer("/nowhere", stand_in_vocab_size=vocab_size), vocab_size, eos_token_ids))


def generate(
    engine: EngineLoop, requests: Sequence[tuple[list[int], SamplingParams]], arrivals: Sequence[int] | None = None
) -> list[list[RequestOutput]]:
    """Run all requests to their end; request i is added before step `arrivals[i]`. Returns each one's outputs."""
    outputs: list[list[RequestOutput]] = [[] for _ in requests]
    waiting = sorted(range(len(requests)), key=lambda i: (arrivals[i] if arrivals else 0, i))
    step = 0
    while waiting or engine.has_work:
        while waiting and (not arrivals or arrivals[waiting[0]] <= step or not engine.has_work):
            i = waiting.pop(0)
            prompt, params = requests[i]
            engine.add(Request(request_id=str(i), prompt_token_ids=prompt, params=params))
        for output in engine.step():
            outputs[int(output.request_id)].append(output)
        step += 1
        assert step < 5000, "the engine does not get on"
    return outputs


def tokens(outputs: Sequence[RequestOutput]) -> list[int]:
    return [token for output in outputs for token in output.new_token_ids]
