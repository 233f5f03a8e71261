"""The ROCm backends on the stand-in: whatever `select` allows, on random steps, against attention in float64."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from attention_steps import Case, Step, make_step
from emulation import emulated_platform
from engine_support import stand_in
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.build import build_backend
from miniserve.attention.metadata import QueryRows, StepBatch
from miniserve.attention.select import Choice, select
from miniserve.attention.spec import AttentionSpec
from miniserve.core import UserError

BF16, FP16 = torch.bfloat16, torch.float16
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
BACKENDS = ("ROCM_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_GLUON", "TRITON_ATTN")
TOLERANCE = {BF16: 1.2e-2, FP16: 2.5e-3}
CU_NUM = 4  # from 9 heads in a step on, the ASM kernel's turn would come
# HIP kernels round queries and weights to fp8; new tokens may be read before they were rounded.
FP8_TOLERANCE = {"gfx942": 8e-2, "gfx950": 15e-2}


def build(choice: Choice, **changes: Any) -> Backend[Any]:
    backend = build_backend(choice, choice.options(torch.device("cpu"), 64, 600))
    for name, value in changes.items():
        setattr(backend, name, value)
    return backend


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Mostly what most models have, else anything."""
    plain = draw(st.sampled_from([True, True, False]))
    kv_heads = draw(st.integers(1, 3))
    dtype = draw(st.sampled_from([BF16, FP16]))
    head_dim = draw(st.sampled_from([128, 64, 256] if plain else [128, 32, 64, 80]))
    block_size = 16 if plain else draw(st.sampled_from([16, 32, 64]))
    spec = AttentionSpec(
        num_heads=kv_heads * draw(st.sampled_from([1, 4, 10] if plain else [4, 17])),
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5 if plain else draw(st.sampled_from([head_dim**-0.5, 0.3])),
        dtype=dtype,
        kv_dtype=draw(st.sampled_from([dtype, torch.float8_e4m3fn])),  # replaced by the arch's own
        sliding_window=None if plain else draw(st.sampled_from([None, 1, 7, 33])),
        softcap=None if plain else draw(st.sampled_from([None, None, 5.0])),
        sinks=not plain and draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    lengths = [0, 1, block_size - 1, block_size, 50, 240, 244, 254, 255, 300]
    decodes = [(draw(st.sampled_from(lengths)), 1) for _ in range(draw(st.integers(0, 4)))]
    chunks = [
        (draw(st.sampled_from(lengths)), draw(st.sampled_from([1, 2, 37])))
        for _ in range(draw(st.integers(0 if decodes else 1, 3)))
    ]
    return spec, block_size, [*decodes, *sorted(chunks, key=lambda chunk: not chunk[0])], len(decodes)


@pytest.mark.parametrize("arch", FP8)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    case=cases(),
    backend=st.sampled_from(BACKENDS),
    layout=st.sampled_from(["linear", "shuffled"]),
    scales=st.sampled_from([(1.0, 1.0), (0.5, 2.0), (0.03, 0.04)]),
    context_tokens=st.sampled_from([64, 32768]),
    seed=st.integers(0, 999),
)
def test_what_is_allowed_is_right(
    arch: str, case: Case, backend: str, layout: str, scales: tuple[float, float], context_tokens: int, seed: int
) -> None:
    spec, block_size, *rest = case
    if spec.kv_dtype.itemsize == 1:
        spec = replace(spec, kv_dtype=FP8[arch])
    with stand_in(arch, CU_NUM):
        try:
            choice = select([spec], emulated_platform(), block_size=block_size, backend=backend, layout=layout)
        except UserError:
            return
        step = make_step((spec, block_size, *rest), layout, seed, scales)
        fp8 = spec.kv_dtype.itemsize == 1
        made = build(choice, context_tokens=context_tokens)
        tolerance = FP8_TOLERANCE[arch] if fp8 else TOLERANCE[spec.dtype]
        step.check(made, tolerance)
        if not step.batch.chunks:
            step.padded().check(made, tolerance)


PLAIN = AttentionSpec(16, 2, 128, 128**-0.5, BF16, BF16)


def decode_step(spec: AttentionSpec, lengths: list[int], layout: str = "shuffled") -> Step:
    return make_step((spec, 16, [(length - 1, 1) for length in lengths], len(lengths)), layout, 3, (0.5, 0.25))


def chosen(spec: AttentionSpec, backend: str, layout: str) -> Choice:
    return select([spec], emulated_platform(), block_size=16, backend=backend, layout=layout)


@pytest.mark.parametrize("arch", FP8)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_asm_kernel_takes_over_above_the_switch(arch: str, fp8: bool) -> None:
    """16 heads: 32 compute units put the switch between four rows and five. A graph's padding counts, and a graph whose
    rows may get to lengths that the ASM kernel gets wrong leaves it out."""
    spec = replace(PLAIN, kv_dtype=FP8[arch]) if fp8 else PLAIN
    for lengths, padding, route in (
        ([1, 16, 17, 300], 0, "hip"),
        ([1, 16, 17, 300, 256], 0, "asm"),
        ([240] * 8, 0, "asm"),
        ([1, 16, 17, 300, 256], 1, "hip"),
        ([1, 16, 240], 1, "hip"),
        ([1, 16, 17, 240], 1, "asm"),
    ):
        with stand_in(arch, cu_num=32) as module:
            step = decode_step(spec, lengths)
            made = build(chosen(spec, "ROCM_AITER_FA", "shuffled"))
            (step.padded(padding) if padding else step).check(made, FP8_TOLERANCE[arch])
            decodes = [call for call in module._standin.calls if call.function.startswith("pa")]
            assert {call.route for call in decodes} == {route}, lengths


@pytest.mark.parametrize("layout", ["linear", "shuffled"])
@pytest.mark.parametrize("backend", ["ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"])
@pytest.mark.parametrize(
    ("change", "write"),
    [
        ({}, "fused_qk_rope_reshape_and_cache"),
        ({"kv_dtype": FP8["gfx942"]}, "fused_qk_rope_reshape_and_cache"),
        ({"qk_norm": True}, "triton rope_and_write"),
        ({"dtype": FP16, "kv_dtype": FP16}, "triton rope_and_write"),
        ({"rotary_dim": 32}, "triton write_kv"),
    ],
)
def test_who_turns_and_writes(backend: str, layout: str, change: dict[str, Any], write: str) -> None:
    spec = replace(PLAIN, **change)
    with stand_in("gfx942", CU_NUM) as module:
        choice = chosen(spec, backend, layout)
        assert choice.routes[0].write == write
        step = make_step((spec, 16, [(20, 1), (60, 20), (0, 9)], 1), layout, 3, (0.5, 0.25))
        step.check(build(choice), FP8_TOLERANCE["gfx942"])
        writers = {call.function for call in module._standin.calls if "cache" in call.function}
        assert writers == {name for name in (choice.routes[0].write,) if not name.startswith("triton")}


@pytest.mark.parametrize("arch", FP8)
@pytest.mark.parametrize(
    ("change", "decode"),
    [
        ({"sliding_window": 33}, "pa_decode_gluon"),
        ({"sliding_window": 1, "sinks": True}, "pa_decode_gluon"),
        ({"scale": 0.2, "num_heads": 80}, "pa_decode_gluon"),
        ({"softcap": 5.0}, "unified_attention"),
    ],
)
def test_gluon_takes_what_hip_and_asm_cannot(arch: str, change: dict[str, Any], decode: str) -> None:
    """Beside a plain layer, which keeps the backend in play; of either dtype of the cache."""
    for kv_dtype in (BF16, FP8[arch]):
        specs = (replace(PLAIN, kv_dtype=kv_dtype, **change), replace(PLAIN, kv_dtype=kv_dtype))
        with stand_in(arch, CU_NUM) as module:
            choice = select(specs, emulated_platform(), block_size=16, backend="ROCM_AITER_GLUON")
            assert [route.decode for route in choice.routes] == [decode, "pa_decode_gluon"]
            step = decode_step(specs[0], [1, 16, 17, 34, 300, 256])
            for rows in (step, step.padded()):
                rows.check(build(choice), FP8_TOLERANCE[arch])
            assert {c.function for c in module._standin.calls if c.function.startswith(("pa", "uni"))} == {decode}


@pytest.mark.parametrize("arch", FP8)
@pytest.mark.parametrize("fp8", [False, True])
def test_every_length_around_a_partition_of_256(arch: str, fp8: bool) -> None:
    """Decoded, as the end of a chunk, and one-token requests; those that the ASM kernel gets right by itself, too."""
    spec = replace(PLAIN, num_heads=4, kv_dtype=FP8[arch]) if fp8 else replace(PLAIN, num_heads=4)
    lengths = range(238, 261)
    decodes = [(length - 1, 1) for length in lengths]
    right = [row for row in decodes if not 240 <= row[0] <= 254]
    chunks = [(length - new, new) for length in lengths for new in (1 + length % 3,)]
    for backend, layout in product(BACKENDS, ("linear", "shuffled")):
        with stand_in(arch, CU_NUM) as module:
            try:
                choice = chosen(spec, backend, layout)
            except UserError:
                continue
            for rows, num_decodes in ((decodes, len(decodes)), (right, len(right)), ([(0, 1), *chunks, (0, 1)], 1)):
                step = make_step((spec, 16, rows, num_decodes), layout, 3, (0.5, 0.25))
                for each in (step,) if step.batch.chunks else (step, step.padded()):
                    each.check(build(choice), FP8_TOLERANCE[arch] if fp8 else TOLERANCE[BF16])
            asm = {call.route for call in module._standin.calls} & {"asm"}
            assert bool(asm) == ((backend, layout) == ("ROCM_AITER_FA", "shuffled"))


@pytest.mark.parametrize("arch", FP8)
@pytest.mark.parametrize("write", [{}, {"qk_norm": True}, {"rotary_dim": 32}])
def test_padding_rows_are_not_written(arch: str, write: dict[str, Any]) -> None:
    """By any of the writers."""
    spec = replace(PLAIN, **write)
    for backend, layout in product(BACKENDS, ("linear", "shuffled")):
        with stand_in(arch, cu_num=32):
            try:
                choice = chosen(spec, backend, layout)
            except UserError:
                continue
            step = decode_step(spec, [40, 1, 17, 256, 8], layout)
            made = build(choice)
            step.run(made)
            before = step.cache.key.clone(), step.cache.value.clone()
            step.padded().check(made, TOLERANCE[BF16])
            assert all(map(torch.equal, before, (step.cache.key, step.cache.value))), (backend, layout)


@pytest.mark.parametrize("arch", FP8)
def test_what_fp8_cannot_hold_is_limited_by_every_writer(arch: str) -> None:
    fp8 = FP8[arch]
    for write in ({}, {"qk_norm": True}, {"rotary_dim": 32}):
        spec = replace(PLAIN, kv_dtype=fp8, **write)
        for backend, layout in product(BACKENDS, ("linear", "shuffled")):
            with stand_in(arch, CU_NUM):
                try:
                    choice = chosen(spec, backend, layout)
                except UserError:
                    continue
                step = decode_step(spec, [3, 1], layout)
                v = step.v * 1e4
                qkv = torch.cat([step.qkv[:, : -v[0].numel()], v.flatten(1)], dim=1)
                replace(step, v=v, qkv=qkv).run(build(choice))
                assert float(step.cache.value.float().abs().max()) == torch.finfo(fp8).max, (backend, layout)


@pytest.mark.parametrize("backend", [*BACKENDS, "TORCH_ATTN"])
def test_every_field_of_the_metadata_is_read(backend: str) -> None:
    """By some kernel's call, of some layer (plain, with a window, with sinks) over some layout."""
    specs = (PLAIN, replace(PLAIN, sliding_window=40), replace(PLAIN, sinks=True))
    layouts = ("shuffled",) if backend in ("ROCM_ATTN", "ROCM_AITER_GLUON") else ("linear", "shuffled")
    read: set[str] = set()
    known: set[str] = set()
    for layout, (index, spec) in product(layouts, enumerate(specs)):
        with stand_in("gfx942", CU_NUM):
            choice = select(specs, emulated_platform(), block_size=16, backend=backend, layout=layout)
            step = make_step((spec, 16, [(20, 1), (60, 20), (0, 9)], 1), layout, 3)
            step = replace(step, layer=replace(step.layer, layer_index=index))
            made = build(choice)
            meta = Watched(made.build(step.batch), read, known)
            step.attend(made, meta)
    assert known
    assert read == known


class Watched:
    """A metadata object that notes which of its fields are read, and those of the objects in its fields."""

    def __init__(self, of: object, read: set[str], known: set[str]) -> None:
        self._of, self._read, self._known = of, read, known
        known |= {f"{type(of).__name__}.{field.name}" for field in fields(of)}  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> object:
        self._read.add(f"{type(self._of).__name__}.{name}")
        return self._watch(getattr(self._of, name))

    def _watch(self, value: object) -> object:
        if isinstance(value, StepBatch | QueryRows):  # the runner's, handed on whole
            return value
        if isinstance(value, tuple) and not hasattr(value, "_fields"):  # a named one is handed on whole
            return tuple(self._watch(item) for item in value)
        if isinstance(value, dict):
            return {key: self._watch(item) for key, item in value.items()}
        return Watched(value, self._read, self._known) if is_dataclass(value) else value
