"""Builds a runner: device, dtype, attention path, weights, memory plan, KV cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from miniserve.attention.backends.build import block_bytes, build_backend, pool_limit, scratch_bytes
from miniserve.attention.backends.latent_base import CONTEXT_TOKENS
from miniserve.attention.platform import Platform, detect_platform
from miniserve.attention.routes import describe_routes
from miniserve.attention.select import Choice, select
from miniserve.attention.terms import name_of
from miniserve.config import EngineConfig, tuning_dir
from miniserve.core import EngineInfo, UserError
from miniserve.kernels import native, sampling
from miniserve.kernels.step_tensors import RowState
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.description import ModelConfig
from miniserve.models.generation_config import load_generation_defaults
from miniserve.models.kv_scales import set_kv_scales
from miniserve.models.layers.contracts import TRITON_LINEAR_FP8, find_products
from miniserve.models.layers.linear import Linear
from miniserve.models.loader import dummy_weights, load_weights, read_kv_scales
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, describe_products, weight_bytes
from miniserve.parallel.group import Alone, Group
from miniserve.parallel.settle import all_values, first, first_failure, least, together
from miniserve.runner.check_products import product_failure
from miniserve.runner.chunk_graph import ChunkGraphs
from miniserve.runner.device import find_dtype, find_kv_dtype, rank_device
from miniserve.runner.memory import MemoryPlan, available_bytes, check_weights_fit, plan_memory
from miniserve.runner.native_graph import NativeGraphs
from miniserve.runner.ranked import Progress
from miniserve.runner.rehearsal import rehearse
from miniserve.runner.runner import ModelRunner
from miniserve.runner.sampler import Sampler
from miniserve.runner.self_check import check_backend
from miniserve.runner.served import ServedModel, block_zeroer
from miniserve.runner.state import StepState
from miniserve.runner.traffic import measure_bandwidth, measure_sums, step_traffic
from miniserve.runner.tuning import load_preferred

if TYPE_CHECKING:
    from miniserve.kernels.triton.runtime import TritonKernels

# Most tokens in a step. Qwen3-8B on an H200 (docs/BENCHMARKS.md): twice as many raise the output by 1 % at most and
# double the gaps beside prefill; half as many cost up to 4 % and a third more TTFT.
_STEP_TOKENS = {"cuda": 4096, "cpu": 2048}


def build_runner(
    config: EngineConfig,
    source_path: Path,
    model_name: str,
    progress: Progress | None = None,
    group: Group | None = None,
) -> tuple[ModelRunner, EngineInfo]:
    """Load the model at `source_path` and make it ready to run steps. Raises `UserError` for whatever cannot be done.

    progress(what, done, total) is called while weights load, in bytes, and while graphs are captured. On a CPU
    PyTorch's number of threads is lowered where the model is too small to share between them. group: the ranks that
    share the model, of which this builds one; what only one of them finds out they settle together.
    """
    group = group or Alone()
    report = progress or (lambda what, done, total: None)
    with together(group):
        device = rank_device(config, group.rank)
        model_config = load_model_config(source_path, weights=config.load_format != "dummy")
        dtype = find_dtype(config.dtype, model_config.dtype)
        available = available_bytes(device, config.gpu_memory_utilization)
        if device.type == "cpu":
            available //= config.processes_here
        tokens = config.max_num_batched_tokens or _STEP_TOKENS[device.type]
        platform = detect_platform(device, dtype)
        platform = platform if config.aiter else platform.without_aiter()
    _check_ranks_agree(group, model_config, device, platform)
    options = _build_options(config, dtype, device, platform, group)
    model, weights = _build_checked(config, model_config, options, available, tokens)
    if device.type == "cpu":
        torch.set_num_threads(_num_threads(weights, config.processes_here))
    preferred = load_preferred(tuning_dir(), platform, model.attention_specs, config.block_size)
    choose = partial(
        select,
        model.attention_specs,
        platform,
        block_size=config.block_size,
        backend=config.attention_backend,
        layout=config.kv_layout,
        preferred=first(group, preferred, tuple[str, ...]),
    )
    sums = measure_sums(model)
    with together(group):
        # Before the weights are packed.
        traffic = step_traffic(model, choose().kv_layout, measure_bandwidth(device), sums)
        scales = _fill(model, config, source_path, partial(report, "weights"))
    path = _find_path(config, model, choose, weights, available - weights, tokens)
    plan, choice = path.plan, path.choice
    eos_token_ids = load_generation_defaults(source_path, config.generation_config).eos_token_ids
    runner = _make_runner(path.served, config, plan.max_model_len, tokens, eos_token_ids, report)
    attention = [*choice.explain(), *describe_routes(choice), *scales, *path.notes]
    attention += describe_products(model)
    # A CPU runs a step within launch(), and guesses need a step's tokens: nothing would overlap.
    overlaps = device.type != "cpu" and config.speculative is None
    return runner, EngineInfo(
        model=model_name,
        model_path=str(source_path),
        architecture=model_config.architecture,
        dtype=name_of(dtype),
        device=str(device),
        vocab_size=model_config.vocab_size,
        max_model_len=plan.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=tokens,
        block_size=config.block_size,
        num_blocks=plan.num_blocks,
        kv_layout=choice.layout,
        enable_prefix_caching=config.enable_prefix_caching,
        async_scheduling=overlaps if config.async_scheduling is None else config.async_scheduling,
        speculative=config.speculative,
        tensor_parallel_size=group.size,
        enable_expert_parallel=config.enable_expert_parallel,
        eos_token_ids=sorted(eos_token_ids),
        memory=plan.rows(),
        attention=attention,
        traffic=traffic,
    )


def _check_ranks_agree(group: Group, model: ModelConfig, device: torch.device, platform: Platform) -> None:
    """Raises `UserError` where ranks run other libraries, on other devices, or other models. (That their program and
    settings are the same, rank 0 has seen when they met.)"""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    _check_same(group, "version of PyTorch", str(torch.__version__), "the same on all hosts")
    _check_same(group, "device", f"{kind}, {platform}", "hosts and GPUs of one kind")
    _check_same(group, "model", repr(model), "the same files on all hosts")


def _build_checked(
    config: EngineConfig, model_config: ModelConfig, options: BuildOptions, available: int, tokens: int
) -> tuple[CausalLM, int]:
    """The model, of kernels that pass the self-check on all ranks, and the bytes of its weights."""
    while True:
        with together(options.group):
            model = build_model(model_config, options)
            weights = weight_bytes(model, options.device)
            check_weights_fit(weights, available, model)
        failure = product_failure(model, tokens) if config.self_check else None
        if failure is None:
            return model, weights
        name, sentence = failure
        options = replace(options, failed={**options.failed, name: f"the self-check failed: {sentence}"})


def _check_same(group: Group, what: str, value: str, remedy: str) -> None:
    """`value` is to be the same on all ranks. Raises `UserError`, on all of them, with two that differ."""
    values = all_values(group, value, str)
    other = next((rank for rank, each in enumerate(values) if each != values[0]), None)
    if other is not None:
        raise UserError(
            f"Ranks must have the same {what}: rank 0 has {values[0]:.200}, rank {other} {values[other]:.200}. "
            f"Use {remedy}."
        )


def _build_options(
    config: EngineConfig,
    dtype: torch.dtype,
    device: torch.device,
    platform: Platform,
    group: Group,
) -> BuildOptions:
    aiter, failed = find_products(platform)
    return BuildOptions(
        dtype=dtype,
        kv_dtype=find_kv_dtype(config.kv_cache_dtype, dtype, platform),
        device=device,
        max_model_len=config.max_model_len,
        native=native.NativeKernels() if device.type == "cpu" and native.unavailable_reason() is None else None,
        triton=_triton_kernels(device),
        aiter=aiter,
        platform=platform,
        failed=failed,
        fp8_activations=config.fp8_activations,
        group=group,
        expert_parallel=config.enable_expert_parallel,
    )


def _triton_kernels(device: torch.device) -> TritonKernels | None:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    from miniserve.kernels.triton.runtime import TritonKernels

    return TritonKernels(device)


@dataclass(frozen=True, slots=True)
class _Path:
    """An attention path in its pool. notes: what was found of it, in sentences."""

    choice: Choice
    plan: MemoryPlan
    served: ServedModel
    notes: list[str]


def _find_path(
    config: EngineConfig,
    model: CausalLM,
    choose: Callable[..., Choice],
    weights: int,
    available: int,
    tokens: int,
) -> _Path:
    """The first that `choose` finds and the self-check passes, on all ranks. Raises `UserError` where there is none."""
    group, device, rows = model.options.group, model.options.device, config.max_num_seqs
    longest = model.config.max_position_embeddings
    longest = min(config.max_model_len or longest, longest)
    activations = _activation_bytes(model, tokens, rows)
    failed: dict[tuple[str, str], str] = {}
    while True:
        with together(group):
            choice = choose(failed=failed)
            limit = pool_limit(choice, rows)
            plan = plan_memory(
                config,
                weights=weights,
                activations=activations + scratch_bytes(choice, rows, longest),
                available=available,
                block_bytes=block_bytes(choice),
                longest_context=longest,
                device=device,
                most_blocks=None if limit is None else limit.num_blocks,
            )
        _check_same(group, "attention path", f"{choice.backend} over the {choice.layout} layout", "--attention-backend")
        plan = plan.lowered(least(group, plan.num_blocks), config.block_size)
        notes = [limit.sentence(config.block_size)] if limit and limit.num_blocks == plan.num_blocks else []
        caches = [choice.kv_layout.allocate(spec, plan.num_blocks, device) for spec in choice.specs]
        options = choice.options(device, rows, plan.max_model_len)
        if not config.self_check:
            backend = build_backend(choice, options)
            return _Path(choice, plan, ServedModel(model, backend, caches), [*notes, "self-check: left out"])
        layers = [cast(Any, layer).self_attn.attn for layer in model.model.layers]
        checked = check_backend(choice, options, layers, caches)
        failure = first_failure(group, checked.failure)
        if failure is None:
            zero_blocks = block_zeroer(caches, config.block_size) if checked.needs_zeros else None
            served = ServedModel(model, checked.backend, caches, zero_blocks)
            return _Path(choice, plan, served, notes + checked.sentences())
        failed[choice.backend, choice.layout] = failure
        del caches, checked  # the next path's are as large


def _make_runner(
    served: ServedModel,
    config: EngineConfig,
    max_model_len: int,
    tokens: int,
    eos_token_ids: frozenset[int],
    report: Progress,
) -> ModelRunner:
    model, options, rows = served.model, served.model.options, config.max_num_seqs
    vocab_size, device = model.config.vocab_size, options.device
    state = StepState(rows, max_model_len, config.block_size, device)
    sampler = Sampler(rows, vocab_size, device, eos_token_ids, config.seed, _find_draw(options), options.group)
    row_state = RowState(state.tables, state.lens, sampler.last_tokens, sampler.num_outputs)
    # Sums over ranks work in graphs where most are kernels of the graph.
    sums = isinstance(options.group, Alone) or options.group.inboxes is not None
    replays = served.backend.graphs and not config.enforce_eager and sums
    if options.triton is None:
        native_graphs = None
        if replays and options.group.size == 1 and options.native is not None and served.zero_blocks is None:
            native_graphs = NativeGraphs(served, options.native, row_state, sampler.params)
        return ModelRunner(served, state, sampler, native_graphs)
    from miniserve.kernels.triton.sampling import compile_draw
    from miniserve.runner.decode_graph import DecodeGraphs, decode_buckets

    compile_draw(vocab_size, options.dtype, sampler.params)
    sizes = {"block_size": config.block_size, "max_seq_len": max_model_len}
    rehearse(served, **sizes, max_num_seqs=rows, max_tokens=tokens)
    if not replays:
        return ModelRunner(served, state, sampler)
    buckets, guesses = decode_buckets(rows), config.num_draft_tokens
    graphs = DecodeGraphs(served, row_state, sampler.params, **sizes, buckets=buckets, num_draft_tokens=guesses)
    graphs.capture(partial(report, "decode graphs"))
    chunk_graphs = None
    if served.backend.chunks_in_graphs:
        chunk_graphs = ChunkGraphs(served, **sizes, max_num_seqs=rows)
        chunk_graphs.capture(partial(report, "chunk graphs"))
    return ModelRunner(served, state, sampler, graphs, chunk_graphs)


def _find_draw(options: BuildOptions) -> sampling.Draw:
    if options.triton is not None:
        from miniserve.kernels.triton import sampling as triton_sampling

        return triton_sampling.draw
    return sampling.draw if options.native is None else options.native.draw


def _num_threads(weights: int, ranks: int) -> int:
    """A thread with less to read in a step than this loses more by waiting for the others than it brings, all the more
    where the API process wants a core too. ranks: how many share the cores."""
    return max(1, min(torch.get_num_threads() // ranks, weights // (16 << 20)))


def _fill(model: CausalLM, config: EngineConfig, path: Path, progress: Callable[[int, int], None]) -> list[str]:
    """Load the weights and the KV cache's scales. Returns what is to be said of these."""
    if config.load_format == "dummy":
        dummy_weights(model, config.seed, progress=progress)
        return set_kv_scales(model, {})
    load_weights(model, path, progress=progress)
    return [*model.config.notes, *set_kv_scales(model, read_kv_scales(model, path))]


def _activation_bytes(model: CausalLM, tokens: int, rows: int) -> int:
    """The largest that is alive at once, roughly: one layer's wide tensors for a full step, or the logits of all rows
    (with ranks: of this one's) with the sampler's copies of them."""
    config, options = model.config, model.options
    shard, itemsize = options.shard, options.dtype.itemsize
    q_heads, kv_heads = (part.size for part in shard.heads(config.num_heads, config.num_kv_heads))
    heads = (q_heads + 2 * kv_heads) * config.head_dim
    widest = config.widest_mlp(shard, expert_parallel=options.expert_parallel)
    layer = tokens * (3 * widest + 3 * config.hidden_size + 2 * heads) * itemsize
    if config.moe is not None:  # what each of a token's experts gives, in float32
        layer += tokens * config.moe.top_k * config.hidden_size * 4
    layer += max(_widened_bytes(model), default=0)
    if config.latent is not None:  # keys and values expanded from a piece of cached context
        layer += CONTEXT_TOKENS * q_heads * 2 * (config.head_dim + config.latent.v_head_dim) * itemsize
    logits = 3 * -(-min(rows, tokens) // shard.size) * config.vocab_size * 4
    return max(layer, logits)


def _widened_bytes(model: CausalLM) -> Iterator[int]:
    """Of each linear layer whose weight in 8 bits is written in 16 for some number of rows."""
    layers = [layer for layer in model.modules() if isinstance(layer, Linear)]
    for layer, route in ((layer, layer.method.route) for layer in layers):
        if route is not None and TRITON_LINEAR_FP8 in (kernel.name for kernel in route.kernels):
            yield layer.in_features * layer.out_features * model.options.dtype.itemsize
