"""aiter.jit.utils.chip_info: what the device is."""

from aiter import _standin


def get_gfx() -> str:
    return _standin.device.arch


def get_cu_num() -> int:
    return _standin.device.cus
