"""Programmatic dependent launch: a kernel starts while the one before it drains, and fetches what it need not wait for.

On NVIDIA GPUs from sm_90 on (CUDA programming guide, "Programmatic Dependent Launch and Synchronization"); elsewhere
the switch is off and the kernels are ordinary. Every kernel of ours in a decode step waits before it reads what an
earlier kernel wrote, so that waiting is transitive. What lies before an ordinary kernel in the stream need not be
waited for: that kernel started when all before it was done, and ours start when it is.
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
    """Until all earlier kernels are done and what they wrote can be read."""
    if PDL:
        cuda.gdc_wait()


@functools.cache
def launch_options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: the kernels' own PDL switch and, where it is on, the launcher's."""
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
