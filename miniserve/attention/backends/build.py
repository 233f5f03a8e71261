"""From a choice to the backend that carries it out, and what that takes of memory."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.attention.backends.base import Backend, BackendOptions
from miniserve.attention.contracts import CONTRACTS, KERNELS
from miniserve.attention.routes import least_asm_rows
from miniserve.attention.select import Choice
from miniserve.attention.terms import NARROW_PLANE

_IMPLEMENTATIONS = {contract.name: contract.implementation for contract in CONTRACTS}


def backend_class(name: str) -> type[Backend[Any]]:
    """By its contract's name."""
    module, _, of = _IMPLEMENTATIONS[name].partition(":")
    found: type[Backend[Any]] = getattr(importlib.import_module(f"miniserve.attention.backends.{module}"), of)
    return found


def build_backend(choice: Choice, options: BackendOptions) -> Backend[Any]:
    """The chosen backend with its scratch memory. options: of `Choice.options`."""
    return backend_class(choice.backend)(choice.kv_layout, options)


def scratch_bytes(choice: Choice, max_rows: int, max_seq_len: int) -> int:
    """What the backend allocates beside the cache, where that is more than a few megabytes."""
    options = choice.options(torch.device("meta"), max_rows, max_seq_len)
    return backend_class(choice.backend).scratch_bytes(choice.layout, options)


def block_bytes(choice: Choice) -> int:
    """Bytes of one block of every layer, with what the backend keeps for each block beside it."""
    backend, layout = backend_class(choice.backend), choice.kv_layout
    layers = zip(choice.specs, choice.routes, strict=True)
    return sum(layout.block_bytes(spec) + backend.extra_block_bytes(layout, spec, route) for spec, route in layers)


@dataclass(frozen=True, slots=True)
class PoolLimit:
    """The most blocks that `kernel` reaches all of."""

    num_blocks: int
    kernel: str

    def sentence(self, block_size: int) -> str:
        """For people."""
        return (
            f"KV cache: no more than {self.num_blocks * block_size:,} tokens, as {self.kernel} reaches "
            f"{NARROW_PLANE >> 30} GiB of a layer's keys or values; other attention backends reach all"
        )


def pool_limit(choice: Choice, max_rows: int) -> PoolLimit | None:
    """How large a pool may be for steps of up to `max_rows`; None where nothing bounds it."""
    layout, limits = choice.kv_layout, []
    for spec, route in zip(choice.specs, choice.routes, strict=True):
        least = least_asm_rows(spec, choice.platform.compute_units)
        if route.decode == "paged_attention_common" and (least is None or least > max_rows):
            continue  # its HIP kernel reaches all
        if KERNELS[route.decode].has_narrow_offsets(spec, choice.platform.arch):
            plane = layout.block_bytes(spec) // len(layout.shapes(spec, 1))
            limits.append(PoolLimit(NARROW_PLANE // plane, route.decode))
    return min(limits, key=lambda limit: limit.num_blocks, default=None)
