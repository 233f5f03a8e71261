"""What attention a model would get on some hardware and why, from its config.json: no weights and no GPU are needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from miniserve.attention.backends.build import block_bytes, pool_limit, scratch_bytes
from miniserve.attention.contracts import CONTRACTS
from miniserve.attention.platform import DEVICE_BANDWIDTH, NAMED_PLATFORMS, Platform, detect_platform
from miniserve.attention.select import Choice, select
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import LayerRoute
from miniserve.config import EngineConfig, tuning_dir
from miniserve.core import UserError
from miniserve.engine.roofline import step_floor
from miniserve.models.decoder import CausalLM
from miniserve.models.description import ModelConfig
from miniserve.models.registry import (
    MXFP4,
    check_ranks,
    describe_products,
    described_model,
    least_ranks,
    weight_bytes,
)
from miniserve.parallel.shard import Shard
from miniserve.runner.device import find_dtype, find_kv_dtype
from miniserve.runner.memory import GPU_SHARE
from miniserve.runner.traffic import measure_bandwidth, step_traffic
from miniserve.runner.tuning import load_preferred

CONTEXT = 1024  # tokens of each row, in a step's floor
_FLOOR_ROWS = (1, 8, 64)
SUM_SECONDS = 7.3e-6  # one over ranks, of a row of 4096: two H200s, whatever library


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """Layers whose attention is the same. layers: their indices; spec None: they have no KV cache."""

    layers: tuple[int, ...]
    spec: AttentionSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A backend over a layout: the kernels of each kind of layer with a KV cache, or the reasons it cannot be had (the
    layout is then "" where no layout would help)."""

    backend: str
    layout: str
    routes: tuple[LayerRoute, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Of each GPU, in bytes; None where it is not known. tokens: that the KV cache has room for, all sequences
    together, beside weights and scratch in `usable`. least_tp: where there is none, how many GPUs would have some.
    bounded: why it has no more tokens though there is memory, a sentence."""

    total: int | None
    usable: int | None
    weights: int | None
    scratch: int
    kv_bytes_per_token: int
    tokens: int | None
    least_tp: int | None
    bounded: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """config: of the whole model. tp: how many ranks share it, of which the first one's part is shown. paths: every
    backend and layout, the chosen one among them. products: what multiplies linear layers and experts, notes:
    sentences. floors: by a decode step's rows the least seconds of its parts, with `num_sums` sums over ranks; none
    where the device's bandwidth is not known or the engine cannot run the model."""

    model: str
    config: ModelConfig
    device: str
    tp: int
    expert_parallel: bool
    max_model_len: int
    kinds: tuple[LayerKind, ...]
    choice: Choice
    paths: tuple[Path, ...]
    memory: Memory
    products: tuple[str, ...]
    bandwidth: float
    num_sums: int
    floors: dict[int, dict[str, float]]
    notes: tuple[str, ...]


def explain(name: str, model: ModelConfig, config: EngineConfig, device: str) -> Explanation:
    """device: auto or one of `NAMED_PLATFORMS`, in place of config's. Raises `UserError` where what was wished cannot
    be had, with every reason."""
    dtype = find_dtype(config.dtype, model.dtype)
    platform, total, bandwidth = _hardware(device, dtype)
    platform = platform if config.aiter else platform.without_aiter()
    by_expert = config.enable_expert_parallel
    usable = None if total is None else int(total * (config.gpu_memory_utilization or GPU_SHARE))
    tp = config.tensor_parallel_size or _least_tp(model, dtype, platform, usable, by_expert) or 1
    check_ranks(model, tp, expert_parallel=by_expert)
    kv_dtype, shard = find_kv_dtype(config.kv_cache_dtype, dtype, platform), Shard(0, tp)  # which has the most
    layers = [
        model.attention_spec(layer, dtype, kv_dtype, shard) if model.has_kv_cache(layer) else None
        for layer in range(model.num_layers)
    ]
    specs = [spec for spec in layers if spec is not None]
    choice = select(
        specs,
        platform,
        block_size=config.block_size,
        backend=config.attention_backend,
        layout=config.kv_layout,
        preferred=load_preferred(tuning_dir(), platform, specs, config.block_size),
    )
    built = described_model(
        model, dtype, platform, shard, expert_parallel=by_expert, fp8_activations=config.fp8_activations
    )
    num_sums = 2 * model.num_layers if tp > 1 else 0
    traffic = step_traffic(built, choice.kv_layout, bandwidth, num_sums * SUM_SECONDS)
    rows = _FLOOR_ROWS if bandwidth and not model.missing else ()
    longest = min(config.max_model_len or model.max_position_embeddings, model.max_position_embeddings)
    kinds = tuple(
        LayerKind(layers=tuple(index for index, other in enumerate(layers) if other == spec), spec=spec)
        for spec in dict.fromkeys(layers)
    )
    return Explanation(
        model=name,
        config=model,
        device=device,
        tp=tp,
        expert_parallel=by_expert,
        max_model_len=longest,
        kinds=kinds,
        choice=choice,
        paths=tuple(_paths(specs, platform, config.block_size)),
        memory=_memory(built, choice, config, total, usable, longest),
        products=tuple(describe_products(built)),
        bandwidth=bandwidth or 0.0,
        num_sums=num_sums,
        floors={count: step_floor(traffic, count, CONTEXT) for count in rows},
        notes=tuple(_notes(model, config, device, tp, platform)),
    )


def _hardware(device: str, dtype: torch.dtype) -> tuple[Platform, int | None, float | None]:
    """The platform, its memory in bytes, and the memory's bandwidth in bytes a second."""
    if device in NAMED_PLATFORMS:
        return NAMED_PLATFORMS[device], NAMED_PLATFORMS[device].memory or None, DEVICE_BANDWIDTH.get(device)
    if device != "auto":
        raise UserError(f"--device {device!r} is not known; choose one of auto, {', '.join(NAMED_PLATFORMS)}.")
    if not torch.cuda.is_available():
        return detect_platform(torch.device("cpu"), dtype), None, None
    here = torch.device("cuda")
    platform = detect_platform(here, dtype)
    return platform, platform.memory, measure_bandwidth(here)


def _paths(specs: Sequence[AttentionSpec], platform: Platform, block_size: int) -> Iterator[Path]:
    for contract in CONTRACTS:
        if reasons := contract.refusals(specs, platform):
            yield Path(backend=contract.name, layout="", reasons=tuple(reasons))
            continue
        for layout in platform.order(contract.layouts):
            routes, reasons = contract.routes(specs, platform, layout, block_size)
            kinds = tuple(dict(zip(specs, routes, strict=False)).values())
            yield Path(backend=contract.name, layout=layout, routes=kinds, reasons=tuple(reasons))


def _memory(
    built: CausalLM, choice: Choice, config: EngineConfig, total: int | None, usable: int | None, longest: int
) -> Memory:
    block, platform, model = block_bytes(choice), choice.platform, built.config
    weights = weight_bytes(built, "cpu" if platform.arch == "cpu" else "cuda") if _is_counted(model) else None
    scratch = scratch_bytes(choice, config.max_num_seqs, longest)
    limit = pool_limit(choice, config.max_num_seqs)
    tokens = bounded = None
    if usable is not None and weights is not None:
        blocks = max(0, usable - weights - scratch) // block
        if limit is not None and limit.num_blocks < blocks:
            blocks, bounded = limit.num_blocks, limit.sentence(config.block_size)
        tokens = blocks * config.block_size
    return Memory(
        total=total,
        usable=usable,
        weights=weights,
        scratch=scratch,
        kv_bytes_per_token=block // config.block_size,
        tokens=tokens,
        least_tp=_least_tp(model, built.options.dtype, platform, usable, config.enable_expert_parallel)
        if tokens == 0
        else None,
        bounded=bounded,
    )


def _least_tp(
    model: ModelConfig, dtype: torch.dtype, platform: Platform, usable: int | None, by_expert: bool
) -> int | None:
    if usable is None or not _is_counted(model):
        return None
    return least_ranks(model, dtype, platform, usable, expert_parallel=by_expert)


def _is_counted(model: ModelConfig) -> bool:
    """Whether it is known what its weights take."""
    return model.quantization is None or model.quantization.unknown in (None, MXFP4)


def _notes(model: ModelConfig, config: EngineConfig, device: str, tp: int, platform: Platform) -> Iterator[str]:
    yield from model.missing
    if tp > 1:
        fewest = "" if config.tensor_parallel_size else ", the fewest that the model fits, as `run` takes,"
        yield f"the part of the first of {tp} {platform.holder}s{fewest} is shown; none has more"
    if model.latent is None and tp > (count := model.num_kv_heads):
        several = f"{tp // count}{'' if tp % count == 0 else f' or {tp // count + 1}'}"
        yield f"{count} KV heads on {tp} {platform.holder}s: each head's cache is kept on {several} of them"
    if model.latent is not None and tp > 1:
        yield f"the latent cache is the same for all heads and is kept whole on each of {tp} {platform.holder}s"
    if model.linear is not None:
        yield "layers of linear attention keep a state of fixed size for each sequence, which is not counted"
    if model.quantization is not None and model.quantization.kv_scales and config.kv_cache_dtype == "auto":
        yield "the checkpoint states scales for an fp8 KV cache; --kv-cache-dtype fp8 shows one"
    if device in NAMED_PLATFORMS and platform.aiter_version is not None:
        yield f"aiter v{'.'.join(map(str, platform.aiter_version))} and Triton are taken to be installed"
