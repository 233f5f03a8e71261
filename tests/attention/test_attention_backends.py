"""Every backend, layout and dtype against attention in float64, on steps that mix decode, extend and prefill."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch
from attention_reference import Layer
from attention_steps import Case, cases, make_step
from emulation import TWINS, torch_kernels
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.attention.backends.base import Backend, BackendOptions
from miniserve.attention.backends.build import backend_class
from miniserve.attention.backends.cpu_attn import CpuBackend
from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.attention.backends.triton_attn import TritonBackend
from miniserve.attention.contracts import CONTRACTS
from miniserve.attention.layouts import LAYOUTS, KVCache, KVLayout
from miniserve.attention.metadata import decode_rows
from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionSpec
from miniserve.kernels import native

needs_native = pytest.mark.skipif(
    native.unavailable_reason() is not None, reason=f"C++ kernels: {native.unavailable_reason()}"
)


def make_backend(name: str, layout: KVLayout, spec: AttentionSpec) -> Backend[Any]:
    if name.startswith("TRITON_ATTN"):
        options = BackendOptions(
            specs=(spec,),
            routes=(),
            platform=Platform(name.partition(" ")[2], 304),
            device=torch.device("cpu"),
            max_rows=8,
            max_seq_len=256,
        )
        with torch_kernels():
            backend = TritonBackend(layout, options)
        backend.linearize_from = 2
        return backend
    return CpuBackend(layout) if name == "CPU_ATTN" else TorchBackend(layout)


def check(name: str, case: Case, layout: str, seed: int) -> None:
    spec, block_size, *_ = case
    if not LAYOUTS[layout].refusal(spec, block_size):
        step = make_step(case, layout, seed)
        step.check(make_backend(name, step.layout, spec))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(case=cases(), layout=st.sampled_from(["linear", "shuffled"]), seed=st.integers(0, 999))
def test_torch_backend_matches_the_reference(case: Case, layout: str, seed: int) -> None:
    check("TORCH_ATTN", case, layout, seed)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    case=cases(),
    layout=st.sampled_from(["linear", "shuffled"]),
    arch=st.sampled_from(["gfx942", "sm_90"]),
    seed=st.integers(0, 999),
)
def test_triton_backend_asks_its_kernels_for_the_right_thing(case: Case, layout: str, arch: str, seed: int) -> None:
    """With PyTorch's twins of the Triton kernels, which run on a CPU; the kernels themselves are tests/kernels'."""
    check(f"TRITON_ATTN {arch}", case, layout, seed)


@needs_native
@settings(max_examples=120, deadline=None, derandomize=True)
@given(case=cases(), layout=st.sampled_from(["linear", "shuffled"]), seed=st.integers(0, 999))
def test_cpu_backend_matches_the_reference(case: Case, layout: str, seed: int) -> None:
    check("CPU_ATTN", case, layout, seed)


@pytest.mark.parametrize("name", ["TORCH_ATTN", pytest.param("CPU_ATTN", marks=needs_native)])
@pytest.mark.parametrize("layout", ["linear", "shuffled"])
def test_every_length_around_a_partition_of_256(name: str, layout: str) -> None:
    """Decoded, as the end of a chunk, and one-token requests."""
    spec = AttentionSpec(4, 2, 64, 0.125, torch.bfloat16, torch.bfloat16)
    decodes = [(length - 1, 1) for length in range(230, 271)]
    chunks = [(length - new, new) for length in range(230, 271) for new in (1 + length % 3,)]
    check(name, (spec, 16, [(0, 1), *decodes, *chunks, (0, 1)], 42), layout, 0)


@needs_native
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_highest_block_of_a_pool_above_4_gib(shuffled: bool) -> None:
    """Which is address space, of which nothing but the end is ever touched."""
    kernels, spec = native.NativeKernels(), AttentionSpec(16, 8, 128, 0.1, torch.bfloat16, torch.bfloat16)
    layout = LAYOUTS["shuffled" if shuffled else "linear"](16)
    one = layout.allocate(spec, 1, torch.device("cpu"))
    num_blocks = (1 << 32) // one.key.nbytes + 2
    key, value = (torch.empty(num_blocks, *plane.shape[1:], dtype=plane.dtype) for plane in (one.key, one.value))
    k, v = (torch.randn(1, 8, 128, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2))
    kernels.write_kv(k, v, key, value, torch.tensor([num_blocks * 16 - 16]), 16, shuffled)
    backend = make_backend("CPU_ATTN", layout, spec)
    assert isinstance(backend, CpuBackend)
    meta = decode_rows(torch.tensor([[num_blocks - 1]], dtype=torch.int32), torch.ones(1, dtype=torch.int32), 1, None)
    out = backend.decode(Layer(spec), k.repeat_interleave(2, dim=1), KVCache(key, value), meta)
    assert torch.equal(out, v.repeat_interleave(2, dim=1).flatten(1)), "of one key the weight is 1"


@needs_native
@pytest.mark.parametrize("layout_name", ["linear", "shuffled"])
def test_decode_does_not_depend_on_its_neighbours(layout_name: str) -> None:
    """The same row alone and among others, bit for bit, so that a request's tokens do not depend on the batch."""
    spec = AttentionSpec(8, 4, 64, 0.125, torch.bfloat16, torch.bfloat16)
    layout = LAYOUTS[layout_name](16)
    cache = layout.allocate(spec, 40, torch.device("cpu"))
    cache.key.normal_(generator=torch.Generator().manual_seed(1))
    cache.value.normal_(generator=torch.Generator().manual_seed(2))
    q = torch.randn(9, 8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(4))[:36].view(9, 4).int()
    lens = torch.tensor([1, 16, 17, 64, 33, 5, 48, 2, 63], dtype=torch.int32)
    backend = make_backend("CPU_ATTN", layout, spec)
    assert isinstance(backend, CpuBackend)
    together = backend.decode(Layer(spec), q, cache, decode_rows(tables, lens, 64, None))
    for row in range(9):
        one = slice(row, row + 1)
        alone = backend.decode(Layer(spec), q[one], cache, decode_rows(tables[one], lens[one], 64, None))
        assert torch.equal(alone, together[one])


def test_the_twins_of_triton_s_kernels_take_what_those_take() -> None:
    """Else a backend that is right on a CPU would fail on a GPU."""
    pytest.importorskip("triton")
    for name, twin in TWINS.items():
        module, _, kernel = name.partition(".")
        triton = getattr(importlib.import_module(f"miniserve.kernels.triton.{module}"), kernel)
        ours, theirs = inspect.signature(twin), inspect.signature(triton)
        known = {"num_kv_heads", "block_size", "shuffled", "scale", "window", "softcap", "sinks", "k_scale", "v_scale"}
        asked = [name for name, it in ours.parameters.items() if it.kind is not it.VAR_KEYWORD]
        missing = (known if kernel == "paged_decode" else set()) | set(asked)
        assert missing <= set(theirs.parameters), name
        given = {name for name, it in theirs.parameters.items() if it.default is it.empty}
        assert given <= missing, name


def test_every_contract_has_its_backend() -> None:
    assert all(issubclass(backend_class(contract.name), Backend) for contract in CONTRACTS)
