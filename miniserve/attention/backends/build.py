"""From a choice to the backend that carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from miniserve.attention.aiter import load as load_aiter
from miniserve.attention.aiter import load_gluon, load_latent
from miniserve.attention.backends import aiter_calls
from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.paged_kernels import PagedKernels, torch_kernels, triton_kernels
from miniserve.attention.backends.rocm_aiter_fa import FlashBackend, gathered_bytes
from miniserve.attention.backends.rocm_aiter_mla import AiterLatentBackend, TokenIndices, torch_token_indices
from miniserve.attention.backends.rocm_aiter_mla import scratch_bytes as latent_scratch_bytes
from miniserve.attention.backends.rocm_attn import RocmBackend
from miniserve.attention.backends.rocm_gluon import GluonBackend
from miniserve.attention.backends.rocm_unified import UnifiedBackend
from miniserve.attention.backends.rope_write import RopeWriter
from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.attention.backends.torch_mla import TorchLatentBackend
from miniserve.attention.backends.triton_attn import TritonBackend, linearized_bytes
from miniserve.attention.backends.triton_mla import TritonLatentBackend
from miniserve.attention.backends.triton_mla import scratch_bytes as split_scratch_bytes
from miniserve.attention.contracts import KERNELS
from miniserve.attention.layouts import LAYOUTS, KVLayout
from miniserve.attention.platform import Platform
from miniserve.attention.routes import least_asm_rows
from miniserve.attention.select import Choice
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import NARROW_PLANE, LayerRoute


def build_backend(choice: Choice, block_size: int, options: BackendOptions) -> Backend[Any]:
    """The chosen backend with its scratch memory. Only what it needs is imported: Triton may not be installed."""
    layout = LAYOUTS[choice.layout](block_size)
    if choice.backend == "CPU_ATTN":
        from miniserve.attention.backends.cpu_attn import CpuBackend
        from miniserve.kernels import native

        return CpuBackend(layout, native.NativeKernels())
    if choice.backend == "TORCH_ATTN":
        return TorchBackend(layout)
    if choice.backend == "ROCM_AITER_MLA":
        return AiterLatentBackend(layout, load_latent(), _token_indices(options), options)
    if choice.backend == "TRITON_MLA" and not options.platform.emulated:
        return TritonLatentBackend(layout, options)
    if choice.backend in ("TRITON_MLA", "TORCH_MLA"):
        return TorchLatentBackend(layout)
    if choice.backend == "TRITON_ATTN":
        return TritonBackend(layout, _paged_kernels(options), options)
    if choice.backend == "ROCM_ATTN":
        return RocmBackend(layout, _paged_kernels(options), load_aiter(), options)
    if choice.backend == "ROCM_AITER_FA":
        return FlashBackend(layout, load_aiter(), rope_writer(layout, options), options)
    if choice.backend == "ROCM_AITER_UNIFIED_ATTN":
        return UnifiedBackend(layout, load_aiter(), rope_writer(layout, options), options)
    if choice.backend == "ROCM_AITER_GLUON":
        return GluonBackend(layout, load_aiter(), load_gluon(), rope_writer(layout, options), options)
    raise ValueError(f"no backend is called {choice.backend}")


def rope_writer(layout: KVLayout, options: BackendOptions) -> RopeWriter:
    return RopeWriter(layout, load_aiter(), _paged_kernels(options), options)


def _paged_kernels(options: BackendOptions) -> PagedKernels:
    return torch_kernels() if options.platform.emulated else triton_kernels()


def _token_indices(options: BackendOptions) -> TokenIndices:
    if options.platform.emulated:
        return torch_token_indices
    from miniserve.kernels.triton.token_indices import token_indices

    return token_indices


def scratch_bytes(
    choice: Choice, specs: Sequence[AttentionSpec], platform: Platform, max_rows: int, max_seq_len: int
) -> int:
    """What the backend allocates beside the cache, where that is more than a few megabytes."""
    if choice.backend == "TRITON_MLA":
        return split_scratch_bytes(specs, platform, max_rows, max_seq_len)
    if choice.backend == "ROCM_AITER_MLA":
        return latent_scratch_bytes(specs, max_rows, max_seq_len)
    if choice.backend == "TRITON_ATTN" and choice.layout == "shuffled":
        return linearized_bytes(specs, max_rows * max_seq_len)
    if choice.backend not in ("ROCM_ATTN", "ROCM_AITER_FA"):
        return 0
    scratch = aiter_calls.scratch_bytes(specs, max_rows, max_seq_len)
    if choice.backend == "ROCM_AITER_FA":
        scratch += gathered_bytes(specs, max_rows * max_seq_len)
    return scratch


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


def block_bytes(choice: Choice, layout: KVLayout, specs: Sequence[AttentionSpec]) -> int:
    """Bytes of one block of every layer, with what the backend keeps for each block beside it."""
    total = 0
    for spec, route in zip(specs, choice.routes, strict=True):
        total += layout.block_bytes(spec)
        if route.decode == "paged_attention_common" and spec.kv_dtype.itemsize == 1:
            total += 2 * 4 * layout.block_size * spec.num_kv_heads  # at most: layers of the same scale share tables
    return total
