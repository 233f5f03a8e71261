"""Known faults of aiter's latent attention, by the numbers of the list they were collected in (as in
test_attention_guards.py), and what keeps the engine from each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiter_standin import installed
from emulation import emulated_platform
from engine_support import stand_in
from latent_steps import LatentStep, make_latent_step

import miniserve
from miniserve.attention import aiter as adapter
from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.rocm_aiter_mla import AiterLatentBackend
from miniserve.attention.contracts import MLA_HEADS
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.routes import describe_decode, padded_heads
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.core import UserError

torch.set_num_threads(1)
BF16 = torch.bfloat16
FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}
MLA = AttentionSpec(16, 1, 576, 192**-0.5, BF16, BF16, latent=LatentDims(512, 64, 16, 16))
GPUS = ("mi300x", "mi355x")


def decode_step(spec: AttentionSpec, lengths: list[int], block_size: int = 16) -> LatentStep:
    return make_latent_step((spec, block_size, [(length - 1, 1) for length in lengths], len(lengths)), 5, 0.5)


def options_of(step: LatentStep, max_rows: int = 64, max_seq_len: int = 128) -> BackendOptions:
    return BackendOptions(
        specs=(step.layer.spec,),
        routes=(),
        platform=emulated_platform(),
        device=torch.device("cpu"),
        max_rows=max_rows,
        max_seq_len=max_seq_len,
    )


def made(step: LatentStep, max_rows: int = 64, max_seq_len: int = 128) -> tuple[AiterLatentBackend, Calls]:
    """The backend, and what it gives to the decode kernel."""
    calls, options = Calls(adapter.load_latent().mla_decode_fwd), options_of(step, max_rows, max_seq_len)
    backend = AiterLatentBackend(step.layout, options)
    backend._aiter = replace(backend._aiter, mla_decode_fwd=calls)
    return backend, calls


class Calls:
    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.made: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> object:
        self.made.append((args, kwargs))
        return self._kernel(*args, **kwargs)


def refusal(spec: AttentionSpec) -> str:
    with pytest.raises(UserError) as error:
        select([spec], NAMED_PLATFORMS["mi300x"], block_size=16, backend="ROCM_AITER_MLA")
    return str(error.value)


@pytest.mark.parametrize("arch", FP8)
@pytest.mark.parametrize("fp8", [False, True])
def test_10_any_number_of_heads_is_padded_to_one_that_kernels_take(arch: str, fp8: bool) -> None:
    for heads in (*range(1, 16, 3), *MLA_HEADS, 20, 24, 40, 100, 127):
        spec = replace(MLA, num_heads=heads, kv_dtype=FP8[arch] if fp8 else BF16)
        with stand_in(arch, 4) as module:
            step = decode_step(spec, [3, 17])
            backend, calls = made(step)
            step.check(backend, 3e-2)
            assert ("mla_decode_fwd", "persistent") in module._standin.calls, heads
        (q, *_), _ = calls.made[0]
        assert q.shape[1] == padded_heads(heads) == -(-heads // 16) * 16
    assert "takes at most 128 query heads, not 129" in refusal(replace(MLA, num_heads=129))
    told = describe_decode("mla_decode_fwd", replace(MLA, num_heads=20), NAMED_PLATFORMS["mi300x"])
    assert told == "mla_decode_fwd: persistent ASM at any batch, 20 heads padded to 32"


@pytest.mark.parametrize(("number", "arch", "heads"), [(11, "gfx950", 32), (12, "gfx942", 64)])
def test_11_and_12_fp8_kernels_that_are_wrong_or_fault_get_no_fp8_queries(number: int, arch: str, heads: int) -> None:
    with stand_in(arch, 4):
        step = decode_step(replace(MLA, num_heads=heads, kv_dtype=FP8[arch]), [3, 17])
        backend, calls = made(step)
        step.check(backend, 3e-2)
    (q, *_), terms = calls.made[0]
    assert q.dtype == BF16
    assert float(terms["kv_scale"]) == 0.5
    assert terms.get("q_scale") is None


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("heads", MLA_HEADS)
def test_13_what_the_kernel_allocates_by_the_buffers_sizes_is_planned_for(heads: int, gpu: str) -> None:
    platform = NAMED_PLATFORMS[gpu]
    for rows in (1, 64, 256, 1024):
        with stand_in(platform.arch, platform.compute_units):
            step = decode_step(replace(MLA, num_heads=heads), [3])
            backend, _ = made(step, max_rows=rows)
            (plan,) = backend._plans.values()
            planned = backend.scratch_bytes("latent", options_of(step, max_rows=rows))
        seen = 16 if platform.arch == "gfx942" else padded_heads(heads)
        logits = plan["reduce_partial_map"].shape[0] * seen * 513 * 4
        assert logits + backend._kv_indices.nbytes <= planned < 1 << 29
    assert adapter.MINIMUM_VERSION >= (0, 1, 17)


def test_14_a_graph_reads_no_tensor_that_aiter_may_let_go() -> None:
    """Left to itself aiter takes the kernel of another kind from 32 rows on, with a cached tensor of splits."""
    for rows in (31, 32, 40):
        with stand_in("gfx950", 4) as module:
            step = decode_step(MLA, [2] * rows)
            backend, _ = made(step)
            step.check(backend, 3e-2)
            routes = {call.route for call in module._standin.calls if call.function == "mla_decode_fwd"}
            assert routes == {"persistent"}


def test_18_no_gluon_kernel_of_latents_is_called() -> None:
    """Which are wrong over more than 2 GiB of latents. That of paged attention reaches blocks by 64-bit offsets."""
    for source in Path(miniserve.__file__).parent.rglob("*.py"):
        assert "mla_gluon" not in source.read_text(), source


def test_21_indices_reach_as_far_as_the_largest_step() -> None:
    with stand_in("gfx942", 4):
        step = decode_step(MLA, [64] * 6)
        backend, _ = made(step, max_rows=6, max_seq_len=64)
        step.check(backend, 3e-2)
        assert backend._kv_indices.shape == (6 * 64,)


@pytest.mark.parametrize("block_size", [1, 16, 64, 48])
def test_26_pages_are_of_one_token_whatever_the_blocks_are(block_size: int) -> None:
    with stand_in("gfx950", 4):
        step = decode_step(MLA, [1, 64, 65, 100], block_size)
        backend, calls = made(step)
        step.check(backend, 3e-2)
    (_, kv_buffer, *_), terms = calls.made[0]
    assert kv_buffer.shape[1:] == (1, 1, 576)
    assert terms["page_size"] == 1


def test_the_scale_is_told_and_the_six_buffers_come_together() -> None:
    """Left out, the scale would be that of 576 dimensions; of five buffers the kernel would read a null."""
    with stand_in("gfx942", 4):
        step = decode_step(replace(MLA, scale=0.31), [9])
        backend, calls = made(step)
        step.check(backend, 3e-2)
    _, terms = calls.made[0]
    assert terms["sm_scale"] == 0.31
    six = ("work_meta_data", "work_indptr", "work_info_set", "reduce_indptr", "reduce_final_map", "reduce_partial_map")
    assert all(terms[name] is not None for name in six)


@pytest.mark.parametrize("kv_dtype", [BF16, FP8["gfx942"]])
def test_a_gpu_writes_latents_by_the_engines_own_kernel(kv_dtype: torch.dtype) -> None:
    """aiter's makes NaN of what an fp8 cache cannot hold."""
    from miniserve.kernels.triton.cache_write import write_latent

    step = decode_step(replace(MLA, kv_dtype=kv_dtype), [9])
    with installed(arch="gfx942"):  # and no twins of the Triton kernels
        adapter.load.cache_clear()
        backend = AiterLatentBackend(step.layout, options_of(step))
    adapter.load.cache_clear()
    assert backend._write_kernel is write_latent
    calls = Calls(lambda *given, **terms: None)
    backend._write_kernel = calls
    _, _, kv_c, k_pe = step.inputs
    backend.write(step.layer, step.cache, kv_c, k_pe, step.batch.slot_mapping)
    ((given, terms),) = calls.made
    assert list(map(id, given)) == list(map(id, (kv_c, k_pe, step.cache.key, step.batch.slot_mapping)))
    assert terms == {"kv_scale": None if kv_dtype == BF16 else step.layer.kv_scale}


def test_a_plan_costs_no_copy_from_the_device() -> None:
    """Tensors on the meta device have no values: whoever asks for one fails."""
    meta, asked = torch.device("meta"), []
    with stand_in("gfx942", 4):
        step = decode_step(MLA, [3, 17, 250])
        rows = step.batch.decode
        assert rows is not None
        backend = AiterLatentBackend(step.layout, replace(options_of(step, 4, 300), device=meta))
        backend._aiter = replace(backend._aiter, get_mla_metadata_v1=lambda **given: asked.append(given))
        backend._token_indices = lambda *given, **terms: asked.append(terms)
        backend.build_decode(replace(rows, block_tables=rows.block_tables.to(meta), seq_lens=rows.seq_lens.to(meta)))
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": torch.float16, "kv_dtype": torch.float16}, "mla_decode_fwd does not compute in float16"),
        ({"latent": LatentDims(448, 128, 16, 16)}, "mla_decode_fwd takes a latent of 512 + 64, not of 448 + 128"),
        ({"latent": LatentDims(512, 64, 256, 16)}, "takes keys and values of at most 256, not of 320"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_at_the_start(change: dict[str, Any], said: str) -> None:
    assert said in refusal(replace(MLA, **change))
    assert select([replace(MLA, **change)], NAMED_PLATFORMS["mi300x"], block_size=16).backend == "TRITON_MLA"


def test_an_aiter_whose_planning_kernel_was_not_read_is_refused() -> None:
    old = replace(NAMED_PLATFORMS["mi300x"], aiter_version=(0, 1, 19))
    choice = select([MLA], old, block_size=16)
    assert choice.backend == "TRITON_MLA"
    assert ("ROCM_AITER_MLA", "", "it needs aiter v0.1.20 or newer, not v0.1.19") in choice.rejected


@pytest.mark.parametrize(("gpu", "route"), [("mi300x", "fmha_v3"), ("mi325x", "ck"), ("mi355x", "fmha_v3")])
def test_an_mi325x_prefills_without_the_assembly_that_hung_it(gpu: str, route: str) -> None:
    """aiter #3139: all GPUs of a host were lost, at heads of 192 and 128."""
    platform = NAMED_PLATFORMS[gpu]
    spec = replace(MLA, latent=LatentDims(512, 64, 128, 128))
    with stand_in(platform.arch, platform.compute_units) as module:
        step = make_latent_step((spec, 16, [(20, 5), (0, 9)], 0), 5, 0.5)
        step.check(AiterLatentBackend(step.layout, replace(options_of(step), platform=platform)), 3e-2)
        assert {each.route for each in module._standin.calls if each.function == "flash_attn_varlen_func"} == {route}
