"""The memory plan: what the weights, a step's activations and the KV cache take, and how many blocks that leaves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.models.decoder import CausalLM
from miniserve.models.layers.linear import Linear

# Limit of the KV cache on a CPU without --kv-cache-memory: other programs share the memory.
_CPU_KV_LIMIT = 4 << 30
GPU_SHARE = 0.9  # of its memory, without --gpu-memory-utilization


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes; num_blocks of `block_size` tokens; max_model_len in tokens, lowered to what fits if it was not set."""

    weights: int
    activations: int
    kv_cache: int
    num_blocks: int
    max_model_len: int

    def lowered(self, num_blocks: int, block_size: int) -> MemoryPlan:
        """The same with so many blocks, which are not more."""
        kv_cache = self.kv_cache // self.num_blocks * num_blocks
        max_model_len = min(self.max_model_len, num_blocks * block_size)
        return replace(self, kv_cache=kv_cache, num_blocks=num_blocks, max_model_len=max_model_len)

    def rows(self) -> list[tuple[str, int]]:
        return [("weights", self.weights), ("activations", self.activations), ("KV cache", self.kv_cache)]


def available_bytes(device: torch.device, utilization: float | None) -> int:
    """Bytes that may be used on the device: free memory on a CPU; on a GPU the user's share of all memory, less what
    other programs use. utilization: --gpu-memory-utilization; a CPU has none, and raises `UserError` for it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - int(total * (1.0 - (utilization or GPU_SHARE)))
    if utilization is not None:
        raise UserError("--gpu-memory-utilization means nothing on a CPU; leave it out, or set --kv-cache-memory.")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 8 << 30  # this system does not report it: assume a laptop's


def check_weights_fit(weights: int, available: int, model: CausalLM) -> None:
    """Raise `UserError` with both numbers, before anything is loaded."""
    if weights > available:
        device, wide = model.options.device, ""
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        if any(layer.weights.widened and layer.method.route is not None for layer in layers):  # not kv_b_proj
            wide = " (its 8 bits are widened to those of --dtype on this device)"
        gpu = "stop other programs on the GPU, raise --gpu-memory-utilization, or " if device.type == "cuda" else ""
        raise UserError(
            f"The model's weights need {size(weights)}{wide} and {device.type} has {size(max(available, 0))} "
            f"available; {gpu}choose a smaller model or a smaller --dtype."
        )


def plan_memory(
    config: EngineConfig,
    *,
    weights: int,
    activations: int,
    available: int,
    block_bytes: int,
    longest_context: int,
    device: torch.device,
    most_blocks: int | None,
) -> MemoryPlan:
    """Compute the pool's size and the context length. `available`: bytes that remain once the weights are loaded.
    `most_blocks`: how many a kernel reaches, None where it reaches all.

    Raises `UserError` if not even one sequence of --max-model-len fits (or one block, if that is not set).
    """
    wanted_len = config.max_model_len or longest_context
    useful_blocks = config.max_num_seqs * blocks_for(wanted_len, config.block_size)
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
        if budget > available - activations:
            room = size(max(available - activations, 0))
            raise UserError(
                f"--kv-cache-memory {size(config.kv_cache_memory)} does not fit: {room} "
                f"remain{' for each rank' if config.ranks_here > 1 else ''} beside weights and activations; lower it."
            )
    else:
        budget = available - activations
        if device.type == "cpu":
            budget = min(budget // 2, _CPU_KV_LIMIT // config.ranks_here)
    num_blocks = min(budget // block_bytes, useful_blocks)
    needed = blocks_for(config.max_model_len or 1, config.block_size)
    if most_blocks is not None:
        if most_blocks < needed:
            raise UserError(
                f"--max-model-len {config.max_model_len} is more than this attention path reaches, "
                f"{most_blocks * config.block_size:,} tokens; lower it or choose another --attention-backend."
            )
        num_blocks = min(num_blocks, most_blocks)
    if num_blocks < needed:
        raise UserError(
            f"The KV cache of one sequence of {config.max_model_len or 1} tokens needs {size(needed * block_bytes)} "
            f"and {size(max(budget, 0))} are available; lower --max-model-len or set a larger --kv-cache-memory"
            f"{' or --gpu-memory-utilization' if device.type == 'cuda' else ''}."
        )
    max_model_len = min(wanted_len, num_blocks * config.block_size)
    return MemoryPlan(weights, activations, num_blocks * block_bytes, num_blocks, max_model_len)


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 10 << 20 else f"{num_bytes / 2**20:.2f} MiB"
