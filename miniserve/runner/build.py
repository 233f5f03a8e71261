"""Builds a runner: device, dtype, attention path, weights, memory plan, KV cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.build import block_bytes, build_backend, scratch_bytes
from miniserve.attention.backends.latent_base import CONTEXT_TOKENS
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.layouts import LAYOUTS, KVCache
from miniserve.attention.routes import describe_routes
from miniserve.attention.select import Choice, select
from miniserve.config import EngineConfig, tuning_dir
from miniserve.core import EngineInfo, StepTraffic
from miniserve.kernels import native
from miniserve.models.config import ModelConfig, load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.generation_config import load_generation_defaults
from miniserve.models.kv_scales import set_kv_scales
from miniserve.models.layers.aiter_moe import describe_experts, find_experts
from miniserve.models.loader import dummy_weights, load_weights, read_kv_scales
from miniserve.models.registry import build_model, weight_bytes
from miniserve.runner.chunk_graph import ChunkGraphs
from miniserve.runner.device import find_device, find_dtype, find_kv_dtype, find_platform
from miniserve.runner.memory import MemoryPlan, available_bytes, check_weights_fit, plan_memory
from miniserve.runner.native_graph import NativeGraphs
from miniserve.runner.runner import ModelRunner, StepGraphs
from miniserve.runner.sampler import Sampler
from miniserve.runner.self_check import checked_backend
from miniserve.runner.state import StepState
from miniserve.runner.traffic import measure_bandwidth, step_traffic
from miniserve.runner.tuning import load_preferred

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels
    from miniserve.kernels.triton.sampling import RowParams
    from miniserve.runner.decode_graph import DecodeGraphs
    from miniserve.runner.sampling_device import DeviceDraw

Progress = Callable[[str, int, int], None]


def build_runner(
    config: EngineConfig, source_path: Path, model_name: str, progress: Progress | None = None
) -> tuple[ModelRunner, EngineInfo]:
    """Load the model at `source_path` and make it ready to run steps. Raises `UserError` for whatever cannot be done.

    progress(what, done, total) is called while weights load, in bytes. On a CPU PyTorch's number of threads is lowered
    where the model is too small to share between them.
    """
    device = find_device(config.device)
    model_config = load_model_config(source_path)
    dtype = find_dtype(config.dtype, model_config.dtype)
    available = available_bytes(device, config.gpu_memory_utilization)
    weights = weight_bytes(model_config, dtype, device)
    check_weights_fit(weights, available, device)
    longest = min(config.max_model_len or model_config.max_position_embeddings, model_config.max_position_embeddings)
    if device.type == "cpu":
        torch.set_num_threads(_num_threads(weights))
    platform = find_platform(config.device, device, dtype)
    platform = platform if config.aiter else platform.without_aiter()
    experts = find_experts(platform, dtype)
    kernels = native.load() if device.type == "cpu" and native.unavailable_reason() is None else None
    model = build_model(
        model_config,
        dtype=dtype,
        kv_dtype=find_kv_dtype(config.kv_cache_dtype, dtype, platform),
        device=device,
        max_model_len=config.max_model_len or longest,
        native=kernels,
        triton=_triton_kernels(device),
        experts=None if isinstance(experts, str) else experts,
    )
    choice = select(
        model.attention_specs,
        platform,
        block_size=config.block_size,
        backend=config.attention_backend,
        layout=config.kv_layout,
        preferred=load_preferred(tuning_dir(), platform, model.attention_specs, config.block_size),
    )
    layout = LAYOUTS[choice.layout](config.block_size)
    traffic = step_traffic(model, layout, measure_bandwidth(device))  # before the weights are packed
    scales = _fill(model, config, source_path, progress)
    plan = plan_memory(
        config,
        weights=weights,
        activations=_activation_bytes(model_config, config, dtype)
        + scratch_bytes(choice, model.attention_specs, platform, config.max_num_seqs, longest),
        available=available - weights,
        block_bytes=block_bytes(choice, layout, model.attention_specs),
        longest_context=longest,
        device=device,
    )
    caches = [layout.allocate(spec, plan.num_blocks, device) for spec in model.attention_specs]
    eos_token_ids = load_generation_defaults(source_path, config.generation_config).eos_token_ids
    options = BackendOptions(
        specs=tuple(model.attention_specs),
        routes=choice.routes,
        platform=platform,
        device=device,
        max_rows=config.max_num_seqs,
        max_seq_len=plan.max_model_len,
    )
    if config.self_check:
        layers = [cast(Any, layer).self_attn.attn for layer in model.model.layers]
        backend, checked = checked_backend(choice, config.block_size, options, layers, caches)
    else:
        backend, checked = build_backend(choice, config.block_size, options), ["self-check: left out"]
    state = StepState(config.max_num_seqs, plan.max_model_len, config.block_size, device)
    draw = _device_draw(config.max_num_seqs, model_config.vocab_size, dtype, device)
    sampler = Sampler(config.max_num_seqs, model_config.vocab_size, device, eos_token_ids, config.seed, draw)
    graphs: StepGraphs | None = None
    chunk_graphs: ChunkGraphs | None = None
    if draw is not None and backend.graphs and not config.enforce_eager:
        graphs = _graphs(model, backend, caches, state, sampler, draw.params, config, plan, progress)
        # What padding holds is anything, also NaN, for which experts cannot be chosen.
        if backend.chunk_graphs and model_config.moe is None:
            chunk_graphs = _chunk_graphs(model, backend, caches, config, plan, progress)
    if kernels is not None and backend.graphs and not platform.emulated and not config.enforce_eager:
        graphs = NativeGraphs(model, backend, caches, kernels, state, sampler)
    runner = ModelRunner(model, backend, caches, state, sampler, graphs, chunk_graphs)
    attention = [*choice.explain(), *describe_routes(choice, model.attention_specs, platform), *scales, *checked]
    if (method := model.moe_method) is not None:
        attention.append(describe_experts(method.name, experts if isinstance(experts, str) else None))
    return runner, _info(
        config, model_config, source_path, model_name, device, dtype, choice, attention, plan, eos_token_ids, traffic
    )


def _has_triton(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def _device_draw(max_num_seqs: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> DeviceDraw | None:
    if not _has_triton(device):
        return None
    from miniserve.runner.sampling_device import DeviceDraw

    draw = DeviceDraw(max_num_seqs, device)
    draw.compile(vocab_size, dtype)
    return draw


def _triton_kernels(device: torch.device) -> TritonKernels | None:
    if not _has_triton(device):
        return None
    from miniserve.kernels.triton.runtime import TritonKernels

    return TritonKernels(device)


def _graphs(
    model: CausalLM,
    backend: Backend[Any],
    caches: list[KVCache],
    state: StepState,
    sampler: Sampler,
    params: RowParams,
    config: EngineConfig,
    plan: MemoryPlan,
    progress: Progress | None,
) -> DecodeGraphs:
    from miniserve.kernels.triton.decode_step import RowState
    from miniserve.runner.decode_graph import DecodeGraphs, decode_buckets

    graphs = DecodeGraphs(
        model,
        backend,
        caches,
        RowState(state.tables, state.lens, sampler.last_tokens, sampler.num_outputs),
        params,
        block_size=config.block_size,
        max_seq_len=plan.max_model_len,
        buckets=decode_buckets(config.max_num_seqs),
        explicit=config.speculative is not None,
    )
    with torch.inference_mode():
        graphs.capture(None if progress is None else lambda done, total: progress("decode graphs", done, total))
    return graphs


def _chunk_graphs(
    model: CausalLM,
    backend: Backend[Any],
    caches: list[KVCache],
    config: EngineConfig,
    plan: MemoryPlan,
    progress: Progress | None,
) -> ChunkGraphs:
    graphs = ChunkGraphs(
        model,
        backend,
        caches,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_seq_len=plan.max_model_len,
    )
    with torch.inference_mode():
        graphs.capture(None if progress is None else lambda done, total: progress("chunk graphs", done, total))
    return graphs


def _info(
    config: EngineConfig,
    model_config: ModelConfig,
    source_path: Path,
    model_name: str,
    device: torch.device,
    dtype: torch.dtype,
    choice: Choice,
    attention: list[str],
    plan: MemoryPlan,
    eos_token_ids: frozenset[int],
    traffic: StepTraffic,
) -> EngineInfo:
    # A CPU runs a step within launch(), and guesses need a step's tokens: nothing would overlap.
    overlaps = device.type != "cpu" and config.speculative is None
    return EngineInfo(
        model=model_name,
        model_path=str(source_path),
        architecture=model_config.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        vocab_size=model_config.vocab_size,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        kv_layout=choice.layout,
        enable_prefix_caching=config.enable_prefix_caching,
        async_scheduling=overlaps if config.async_scheduling is None else config.async_scheduling,
        speculative=config.speculative,
        eos_token_ids=sorted(eos_token_ids),
        memory=plan.rows(),
        attention=attention,
        traffic=traffic,
    )


def _num_threads(weights: int) -> int:
    """A thread with less to read in a step than this loses more by waiting for the others than it brings, all the more
    where the API process wants a core too."""
    return max(1, min(torch.get_num_threads(), weights // (16 << 20)))


def _fill(model: CausalLM, config: EngineConfig, path: Path, progress: Progress | None) -> list[str]:
    """Load the weights and the KV cache's scales. Returns what is to be told of these."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("weights", done, total)

    if config.load_format == "dummy":
        dummy_weights(model, config.seed, progress=report)
        return set_kv_scales(model, {})
    load_weights(model, path, progress=report)
    return set_kv_scales(model, read_kv_scales(model, path))


def _activation_bytes(model: ModelConfig, config: EngineConfig, dtype: torch.dtype) -> int:
    """The largest that is alive at once, roughly: one layer's wide tensors for a full step, or the logits of all rows
    with the sampler's copies of them."""
    tokens = config.max_num_batched_tokens
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    copies = 3 + (model.moe.top_k if model.moe is not None else 0)  # each of a token's experts is given its own
    layer = tokens * (3 * model.widest_mlp + copies * model.hidden_size + 2 * heads) * dtype.itemsize
    if model.latent is not None:  # keys and values expanded from a piece of cached context
        layer += CONTEXT_TOKENS * model.num_heads * 2 * (model.head_dim + model.latent.v_head_dim) * dtype.itemsize
    logits = 3 * min(config.max_num_seqs, tokens) * model.vocab_size * 4
    return max(layer, logits)
