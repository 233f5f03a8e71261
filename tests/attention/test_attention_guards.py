"""Known faults of aiter, by the numbers of the list they were collected in, and what keeps the engine from each.

Those of latent attention (10 … 14, 18, 21, 26) are in test_attention_guards_mla.py, that of experts (17) in
tests/aiter_contract/test_aiter_moe.py.
"""

from __future__ import annotations

import ast
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from aiter_standin import installed
from attention_steps import Step, make_step
from emulation import emulated_platform
from engine_support import stand_in

import miniserve
from miniserve.attention import aiter as adapter
from miniserve.attention.backends.build import build_backend
from miniserve.attention.backends.rocm_aiter_fa import FlashBackend
from miniserve.attention.contracts import CONTRACTS
from miniserve.attention.metadata import StepBatch, decode_rows
from miniserve.attention.platform import NAMED_PLATFORMS, Platform
from miniserve.attention.routes import least_asm_rows
from miniserve.attention.select import Choice, select
from miniserve.attention.spec import AttentionSpec
from miniserve.checks.check_paths import made_up_layer
from miniserve.core import UserError
from miniserve.runner.self_check import check_backend

BF16, FP16 = torch.bfloat16, torch.float16
BOTH = ("linear", "shuffled")
MI300X, MI355X = NAMED_PLATFORMS["mi300x"], NAMED_PLATFORMS["mi355x"]
SPEC = AttentionSpec(16, 2, 128, 128**-0.5, BF16, BF16)
PACKAGE = Path(miniserve.__file__).parent


def choose(spec: AttentionSpec, backend: str, layout: str, block_size: int = 16, on: Platform = MI300X) -> Choice:
    return select([spec], on, block_size=block_size, backend=backend, layout=layout)


def decode_kernel(spec: AttentionSpec, layout: str = "shuffled", block_size: int = 16) -> str:
    """What ROCM_AITER_FA decodes the layer by, beside a plain layer that keeps the backend in play."""
    plain = replace(SPEC, dtype=spec.dtype, kv_dtype=spec.kv_dtype)
    choice = select([spec, plain], MI300X, block_size=block_size, backend="ROCM_AITER_FA", layout=layout)
    return choice.routes[0].decode


def refused(spec: AttentionSpec, backend: str, layout: str, block_size: int = 16) -> str:
    with pytest.raises(UserError) as error:
        choose(spec, backend, layout, block_size)
    return str(error.value)


def flash_backend(step: Step, *, trust_asm_lengths: bool = False) -> FlashBackend:
    choice = choose(step.layer.spec, "ROCM_AITER_FA", step.layout.name, on=emulated_platform())
    options = choice.options(torch.device("cpu"), 16, 512)
    return FlashBackend(step.layout, replace(options, trust_asm_lengths=trust_asm_lengths))


def decode_step(spec: AttentionSpec, lengths: list[int], layout: str = "shuffled") -> Step:
    return make_step((spec, 16, [(length - 1, 1) for length in lengths], len(lengths)), layout, 5, (0.5, 0.25))


def error_of(out: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Of each row, relative."""
    return (out.double() - want).norm(dim=1) / want.norm(dim=1)


def test_1_blocks_beyond_2_gib_are_safe_by_version() -> None:
    adapter.load.cache_clear()
    with installed(version="0.1.16.post2"), pytest.raises(adapter.Unavailable, match=r"too old: v0\.1\.17"):
        adapter.load()


@pytest.mark.parametrize("head_dim", [64, 256])
def test_2_other_head_dims_never_reach_the_asm_kernel(head_dim: int) -> None:
    spec = replace(SPEC, head_dim=head_dim, scale=head_dim**-0.5)
    assert decode_kernel(spec) == "paged_attention_rocm"
    assert least_asm_rows(spec, 304) is None
    with stand_in("gfx942", 1) as module:  # 8 rows of 16 heads are far above the switch
        step = decode_step(spec, [30] * 8)
        step.check(flash_backend(step))
        assert not [call for call in module._standin.calls if call.route == "asm"]


def test_3_what_has_no_asm_kernel_is_settled_at_the_start() -> None:
    """Not at the first batch that is large enough to ask for it."""
    assert decode_kernel(SPEC, block_size=32) == "paged_attention_rocm"
    assert decode_kernel(replace(SPEC, num_heads=34)) == "unified_attention"
    mixed = replace(SPEC, dtype=FP16)
    for backend in ("ROCM_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"):
        assert "needs the KV cache in float16, not bfloat16" in refused(mixed, backend, "shuffled")


def test_4_another_scale_is_left_to_the_kernel_that_reads_it() -> None:
    spec = replace(SPEC, scale=0.2)
    assert decode_kernel(spec) == "paged_attention_rocm"
    with stand_in("gfx942", 1) as module:
        step = decode_step(spec, [30] * 8)
        step.check(flash_backend(step))
        assert not [call for call in module._standin.calls if call.route == "asm"]


def test_5_sinks_never_meet_flash_attention() -> None:
    spec = replace(SPEC, sinks=True)
    assert "paged_attention_v1 has no sinks" in refused(spec, "ROCM_AITER_FA", "linear")
    route = select([spec, SPEC], MI300X, block_size=16, backend="ROCM_AITER_FA", layout="linear").routes[0]
    assert {route.decode, route.chunks} == {"unified_attention"}


def test_6_flash_attention_gets_no_block_table() -> None:
    given: list[set[str]] = []
    with stand_in("gfx942", 4):
        step = make_step((SPEC, 16, [(50, 20), (0, 9)], 0), "linear", 1)
        backend = flash_backend(step)
        real = adapter.load().flash_attn_varlen_func

        def watch(*args: Any, **options: Any) -> Any:
            given.append({*options, *(f"position {index}" for index in range(len(args)))})
            return real(*args, **options)

        backend._aiter = replace(backend._aiter, flash_attn_varlen_func=watch)
        step.check(backend)
    assert len(given) == 3
    assert not any("block_table" in names or "position 7" in names for names in given)


def test_7_small_heads_never_reach_paged_attention() -> None:
    small = replace(SPEC, head_dim=32, scale=32**-0.5)
    assert "paged_attention_v1 does not take head_dim 32" in refused(small, "ROCM_AITER_FA", "linear")
    assert choose(small, "ROCM_AITER_UNIFIED_ATTN", "linear").routes[0].decode == "unified_attention"
    for odd in (80, 96, 112):
        spec = replace(SPEC, head_dim=odd, scale=odd**-0.5)
        for backend in ("ROCM_ATTN", "ROCM_AITER_FA"):
            assert f"does not take head_dim {odd}" in refused(spec, backend, "shuffled")


@pytest.mark.parametrize("change", [{"sliding_window": 64}, {"sinks": True}, {"softcap": 20.0}])
def test_8_what_the_shuffled_kernels_lack_is_rerouted(change: dict[str, Any]) -> None:
    spec = replace(SPEC, **change)
    assert decode_kernel(spec) == "unified_attention"
    rocm = select([spec, SPEC], MI300X, block_size=16, backend="ROCM_ATTN")
    assert rocm.routes[0].decode == "triton paged_decode"
    assert choose(spec, "auto", "shuffled").backend == "ROCM_AITER_UNIFIED_ATTN"
    gluon = choose(replace(SPEC, sliding_window=64, sinks=True), "ROCM_AITER_GLUON", "shuffled")
    assert gluon.routes[0].decode == "pa_decode_gluon"
    paged = [kernel for contract in CONTRACTS for kernel in contract.decode if kernel.name.startswith("paged_att")]
    assert len(paged) == 4
    assert all(kernel.one_query for kernel in paged)


@pytest.mark.parametrize("lengths", [[30, 17], [30] * 8])
def test_9_one_scale_writes_and_reads_fp8(lengths: list[int]) -> None:
    """By the HIP kernel below the switch, by the ASM kernel's tables above it."""
    spec = replace(SPEC, kv_dtype=MI300X.fp8_dtype)
    with stand_in("gfx942", 32):
        step = decode_step(spec, lengths)
        backend = flash_backend(step)
        step.check(backend, 8e-2)  # the HIP kernel rounds queries and weights to fp8
        tables = backend._paged.asm_scales.of(step.layer, step.cache)
        assert [float(table.unique()) for table in tables if table is not None] == [0.5, 0.25]
        same = replace(step.layer, layer_index=7)
        assert backend._paged.asm_scales.of(same, step.cache)[0] is tables[0], "layers of one scale share a table"


def test_15_graphs_have_a_pool_of_their_own() -> None:
    """aiter's kernels allocate when they are called: memory that a graph goes on using must be the graph's."""
    tree = ast.parse((PACKAGE / "runner" / "decode_graph.py").read_text())
    captures = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.cuda.graph"
    ]
    assert captures
    assert all("pool" in {keyword.arg for keyword in node.keywords} for node in captures)


def test_16_unified_attention_is_kept_from_a_compiler_that_it_crashes() -> None:
    """In the middle of serving, and the process with it: no self-check could tell."""
    amd = replace(MI355X, triton_version="3.7.0+amd.rocm7.0.0.git89002410")
    windowed = replace(SPEC, sliding_window=64, sinks=True)
    for backend in ("ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_GLUON"):
        with pytest.raises(
            UserError, match=r"unified_attention crashes the compiler of Triton 3\.7\.0\+amd\S+ on gfx950"
        ):
            choose(windowed, backend, "shuffled", on=amd)
    assert choose(SPEC, "ROCM_AITER_FA", "shuffled", on=amd).routes[0].chunks == "flash_attn_varlen_func"
    assert choose(windowed, "auto", "auto", on=amd).backend == "TRITON_ATTN"
    for other in (
        replace(amd, arch="gfx942"),
        *(replace(MI355X, triton_version=version) for version in ("", "3.6.0", "3.7.0", "3.8.0+amd.rocm7.2")),
    ):
        assert choose(windowed, "auto", "auto", on=other).backend == "ROCM_AITER_UNIFIED_ATTN"


@pytest.mark.parametrize("kv_dtype", [BF16, MI300X.fp8_dtype])
def test_19_every_kernel_is_called_before_a_request_is(kv_dtype: torch.dtype) -> None:
    """aiter builds a kernel at its first call, for minutes: while the engine starts, as part of the self-check."""
    spec, device = replace(SPEC, kv_dtype=kv_dtype), torch.device("cpu")
    for name, layout in (("ROCM_ATTN", "shuffled"), *product(("ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN"), BOTH)):
        with stand_in("gfx942", 4) as module:
            choice = choose(spec, name, layout, on=emulated_platform())
            cache = choice.kv_layout.allocate(spec, 200, device)
            check_backend(choice, choice.options(device, 16, 512), [made_up_layer(spec, device)], [cache])
            called = {call.function for call in module._standin.calls}
            (route,) = choice.routes
            assert {k for k in astuple(route) if not k.startswith("triton")} <= called
            if route.decode == "paged_attention_common":
                assert {"pa_fwd_asm", "paged_attention_rocm"} <= called


def test_20_one_module_imports_aiter_and_only_when_asked() -> None:
    importers = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.partition(".")[0] == "aiter" for name in names) or (
                isinstance(node, ast.Constant) and str(node.value).startswith("aiter.")
            ):
                importers.append(path.relative_to(PACKAGE).as_posix())
    assert set(importers) == {"attention/aiter.py"}
    at_import = ast.parse((PACKAGE / "attention" / "aiter.py").read_text()).body
    assert not [node for node in at_import if isinstance(node, ast.Import) and node.names[0].name == "aiter"]


@pytest.mark.parametrize("layout", ["linear", "shuffled"])
def test_22_slots_are_int64_and_one_a_token(layout: str) -> None:
    seen: list[tuple[torch.dtype, int, int]] = []

    def watched(write: Any, slots_at: int) -> Any:
        def watch(*given: Any, **options: Any) -> Any:
            seen.append((given[slots_at].dtype, given[slots_at].shape[0], given[0].shape[0]))
            return write(*given, **options)

        return watch

    with stand_in("gfx942", 4):
        step = make_step((SPEC, 16, [(50, 1), (50, 20), (0, 9)], 1), layout, 1)
        real = adapter.load()
        write = watched(real.fused_qk_rope_reshape_and_cache, 5)
        backend = flash_backend(step)
        backend._aiter = replace(real, fused_qk_rope_reshape_and_cache=write)
        step.check(backend)
    assert seen == [(torch.int64, 30, 30)]


def test_23_other_amd_gpus_get_triton() -> None:
    for arch in ("gfx90a", "gfx1100", "gfx1151", "gfx1250"):
        choice = choose(SPEC, "auto", "auto", on=Platform(arch, 64, (0, 1, 20)))
        assert choice.backend == "TRITON_ATTN"


def test_24_fp8_is_the_format_of_the_gpu() -> None:
    wrong = replace(SPEC, kv_dtype=torch.float8_e4m3fn)
    assert "fp8 on gfx942 is float8_e4m3fnuz" in refused(wrong, "auto", "auto")
    with stand_in("gfx942", 4) as module:
        assert module.dtypes.fp8 == emulated_platform().fp8_dtype
    with stand_in("gfx950", 4) as module:
        assert module.dtypes.fp8 == emulated_platform().fp8_dtype


class TestGuard25:
    """The ASM kernel counts the first tile of contexts of 241 … 255 tokens twice."""

    LENGTHS: ClassVar = [30, 300, 256, 240, 16, 1, 257, 250]

    def routes(self, module: Any) -> set[str]:
        return {call.route for call in module._standin.calls if call.function.startswith("pa")}

    def test_a_step_with_such_a_length_takes_hip(self) -> None:
        for length, route in ((250, "hip"), (241, "hip"), (255, "hip"), (240, "asm"), (256, "asm")):
            with stand_in("gfx942", 32) as module:
                step = decode_step(SPEC, [*self.LENGTHS[:-1], length])
                step.check(flash_backend(step))
                assert self.routes(module) == {route}, length

    def test_without_the_guard_these_rows_would_be_wrong(self) -> None:
        with stand_in("gfx942", 32) as module:
            step = decode_step(SPEC, [*self.LENGTHS[:-1], 241])
            for plane in (step.cache.key, step.cache.value):
                plane[plane == 0] = 1.0  # as a block's former owner leaves it
            errors = error_of(step.run(flash_backend(step, trust_asm_lengths=True)), step.want)
            assert self.routes(module) == {"asm"}
        assert float(errors[:-1].max()) < 1e-2
        assert float(errors[-1]) > 5e-2

    def test_the_guard_can_be_lifted_where_the_kernel_is_right(self) -> None:
        with stand_in("gfx942", 32) as module:
            module._standin.configure(tile_bug=False)
            step = decode_step(SPEC, self.LENGTHS)
            step.check(flash_backend(step, trust_asm_lengths=True))
            assert self.routes(module) == {"asm"}

    def test_a_captured_step_takes_hip_unless_lifted_or_too_short(self) -> None:
        for trusted, longest, wrong in ((False, 241, True), (False, 240, False), (True, 512, False)):
            with stand_in("gfx942", 32):
                step = decode_step(SPEC, [30] * 8)
                assert step.batch.decode is not None
                rows = replace(step.batch.decode, host_seq_lens=None, max_seq_len=longest)
                meta = flash_backend(step, trust_asm_lengths=trusted).build(replace(step.batch, decode=rows))
            assert meta.any_wrong_length == wrong

    def test_it_costs_no_copy_from_the_device(self) -> None:
        """Tensors on the meta device have no values: whoever asks for one fails."""
        rows = decode_rows(
            torch.empty(8, 20, dtype=torch.int32, device="meta"),
            torch.empty(8, dtype=torch.int32, device="meta"),
            300,
            np.array(self.LENGTHS),
        )
        with stand_in("gfx942", 32):
            step = decode_step(SPEC, self.LENGTHS)
            for backend in all_backends(step):
                backend.build(StepBatch(torch.empty(8, dtype=torch.int64, device="meta"), rows))


def all_backends(step: Step) -> list[Any]:
    built = []
    for name in ("ROCM_ATTN", "ROCM_AITER_FA", "ROCM_AITER_UNIFIED_ATTN", "ROCM_AITER_GLUON", "TRITON_ATTN"):
        choice = choose(step.layer.spec, name, step.layout.name, on=emulated_platform())
        built.append(build_backend(choice, choice.options(torch.device("cpu"), 16, 512)))
    return built


def test_27_fp8_of_short_contexts_through_the_right_precision() -> None:
    """Precision 0 loses contexts of one block; where it is the only one there is, the ASM kernel is left out."""
    for group, route in ((8, "asm"), (16, "hip")):
        spec = replace(SPEC, num_heads=2 * group, kv_dtype=MI300X.fp8_dtype)
        with stand_in("gfx942", 4) as module:
            step = decode_step(spec, [1, 2, 15, 16, 17, 300, 9, 16])
            step.check(flash_backend(step), 2e-2 if route == "asm" else 8e-2)
            assert {call.route for call in module._standin.calls if call.function.startswith("pa")} == {route}
