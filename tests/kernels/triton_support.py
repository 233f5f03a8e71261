"""Runs the Triton kernels' tests on whatever is there: natively on a GPU, else in Triton's interpreter on the CPU.

Import this before anything that imports Triton: the interpreter must be chosen by then.
"""

from __future__ import annotations

import inspect
import itertools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attention_reference import pack_shuffled

NATIVE = torch.cuda.is_available()
if not NATIVE and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported before tests/kernels/triton_support.py could choose its interpreter")
    os.environ["TRITON_INTERPRET"] = "1"

from miniserve.kernels.triton.launch import Launch  # noqa: E402  (may import Triton)


def remember_builtins() -> None:
    """Let the interpreter search a module for what it replaces once, not at each call of a function: a third of its
    time goes there. It searches a module for the first time before it replaces anything in it."""
    from triton.runtime import interpreter

    is_builtin, patch = interpreter.tl.core.is_builtin, interpreter._patch_attr
    found: dict[Any, list[str]] = {}

    def patch_builtin(pkg: Any, builder: object, scope: object) -> None:
        if pkg not in found:
            found[pkg] = [name for name, member in inspect.getmembers(pkg) if is_builtin(member)]
        for name in found[pkg]:
            if is_builtin(member := getattr(pkg, name)):
                patch(pkg, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin


if not NATIVE:
    remember_builtins()
DEVICE = torch.device("cuda" if NATIVE else "cpu")
on_gpu = (
    pytest.mark.gpu,
    pytest.mark.skipif(not NATIVE, reason="needs a GPU: the interpreter's bfloat16 is not exact"),
)
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
DTYPES = [torch.float32, *HALVES]
LAYOUTS = pytest.mark.parametrize("shuffled", [False, True], ids=["linear", "shuffled"])
FP8 = torch.float8_e4m3fnuz if torch.version.hip and "gfx94" in torch.cuda.get_device_name() else torch.float8_e4m3fn


def every_other(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize with all combinations on a GPU; in the interpreter, which takes its time, with every other one. Of
    three axes these still have every pair of values."""
    chosen = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        if NATIVE or sum(places) % 2 == 0:
            given = [axis[place] for axis, place in zip(axes, places, strict=True)]
            sets = [each if isinstance(each, type(pytest.param())) else pytest.param(each) for each in given]
            values = [value for each in sets for value in each.values]
            chosen.append(pytest.param(*values, marks=[mark for each in sets for mark in each.marks]))
    return pytest.mark.parametrize(names, chosen)


SMALL = Launch(block_m=16, block_n=32, num_warps=4, num_stages=2)
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    """got equals the float64 `want` row by row, so that no wrong row hides among right ones."""
    assert got.shape == want.shape
    errors = (got.double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1).clamp_min(1e-30)
    assert float(errors.max()) < _TOLERANCE[dtype], f"row {int(errors.argmax())}: {float(errors.max())}"


@dataclass(frozen=True)
class Cache:
    """A pool of random blocks: planes as the kernels read them; k, v [NB, BS, KH, D] float64, as they should read."""

    planes: tuple[torch.Tensor, torch.Tensor]
    k: torch.Tensor
    v: torch.Tensor
    block_size: int
    shuffled: bool

    @property
    def layout(self) -> dict[str, int | bool]:
        return {"num_kv_heads": self.k.shape[2], "block_size": self.block_size, "shuffled": self.shuffled}


def random_cache(
    num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int, *, dtype: torch.dtype, shuffled: bool
) -> Cache:
    k, v = (normal(seed, num_blocks, block_size, num_kv_heads, head_dim).to(dtype) for seed in (1, 2))
    planes = pack_shuffled(k, v) if shuffled else (k, v)
    return Cache(planes, k.double(), v.double(), block_size, shuffled)


def end_of_a_pool_above_4_gib(*planes: torch.Tensor) -> list[torch.Tensor]:
    """Planes of more than 4 GiB that end with these blocks; what lies before them is read by nobody. On a CPU that is
    address space, of which nothing but the end is ever touched; an offset of 32 bits ends the process."""
    grown = []
    for plane in planes:
        num_blocks = (1 << 32) // plane[0].nbytes + 1 + len(plane)
        grown.append(torch.empty(num_blocks, *plane.shape[1:], dtype=plane.dtype, device=DEVICE))
        grown[-1][-len(plane) :] = plane
    return grown


def block_tables(lengths: Sequence[int], num_blocks: int, block_size: int) -> torch.Tensor:
    """A row of shuffled block ids per length; what lies past a row's blocks is no block's id."""
    width = max(1, -(-max(lengths) // block_size))
    generator = torch.Generator().manual_seed(3)
    tables = torch.full((len(lengths), width + 1), 1 << 30, dtype=torch.int32)
    for row, length in enumerate(lengths):
        used = -(-length // block_size)
        tables[row, :used] = torch.randperm(num_blocks, generator=generator)[:used].int()
    return tables.to(DEVICE)


def cached(plane: torch.Tensor, tables: torch.Tensor, row: int, length: int) -> torch.Tensor:
    """The row's tokens of a plane [NB, BS, ...] in their order: [length, ...]."""
    return plane[tables[row, : -(-length // plane.shape[1])].long()].flatten(0, 1)[:length]


def starts_and_lengths(requests: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Of requests of (context, new tokens): where the new tokens of each start, and where the last end; lengths."""
    starts = itertools.accumulate((new for _, new in requests), initial=0)
    return list(starts), [context + new for context, new in requests]


def int32(values: Sequence[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The formula in float64: q [Lq, H, D], the last Lq of the Lk tokens k, v [Lk, KH, D or more] -> [Lq, H, Dv]."""
    group = q.shape[1] // k.shape[1]
    keys, values = (t.double().repeat_interleave(group, dim=1) for t in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    num_keys, num_queries = k.shape[0], q.shape[0]
    positions = torch.arange(num_keys, device=q.device)
    distance = positions[num_keys - num_queries :, None] - positions
    seen = (distance >= 0) & (distance < (window or num_keys))
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, num_queries, 1)], dim=-1)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1)[..., :num_keys], values)
