"""The bytes a decode step must read, the device's memory bandwidth, and what sums over ranks take: all of the
roofline."""

from __future__ import annotations

import math
import time
from itertools import pairwise

import torch

from miniserve.attention.layouts import KVLayout
from miniserve.core import StepTraffic
from miniserve.models.decoder import CausalLM
from miniserve.models.layers.embedding import Embedding
from miniserve.models.layers.experts import Experts
from miniserve.parallel.group import Alone

# Beyond any cache but the last level of large servers; there a small model reads from that cache as well.
_CPU_BYTES = 96 << 20
_GPU_BYTES = 512 << 20
_SUMS = 16  # that are timed


def step_traffic(model: CausalLM, layout: KVLayout, bandwidth: float | None, sums: float = 0.0) -> StepTraffic:
    """`model` must have its parameters as declared: before they are packed, best on the meta device. The embedding
    counts only if it is tied to the head: a look-up reads one row, the logits read all rows of the head. Experts of
    which a rank has some are counted as if it had a share of each."""
    weights = expert = num_experts = 0
    for module in model.modules():
        size = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
        if isinstance(module, Experts):
            expert, num_experts = expert + size // module.experts.count, module.experts.count
        elif not isinstance(module, Embedding):
            weights += size
        elif model.config.tie_word_embeddings:
            weights += size * model.lm_head.out_features // model.config.vocab_size
    kv: dict[int | None, int] = {}
    for spec in model.attention_specs:
        kv[spec.sliding_window] = kv.get(spec.sliding_window, 0) + layout.block_bytes(spec) // layout.block_size
    moe = model.config.moe
    return StepTraffic(
        weights=weights,
        expert=expert,
        num_experts=num_experts,
        top_k=0 if moe is None or not num_experts else moe.top_k,
        kv=list(kv.items()),
        bandwidth=bandwidth,
        sums=sums,
    )


def measure_sums(model: CausalLM) -> float:
    """Seconds that the sums over ranks take at least in a step of one row: by the fastest of some single ones. 0 for a
    rank alone, also one of the shapes of many, and where the norm's kernel sums, whose time is not told from the
    norm's. Ranks call it together."""
    options, config = model.options, model.config
    if isinstance(options.group, Alone) or options.group.inboxes is not None:
        return 0.0
    times = []
    for _ in range(_SUMS):
        row = torch.zeros(1, config.hidden_size, dtype=options.dtype, device=options.device)
        start = time.perf_counter()
        options.group.reduce(row).cpu()
        times.append(time.perf_counter() - start)
    return 2 * config.num_layers * min(times)


def measure_bandwidth(device: torch.device) -> float | None:
    """Measured memory bandwidth in bytes per second: reads and writes of a copy on a GPU (about 20 ms), reads of a sum
    with PyTorch's threads on a CPU (about 0.1 s). None if there is too little free memory to measure."""
    try:
        return _gpu_bandwidth(device) if device.type == "cuda" else _cpu_bandwidth()
    except (RuntimeError, MemoryError):
        return None


def _gpu_bandwidth(device: torch.device) -> float:
    source = torch.zeros(_GPU_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # do not time the set-up of the first copy
    events = [torch.cuda.Event(enable_timing=True) for _ in range(9)]
    events[0].record()
    for event in events[1:]:
        target.copy_(source)
        event.record()
    torch.cuda.synchronize(device)
    best: float = min(before.elapsed_time(after) for before, after in pairwise(events))
    del source, target
    torch.cuda.empty_cache()
    return 2 * _GPU_BYTES / (best / 1000)


def _cpu_bandwidth() -> float:
    buffer = torch.ones(_CPU_BYTES // 4, dtype=torch.float32)
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return _CPU_BYTES / best
