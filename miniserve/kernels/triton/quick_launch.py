"""Launches that cost the host a third of what Triton's own do, which bind, specialise and key all arguments anew: 12 to
40 µs each, of which a step without a graph has some hundreds.

The first launch of a kind goes Triton's way. What it compiled is kept under all that it may have compiled it for: the
constants, each pointer's dtype and alignment, and of each number whether it is 1, whether 16 divides it, and its width.
Later launches hand addresses to the compiled kernel's own launcher. Descriptors are kept too, by address and shape:
weights and caches have few, and activations get the same memory again and again.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# Whose launchers take what `_launch` gives them. With other versions, and AMD's driver, Triton launches.
_IS_KNOWN = triton.__version__.startswith("3.6.") and torch.version.hip is None
if _IS_KNOWN:
    from triton.backends.nvidia.driver import make_tensordesc_arg
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def _current_device() -> int:
    return int(driver.active.get_current_device())


def _current_stream(device: int) -> int:
    return int(driver.active.get_current_stream(device))


if hasattr(torch._C, "_cuda_getDevice"):  # what the driver asks, by a detour
    _current_device, _current_stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream


class _Memory(NamedTuple):
    """What Triton's descriptor asks of a tensor. It holds none."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


class Described:
    """A descriptor. kind: what a kernel is compiled for; values: what a launcher takes, once it is known."""

    __slots__ = ("kind", "triton", "values")

    def __init__(self, triton: Any, kind: object) -> None:
        self.triton, self.kind = triton, kind
        self.values: list[Any] | None = None


_KINDS: dict[Any, object] = {}


@functools.lru_cache(maxsize=1 << 14)
def _described(memory: _Memory, shape: Any, strides: Any, block: Any, layout: Any) -> Described:
    descriptor = TensorDescriptor(memory, list(shape), list(strides), list(block), layout)
    return Described(descriptor, _KINDS.setdefault((memory.dtype, block, layout), object()))


def describe(
    tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], layout: Any
) -> Any:
    """A Gluon kernel's descriptor of what begins where `tensor` does, `block` of which is copied at a time."""
    if not _IS_KNOWN:
        from triton.experimental.gluon.nvidia import hopper

        return hopper.TensorDescriptor(tensor, list(shape), list(strides), list(block), layout)
    return _described(_Memory(tensor.data_ptr(), tensor.dtype), shape, strides, block, layout)


class _Kept(NamedTuple):
    """A compiled kernel's launcher, its device, and what it takes before the arguments, from the function on, and
    behind them. layouts: of the descriptors, in the driver's words."""

    launch: Callable[..., None]
    device: int
    first: tuple[Any, ...]
    last: tuple[Any, ...]
    layouts: list[Any]


def quick(kernel: Any) -> Any:
    """Decorates a kernel that the host launches, kernel[grid](*args, **constants), with no constant among args."""
    return QuickKernel(kernel) if _IS_KNOWN and isinstance(kernel, JITFunction) else kernel


@functools.lru_cache(maxsize=1 << 16)
def _of_number(number: int) -> tuple[bool, bool, int]:
    """What the compiler may know of it."""
    return number == 1, number % 16 == 0, number.bit_length() // 32


class QuickKernel:
    """kernel: Triton's. Triton's hooks (`knobs.runtime`) hear of the first launch of a kind alone."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self._kept: dict[tuple[Any, ...], _Kept] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        kind: list[Any] = [*constants, *constants.values()]
        given: list[Any] = []
        unknown = False
        for arg in args:
            if type(arg) is int:
                kind.append(_of_number(arg))
            elif arg is None or type(arg) is float:
                kind.append(arg is None)
            elif isinstance(arg, Tensor):
                address = arg.data_ptr()
                kind.append((arg.dtype,) if address % 16 else arg.dtype)
                given.append(address)
                continue
            elif type(arg) is Described:
                kind.append(arg.kind)
                if arg.values is None:
                    unknown = True
                else:
                    given += arg.values
                continue
            else:
                self._by_triton(grid, args, constants)
                return
            given.append(arg)
        kept = self._kept.get(key := tuple(kind))
        if kept is None:
            self._keep(key, self._by_triton(grid, args, constants), args, constants)
            return
        if unknown:
            described = [arg for arg in args if type(arg) is Described]
            for each, layout in zip(described, kept.layouts, strict=True):
                each.values = make_tensordesc_arg(each.triton, layout)
            self._launch(grid, *args, **constants)
            return
        device = _current_device()
        if device != kept.device:
            self._by_triton(grid, args, constants)
            return
        x, y, z = (*grid, 1, 1)[:3]
        kept.launch(x, y, z, _current_stream(device), *kept.first, *given, *kept.last)

    def _by_triton(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> Any:
        return self.kernel[grid](*(arg.triton if type(arg) is Described else arg for arg in args), **constants)

    def _keep(self, key: tuple[Any, ...], compiled: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        described = [arg.triton for arg in args if type(arg) is Described]
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if any(each.is_meta for each in tensors) or not all(each.base.data_ptr() for each in described):
            return  # it was compiled only
        if any(each.is_constexpr for each in self.kernel.params[: len(args)]):  # whose values the key has not
            return
        launcher = compiled.run
        if launcher.global_scratch_size or launcher.profile_scratch_size:  # which Triton allocates
            return
        scratch = hooks = None, None
        options = launcher.launch_cooperative_grid, launcher.launch_pdl
        first = (compiled.function, *options, *scratch, compiled.packed_metadata, None, *hooks)
        last = tuple(constants.get(each.name, each.default) for each in self.kernel.params[len(args) :])
        launch, layouts = launcher.launch, []
        if described:  # Triton's would make their values at each launch
            inner = inspect.getclosurevars(launch).nonlocals
            launch, layouts = inner["launcher"], inner["tensordesc_meta"]
        self._kept[key] = _Kept(launch, _current_device(), first, last, layouts)
