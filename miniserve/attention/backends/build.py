"""From a choice to the backend that carries it out, and what that takes of memory."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.contracts import CONTRACTS, KERNELS
from miniserve.attention.layouts import LAYOUTS, KVLayout
from miniserve.attention.platform import Platform
from miniserve.attention.routes import least_asm_rows
from miniserve.attention.select import Choice
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import NARROW_PLANE, LayerRoute

_IMPLEMENTATIONS = {contract.name: contract.implementation for contract in CONTRACTS}


def backend_class(name: str) -> type[Backend[Any]]:
    """By its contract's name."""
    module, _, of = _IMPLEMENTATIONS[name].partition(":")
    found: type[Backend[Any]] = getattr(importlib.import_module(f"miniserve.attention.backends.{module}"), of)
    return found


def build_backend(choice: Choice, block_size: int, options: BackendOptions) -> Backend[Any]:
    """The chosen backend with its scratch memory."""
    return backend_class(choice.backend)(LAYOUTS[choice.layout](block_size), options)


def scratch_bytes(
    choice: Choice, specs: Sequence[AttentionSpec], platform: Platform, max_rows: int, max_seq_len: int
) -> int:
    """What the backend allocates beside the cache, where that is more than a few megabytes."""
    options = BackendOptions(
        specs=tuple(specs),
        routes=choice.routes,
        platform=platform,
        device=torch.device("meta"),
        max_rows=max_rows,
        max_seq_len=max_seq_len,
    )
    return backend_class(choice.backend).scratch_bytes(choice.layout, options)


def block_bytes(choice: Choice, layout: KVLayout, specs: Sequence[AttentionSpec]) -> int:
    """Bytes of one block of every layer, with what the backend keeps for each block beside it."""
    backend = backend_class(choice.backend)
    layers = zip(specs, choice.routes, strict=True)
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


def pool_limit(
    layout: KVLayout, specs: Sequence[AttentionSpec], routes: Sequence[LayerRoute], platform: Platform, max_rows: int
) -> PoolLimit | None:
    """How large a pool may be for steps of up to `max_rows`; None where nothing bounds it."""
    limits = []
    for spec, route in zip(specs, routes, strict=True):
        least = least_asm_rows(spec, platform.compute_units)
        if route.decode == "paged_attention_common" and (least is None or least > max_rows):
            continue  # its HIP kernel reaches all
        if KERNELS[route.decode].has_narrow_offsets(spec, platform.arch):
            plane = layout.block_bytes(spec) // (2 if spec.latent is None else 1)
            limits.append(PoolLimit(NARROW_PLANE // plane, route.decode))
    return min(limits, key=lambda limit: limit.num_blocks, default=None)
