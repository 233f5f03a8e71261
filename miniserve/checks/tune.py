"""`miniserve tune`: measure which attention path decodes a model's layers fastest here, for `select` to prefer."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.build import build_backend
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import StepBatch, decode_rows
from miniserve.attention.select import Choice
from miniserve.attention.spec import AttentionLayer, LatentLayer
from miniserve.checks.check_paths import AttentionPath, Machine, made_up_layer
from miniserve.core import summary
from miniserve.runner.check_problem import token_shapes

_MEASURE = 0.2  # seconds for each figure
_CACHED = 512 << 20  # bytes; a run that reads fewer would find them in the GPU's cache
_MOST_LAYERS = 16


@dataclass(frozen=True, slots=True)
class Timing:
    """seconds: of one decode step's attention through all layers, by batch size; every row is `context` tokens long."""

    path: AttentionPath
    context: int
    seconds: dict[int, float]


def fault(machine: Machine, path: AttentionPath) -> str | None:
    """Why a path must not be preferred, however fast: its results are wrong here, or it fails."""
    try:
        wrong = [result for result in machine.check(path).checks if not result.ok]
    except Exception as error:  # a library may raise anything while the backend is made
        return summary(error)
    return wrong[0].sentence() if wrong else None


def time_path(machine: Machine, path: AttentionPath, batches: Sequence[int], context: int) -> Timing:
    """Measure one path."""
    choice = machine.choose(path)
    kinds = Counter(zip(choice.specs, choice.routes, strict=True))
    seconds = {
        batch: sum(
            count * _time_kind(machine.device, replace(choice, specs=(spec,), routes=(route,)), batch, context)
            for (spec, route), count in kinds.items()
        )
        for batch in batches
    }
    return Timing(path, context, seconds)


def rank(timings: Sequence[Timing]) -> list[Timing]:
    """Best first, by the geometric mean over the batch sizes of the time relative to the fastest's."""
    fastest = {batch: min(timing.seconds[batch] for timing in timings) for batch in timings[0].seconds}
    return sorted(
        timings, key=lambda timing: sum(math.log(timing.seconds[batch] / fastest[batch]) for batch in fastest)
    )


def _time_kind(device: torch.device, choice: Choice, batch: int, context: int) -> float:
    """Seconds of one layer, choice's only one, measured over the KV caches of so many that the GPU's cache holds none
    of them."""
    layout, (spec,), width = choice.kv_layout, choice.specs, -(-context // choice.block_size)
    needed = batch * width * layout.block_bytes(spec)
    copies = 1 if device.type != "cuda" else min(_MOST_LAYERS, max(1, -(-_CACHED // needed)))
    choice = replace(choice, specs=choice.specs * copies, routes=choice.routes * copies)
    backend = build_backend(choice, choice.options(device, batch, context))
    caches = [layout.allocate(spec, batch * width, device) for _ in range(copies)]
    layers = [made_up_layer(spec, device) for _ in range(copies)]
    for index, layer in enumerate(layers):
        layer.layer_index = index
    captured = backend.graphs and device.type == "cuda"
    step = _step(backend, layers, caches, _batch(batch, context, choice.block_size, device, captured=captured))
    with torch.inference_mode():
        found = _measure_gpu(step, captured=captured) if device.type == "cuda" else _measure_cpu(step)
    del backend, caches, layers, step
    gc.collect()
    return found / copies


def _batch(rows: int, context: int, block_size: int, device: torch.device, *, captured: bool) -> StepBatch:
    """Rows of `context` tokens each, in blocks scattered over the pool."""
    width = -(-context // block_size)
    tables = torch.randperm(rows * width, generator=torch.Generator().manual_seed(0)).view(rows, width)
    slots = tables[:, -1] * block_size + (context - 1) % block_size
    lens = torch.full((rows,), context, dtype=torch.int32, device=device)
    host = None if captured else np.full(rows, context, dtype=np.int64)
    return StepBatch(slots.to(device), decode_rows(tables.int().to(device), lens, context, host))


def _step(
    backend: Backend[Any],
    layers: Sequence[AttentionLayer | LatentLayer],
    caches: Sequence[KVCache],
    batch: StepBatch,
) -> Callable[[], None]:
    """One decode step through the layers, all with the same inputs."""
    spec, slots = layers[0].spec, batch.slot_mapping
    shapes = ((len(slots), *shape) for shape in token_shapes(spec))
    inputs = tuple(torch.randn(shape, dtype=spec.dtype, device=slots.device) for shape in shapes)
    attend = cast(Callable[..., torch.Tensor], backend.attend if spec.latent is None else backend.attend_latent)

    def run() -> None:
        meta = backend.build(batch)
        for layer, cache in zip(layers, caches, strict=True):
            attend(layer, inputs, cache, meta)

    return run


def _measure_cpu(step: Callable[[], None]) -> float:
    """Seconds, the median."""
    step()
    times: list[float] = []
    while sum(times) < _MEASURE or len(times) < 3:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _measure_gpu(step: Callable[[], None], *, captured: bool) -> float:
    """Seconds, the mean of many: of a graph's replays where the step can be captured, else of launches."""
    step()
    torch.cuda.synchronize()
    work = step
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        work = graph.replay
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    repeats, elapsed = 3, 0.0
    while elapsed < _MEASURE:
        start.record()
        for _ in range(repeats):
            work()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / 1e3
        repeats, measured = repeats * 3, repeats
    return elapsed / measured
