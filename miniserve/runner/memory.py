"""The memory plan: what the weights, a step's activations and the KV cache take, and how many blocks that leaves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from miniserve.config import EngineConfig
from miniserve.core import UserError

# What the KV cache takes at most on a CPU unless --kv-cache-memory says otherwise: memory there is shared with others.
_CPU_KV_LIMIT = 4 << 30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes; num_blocks of `block_size` tokens; max_model_len in tokens, lowered to what fits where it was open."""

    weights: int
    activations: int
    kv_cache: int
    num_blocks: int
    max_model_len: int

    def rows(self) -> list[tuple[str, int]]:
        return [("weights", self.weights), ("activations", self.activations), ("KV cache", self.kv_cache)]


def available_bytes(device: torch.device, utilization: float) -> int:
    """What may be used on the device: free memory on a CPU, the user's share of the whole less what is taken elsewhere
    on a GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - int(total * (1.0 - utilization))
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return 8 << 30  # no way to ask on this system: a laptop's worth


def check_weights_fit(weights: int, available: int, device: torch.device) -> None:
    """Raises `UserError` with both numbers, before anything is loaded."""
    if weights > available:
        gpu = "end other programs on the GPU, raise --gpu-memory-utilization, or " if device.type == "cuda" else ""
        raise UserError(
            f"The model's weights need {size(weights)} and {device.type} has {size(max(available, 0))} available; "
            f"{gpu}choose a smaller model or a smaller --dtype."
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
    """Settle the pool's size and the context length. `available` is what remains once the weights are loaded, and
    `most_blocks` what a kernel reaches, None where it reaches all.

    Raises `UserError` where not even one sequence of --max-model-len fits (or, left open, one block).
    """
    wanted_len = config.max_model_len or longest_context
    useful_blocks = config.max_num_seqs * blocks_for(wanted_len, config.block_size)
    if config.kv_cache_memory is not None:
        budget = config.kv_cache_memory
        if budget > available - activations:
            raise UserError(
                f"--kv-cache-memory {size(budget)} does not fit: {size(max(available - activations, 0))} are left "
                "beside weights and activations; lower it."
            )
    else:
        budget = available - activations
        if device.type == "cpu":
            budget = min(budget // 2, _CPU_KV_LIMIT)
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
            f"and {size(max(budget, 0))} are available; lower --max-model-len or give it more with --kv-cache-memory"
            f"{' or --gpu-memory-utilization' if device.type == 'cuda' else ''}."
        )
    max_model_len = min(wanted_len, num_blocks * config.block_size)
    return MemoryPlan(weights, activations, num_blocks * block_bytes, num_blocks, max_model_len)


def blocks_for(num_tokens: int, block_size: int) -> int:
    return -(-num_tokens // block_size)


def size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 10 << 20 else f"{num_bytes / 2**20:.2f} MiB"
