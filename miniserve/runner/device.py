"""The device: which one and which dtypes the user's settings mean, and copies to it that do not wait."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from miniserve.attention.platform import Platform
from miniserve.config import EngineConfig
from miniserve.core import UserError


def find_device(name: str, index: int | None = None) -> torch.device:
    """name: --device; index: which GPU, None for PyTorch's current one. Raises `UserError` if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU for --device cuda; use --device cpu or install PyTorch for your GPU.")
    return torch.device(name) if name == "cpu" or index is None else torch.device(name, index)


def rank_device(config: EngineConfig, rank: int) -> torch.device:
    """The device of a rank on this host: engines have equal shares of its GPUs, and their ranks one each. Raises
    `UserError` if there is none."""
    if config.processes_here == 1:
        return find_device(config.device)
    share = torch.cuda.device_count() // config.data_parallel_size
    return find_device(config.device, config.data_parallel_rank * share + rank % config.ranks_here)


def find_dtype(name: str, model_dtype: str) -> torch.dtype:
    """name: --dtype. Raises `UserError` if it is not a dtype."""
    dtype = getattr(torch, model_dtype if name == "auto" else name)
    if not isinstance(dtype, torch.dtype):
        raise UserError(f"--dtype {name} is not a dtype.")
    return dtype


def find_kv_dtype(name: str, dtype: torch.dtype, platform: Platform) -> torch.dtype:
    """name: --kv-cache-dtype; dtype: the model's."""
    if name == "fp8":
        return platform.fp8_dtype
    kv_dtype: torch.dtype = dtype if name == "auto" else getattr(torch, name)
    return kv_dtype


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """A copy of the array on the device (on a CPU it shares the array's memory). Uses pinned memory: a copy from other
    memory makes the host wait for all earlier work of the device."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
