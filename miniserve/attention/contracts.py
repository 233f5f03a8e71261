"""What each kernel path takes, as data. `select` reads this table; nothing else decides what a path can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from miniserve.attention.layouts import LAYOUTS
from miniserve.attention.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class Platform:
    """Where attention will run. `native_unavailable`: why the C++ kernels cannot be used, None when they can.
    `fastest_layout`: the one its kernels were measured to read fastest, None where the contracts' own order holds."""

    device: str
    native_unavailable: str | None = None
    fastest_layout: str | None = None

    def order(self, layouts: tuple[str, ...]) -> tuple[str, ...]:
        """A contract's layouts in the order to try them here."""
        return tuple(sorted(layouts, key=lambda layout: layout != self.fastest_layout))


@dataclass(frozen=True, slots=True)
class KernelContract:
    """One path's terms. An empty tuple means anything goes; `layouts` are in the order the path prefers them."""

    name: str
    devices: tuple[str, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...] = ()
    block_sizes: tuple[int, ...] = ()
    sliding_window: bool = True
    softcap: bool = True
    sinks: bool = True
    needs_native: bool = False

    def refusals(self, spec: AttentionSpec, platform: Platform, layout: str, block_size: int) -> Iterator[str]:
        """Every reason, as a sentence, why this path cannot serve the layer on this platform."""
        if self.devices and platform.device not in self.devices:
            yield f"it runs on {' or '.join(self.devices)}, not on {platform.device}"
        if self.needs_native and platform.native_unavailable:
            yield platform.native_unavailable
        if layout not in self.layouts:
            yield f"it does not read the {layout} layout"
        elif reason := LAYOUTS[layout].refusal(spec, block_size):
            yield reason
        if spec.dtype not in self.dtypes:
            yield f"it does not compute in {_name(spec.dtype)}"
        if spec.kv_dtype != spec.dtype:
            yield f"it needs the KV cache in {_name(spec.dtype)}, not {_name(spec.kv_dtype)}"
        if self.head_dims and spec.head_dim not in self.head_dims:
            yield f"it does not take head_dim {spec.head_dim}"
        if self.block_sizes and block_size not in self.block_sizes:
            yield f"it does not take block size {block_size}"
        if spec.sliding_window is not None and not self.sliding_window:
            yield "it has no sliding window"
        if spec.softcap is not None and not self.softcap:
            yield "it has no softcap"
        if spec.sinks and not self.sinks:
            yield "it has no sinks"


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)

# In order of preference.
CONTRACTS = (
    KernelContract("CPU_ATTN", ("cpu",), ("linear", "shuffled"), _FLOATS, needs_native=True),
    KernelContract("TORCH_ATTN", (), ("linear", "shuffled"), _FLOATS),
)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
