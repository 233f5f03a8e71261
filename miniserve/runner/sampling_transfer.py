"""Copies from the host to the device that do not wait."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of the array on the device (on a CPU it shares the array's memory). Uses pinned memory: a copy from other
    memory makes the host wait for all earlier work of the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
