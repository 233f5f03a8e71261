"""What a quick launch hands to a compiled kernel's launcher, and that kernels compiled for other arguments are not
taken for it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton_support import DEVICE, NATIVE, close, normal, on_gpu

from miniserve.kernels.triton import elementwise, quick_launch
from miniserve.kernels.triton.quick_launch import Described, QuickKernel, describe

NAMES = "x_ptr", "size", "scale", "other", "A", "B"


with_descriptors = pytest.mark.skipif(not quick_launch._IS_KNOWN, reason="this Triton makes descriptors itself")


class Kernel:
    """Stands for Triton's: launches of it, and what its compiled kernels are launched with, are noted."""

    def __init__(self, scratch: int = 0) -> None:
        self.params = [
            SimpleNamespace(name=name, default={"B": 7}.get(name), is_constexpr=name in "AB") for name in NAMES
        ]
        self.scratch, self.compiled = scratch, 0
        self.launched: list[tuple[int, tuple[Any, ...]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> object:
            number = self.compiled
            self.compiled += 1
            assert not any(isinstance(arg, Described) for arg in args)

            def launch(*given: Any) -> None:
                self.launched.append((number, given))

            launcher = SimpleNamespace(
                launch=making_descriptors(launch, ["flat"])
                if args and isinstance(args[-1], TensorDescriptor)
                else launch,
                global_scratch_size=self.scratch,
                profile_scratch_size=0,
                launch_cooperative_grid=False,
                launch_pdl=True,
            )
            return SimpleNamespace(run=launcher, function=f"function {number}", packed_metadata="packed")

        return launch


def making_descriptors(launcher: Callable[..., None], tensordesc_meta: list[str]) -> Callable[..., None]:
    """As Triton's driver wraps a launcher whose kernel has descriptors."""

    def inner(*given: Any) -> None:
        launcher(*given, tensordesc_meta)

    return inner


@pytest.fixture
def device() -> Any:
    """The current one, whose stream is its number times 10."""
    found = SimpleNamespace(number=1)
    given = {"_current_device": lambda: found.number, "_current_stream": lambda number: number * 10}
    with mock.patch.multiple(quick_launch, **given):
        yield found


def test_the_second_launch_goes_to_the_launcher(device: Any) -> None:
    triton = Kernel()
    kernel = QuickKernel(triton)  # type: ignore[arg-type]
    x = torch.zeros(32)
    for size in (5, 6):
        kernel[3, 4](x, size, 0.5, None, A=True, num_warps=2)
    before = (3, 4, 1, 10, "function 0", False, True, None, None, "packed", None, None, None)
    assert triton.launched == [(0, (*before, x.data_ptr(), 6, 0.5, None, True, 7))]


@with_descriptors
def test_what_triton_compiles_anew_for_is_another_kind(device: Any) -> None:
    x = torch.zeros(64)
    assert x.data_ptr() % 16 == 0
    flat, narrow = (gl.NVMMASharedLayout(swizzle, 16, rank=2) for swizzle in (128, 64))

    def described(rows: int, layout: Any, dtype: torch.dtype = torch.float16) -> Any:
        return describe(x.to(dtype), (4, 16), (16, 1), (rows, 16), layout)

    kinds: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((x, 5, 0.5, None), {"A": 1}),
        ((x[1:], 5, 0.5, None), {"A": 1}),
        ((x.half(), 5, 0.5, None), {"A": 1}),
        ((x, 16, 0.5, None), {"A": 1}),
        ((x, 1, 0.5, None), {"A": 1}),
        ((x, 1 << 31, 0.5, None), {"A": 1}),
        ((x, 1 << 63, 0.5, None), {"A": 1}),
        ((x, None, 0.5, None), {"A": 1}),
        ((x, 5, 5, None), {"A": 1}),
        ((x, 5, 0.5, x), {"A": 1}),
        ((x, 5, 0.5, None), {"A": 2}),
        ((x, 5, 0.5, None), {"B": 1}),
        ((x, 5, 0.5, None), {"A": 1, "num_warps": 8}),
        ((x, 5, 0.5, described(8, flat)), {"A": 1}),
        ((x, 5, 0.5, described(16, flat)), {"A": 1}),
        ((x, 5, 0.5, described(8, narrow)), {"A": 1}),
        ((x, 5, 0.5, described(8, flat, torch.bfloat16)), {"A": 1}),
    ]
    triton = Kernel()
    kernel = QuickKernel(triton)  # type: ignore[arg-type]
    with mock.patch.object(quick_launch, "make_tensordesc_arg", lambda of, layout: [0]):
        for _ in range(2):
            for args, constants in kinds:
                kernel[(1,)](*args, **constants)
    assert triton.compiled == len(kinds)
    assert [number for number, _ in triton.launched] == list(range(len(kinds)))
    device.number = 2
    kernel[(1,)](*kinds[0][0], **kinds[0][1])
    assert triton.compiled == len(kinds) + 1


@with_descriptors
def test_descriptors_are_made_once(device: Any) -> None:
    x, layout = torch.zeros(4, 64, dtype=torch.float16), gl.NVMMASharedLayout(128, 16, rank=2)
    triton = Kernel()
    kernel = QuickKernel(triton)  # type: ignore[arg-type]
    with mock.patch.object(
        quick_launch, "make_tensordesc_arg", lambda of, layout: [of.base.address, layout, *of.shape]
    ):
        for rows in (4, 4, 3, 4):
            kernel[(1,)](x, 5, 0.5, describe(x, (rows, 64), (64, 1), (8, 64), layout), A=1)
    address = x.data_ptr()
    wanted = [(address, 5, 0.5, address, "flat", rows, 64, 1, 7) for rows in (4, 3, 4)]
    assert triton.compiled == 1 and [given[13:] for _, given in triton.launched] == wanted
    assert describe(x, (4, 64), (64, 1), (8, 64), layout) is describe(x, (4, 64), (64, 1), (8, 64), layout)
    assert describe(x, (4, 64), (64, 1), (8, 64), layout) is not describe(x[1:], (4, 64), (64, 1), (8, 64), layout)


def test_triton_launches_what_is_not_known(device: Any) -> None:
    """Arguments of another type, kernels with scratch, tensors that have no memory, and constants among arguments."""
    x = torch.zeros(32)
    triton = Kernel()
    kernel = QuickKernel(triton)  # type: ignore[arg-type]
    for _ in range(3):
        kernel[(1,)](x, 5, 0.5, None, 1)
    assert (triton.compiled, triton.launched) == (3, [])
    for triton, args in ((Kernel(), (x, True)), (Kernel(scratch=8), (x, 5)), (Kernel(), (x.to("meta"), 5))):
        kernel = QuickKernel(triton)  # type: ignore[arg-type]
        for _ in range(3):
            kernel[(1,)](*args, 0.5, None, A=1)
        assert (triton.compiled, triton.launched) == (3, [])


@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=on_gpu)])
def test_rows_of_all_alignments_and_numbers_on_a_gpu(dtype: torch.dtype) -> None:
    kernel: Any = elementwise._rms_norm_kernel
    assert not NATIVE or torch.version.hip or isinstance(kernel, QuickKernel)
    for turn in range(2):
        for size in (1, 16, 48, 100, 2048):
            for first in (0, 1, 8):
                x = normal(turn, 7 * size + first, dtype=dtype)[first:].view(7, size)
                weight, stream = normal(2, size, dtype=dtype), torch.cuda.Stream() if turn else None
                wide = x.double()
                want = weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    got = elementwise.rms_norm(x, weight, 1e-6)
                torch.cuda.synchronize()
                close(got, want, dtype)
    assert DEVICE.type == "cuda"
