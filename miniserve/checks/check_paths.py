"""`miniserve check`: the self-check of every attention path that this machine supports, at a model's shapes.

Layers are made up (weights do not matter to attention), and so is the pool. On a GPU with enough memory keys and values
take more than 4 GiB each, so that offsets beyond 32 bits are checked too.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from miniserve.attention.backends.build import pool_limit
from miniserve.attention.contracts import CONTRACTS
from miniserve.attention.platform import Platform, detect_platform
from miniserve.attention.select import Choice, select
from miniserve.attention.spec import AttentionLayer, AttentionSpec, LatentLayer
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.models.config import describe_model
from miniserve.models.hub import locate_config
from miniserve.models.layers.attention import Attention
from miniserve.models.layers.latent_attention import UpProjection
from miniserve.models.registry import check_ranks
from miniserve.parallel.shard import Shard
from miniserve.runner.device import find_device, find_dtype, find_kv_dtype
from miniserve.runner.self_check import Checked, CheckResult, check_backend

_LARGE_PLANE = 9 << 29  # bytes: 4.5 GiB
_SMALL_POOL = 512  # blocks, on a CPU
_MAX_SEQ_LEN = 4096
_K_SCALE, _V_SCALE = 0.5, 2.0  # of an fp8 cache; different, and exact in every dtype


@dataclass(frozen=True, slots=True)
class AttentionPath:
    """A backend over a layout with a KV cache of a dtype, as --kv-cache-dtype names it."""

    backend: str
    layout: str
    kv_cache_dtype: str

    def __str__(self) -> str:
        return f"{self.backend} over {self.layout}, KV cache {self.kv_cache_dtype}"


@dataclass(frozen=True, slots=True)
class PathResults:
    """asm_lengths: whether the ASM kernel is correct at its suspected lengths; None if no path reaches it."""

    checks: list[CheckResult]
    asm_lengths: bool | None

    @property
    def ok(self) -> bool:
        return all(result.ok for result in self.checks)


def made_up_layer(spec: AttentionSpec, device: torch.device) -> AttentionLayer | LatentLayer:
    """A layer of that kind with random weights, always the same."""
    generator = torch.Generator().manual_seed(0)
    k_scale, v_scale = (torch.tensor([scale], device=device) for scale in (_K_SCALE, _V_SCALE))
    if (dims := spec.latent) is None:
        sinks = torch.randn(spec.num_heads, generator=generator).to(device) if spec.sinks else None
        return Attention(0, spec, k_scale, v_scale, sinks)
    layer = UpProjection(0, spec, dims, device)
    layer.allocate(torch.device("cpu"))
    layer.weight.normal_(0.0, dims.kv_lora_rank**-0.5, generator=generator)
    layer.to(device).finish()
    layer.kv_scale = k_scale
    return layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The device that paths are checked on, and what for: a model's layers, in its dtype, and a KV block size."""

    specs: tuple[AttentionSpec, ...]
    platform: Platform
    device: torch.device
    block_size: int
    max_num_seqs: int = 256  # enough rows to reach every route

    def choose(self, path: AttentionPath) -> Choice:
        """Raises `UserError` where there is no such path."""
        specs = [
            dataclasses.replace(spec, kv_dtype=find_kv_dtype(path.kv_cache_dtype, spec.dtype, self.platform))
            for spec in self.specs
        ]
        return select(specs, self.platform, block_size=self.block_size, backend=path.backend, layout=path.layout)

    def paths(self, kv_cache_dtypes: Sequence[str] = ("auto", "fp8")) -> Iterator[AttentionPath]:
        """Every path that can serve all layers."""
        for kv_cache_dtype, contract in itertools.product(kv_cache_dtypes, CONTRACTS):
            for layout in contract.layouts:
                path = AttentionPath(contract.name, layout, kv_cache_dtype)
                try:
                    self.choose(path)
                except UserError:
                    continue
                yield path

    def check(self, path: AttentionPath) -> PathResults:
        """Run the self-check for each kind of layer; a result's `layer` is the first layer of that kind."""
        checks: list[CheckResult] = []
        asm_lengths: list[bool] = []
        choice = self.choose(path)
        for spec, route in dict(zip(choice.specs, choice.routes, strict=True)).items():
            found = self._check(dataclasses.replace(choice, specs=(spec,), routes=(route,)))
            checks += [dataclasses.replace(result, layer=choice.specs.index(spec)) for result in found.results]
            asm_lengths += [] if found.asm_lengths is None else [found.asm_lengths]
        return PathResults(checks, all(asm_lengths) if asm_lengths else None)

    def _check(self, choice: Choice) -> Checked:
        """choice: of one layer."""
        layout, (spec,) = choice.kv_layout, choice.specs
        limit = pool_limit(choice, self.max_num_seqs)
        num_blocks = _num_blocks(layout.block_bytes(spec), self.device)
        num_blocks = num_blocks if limit is None else min(num_blocks, limit.num_blocks)
        caches = [layout.allocate(spec, num_blocks, self.device)]
        options = choice.options(self.device, self.max_num_seqs, _MAX_SEQ_LEN)
        found = check_backend(choice, options, [made_up_layer(spec, self.device)], caches)
        del caches
        gc.collect()  # the next pool is as large
        return found


def find_machine(config: EngineConfig) -> Machine:
    """The device that `config` asks for, and the attention of its model, with ranks of the first one's part, by
    config.json alone."""
    name, path = locate_config(config.model, config.revision)
    model = describe_model(path, name)
    device = find_device(config.device)
    dtype = find_dtype(config.dtype, model.dtype)
    layers = filter(model.has_kv_cache, range(model.num_layers))
    size = config.tensor_parallel_size or 1
    check_ranks(model, size, expert_parallel=config.enable_expert_parallel)
    return Machine(
        specs=tuple(model.attention_spec(layer, dtype, dtype, Shard(0, size)) for layer in layers),
        platform=detect_platform(device, dtype),
        device=device,
        block_size=config.block_size,
    )


def _num_blocks(block_bytes: int, device: torch.device) -> int:
    if device.type != "cuda":
        return _SMALL_POOL
    free, _ = torch.cuda.mem_get_info(device)
    return min(2 * _LARGE_PLANE, free // 2) // block_bytes
