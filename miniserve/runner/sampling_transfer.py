"""From the host to the device without a wait."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of the array on the device (on a CPU the array's own memory). From pinned memory, because a copy from
    any other makes the host wait for all that the device was given before."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
