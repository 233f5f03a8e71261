"""Programmatic dependent launch: a kernel starts while the one before it ends, and fetches data that is ready already.

On NVIDIA GPUs from sm_90 on (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"); elsewhere
the switch is off and the kernels are ordinary. Every kernel of this package in a decode step waits before it reads what
an earlier kernel wrote, so that waiting is transitive. Results from before an ordinary kernel in the stream are always
ready: that kernel started after all earlier ones had ended, and the next one starts after it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda


@triton.jit
def start(PDL: tl.constexpr):
    """Let the next kernel be scheduled as soon as all of this one's programs are running."""
    if PDL:
        cuda.gdc_launch_dependents()


@triton.jit
def wait(PDL: tl.constexpr):
    """Wait until all earlier kernels are done and their results can be read."""
    if PDL:
        cuda.gdc_wait()


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: the kernel's PDL switch and, if it is on, the launcher's."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
