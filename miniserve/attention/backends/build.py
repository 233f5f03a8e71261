"""From a choice to the backend that carries it out."""

from __future__ import annotations

from typing import Any

from miniserve.attention.aiter import load as load_aiter
from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.paged_kernels import PagedKernels, torch_kernels, triton_kernels
from miniserve.attention.backends.rocm_aiter_fa import FlashBackend
from miniserve.attention.backends.rocm_attn import RocmBackend
from miniserve.attention.backends.rocm_unified import UnifiedBackend
from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.attention.backends.triton_attn import TritonBackend
from miniserve.attention.layouts import LAYOUTS
from miniserve.attention.select import Choice


def build_backend(choice: Choice, block_size: int, options: BackendOptions) -> Backend[Any]:
    """The chosen backend with its scratch memory. Its libraries are imported here and nowhere before."""
    layout = LAYOUTS[choice.layout](block_size)
    if choice.backend == "CPU_ATTN":
        from miniserve.attention.backends.cpu_attn import CpuBackend
        from miniserve.kernels import native

        return CpuBackend(layout, native.load())
    if choice.backend == "TORCH_ATTN":
        return TorchBackend(layout)
    if choice.backend == "TRITON_ATTN":
        return TritonBackend(layout, _paged_kernels(options), options)
    if choice.backend == "ROCM_ATTN":
        return RocmBackend(layout, _paged_kernels(options), load_aiter(), options)
    if choice.backend == "ROCM_AITER_FA":
        return FlashBackend(layout, load_aiter(), options)
    if choice.backend == "ROCM_AITER_UNIFIED_ATTN":
        return UnifiedBackend(layout, load_aiter(), options)
    raise ValueError(f"no backend is called {choice.backend}")


def _paged_kernels(options: BackendOptions) -> PagedKernels:
    return torch_kernels() if options.platform.emulated else triton_kernels()
