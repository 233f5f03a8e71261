"""The self-check passes what is right, refuses what is wrong, and leaves the pool as it found it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from attention_reference import Layer
from engine_support import stand_in
from latent_steps import LatentTestLayer

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.build import build_backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.attention.layouts import LAYOUTS, KVCache, LinearLayout
from miniserve.attention.metadata import StepBatch
from miniserve.attention.platform import NAMED_PLATFORMS, emulated_platform
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.core import UserError
from miniserve.llm import LLM
from miniserve.runner.self_check import checked_backend, require, self_check

SPEC = AttentionSpec(4, 2, 32, 32**-0.5, torch.bfloat16, torch.bfloat16)
LATENT = AttentionSpec(4, 1, 80, 0.2, torch.bfloat16, torch.bfloat16, latent=LatentDims(64, 16, 24, 20))
CU_NUM = 16  # so that the ASM kernel takes 9 rows of 4 heads


def layer_of(spec: AttentionSpec, index: int = 0) -> Any:
    generator = torch.Generator().manual_seed(index)
    scales = torch.tensor([0.5]), torch.tensor([2.0])
    if (dims := spec.latent) is not None:
        weights = (
            (torch.randn(spec.num_heads, size, dims.kv_lora_rank, generator=generator) / 8).to(spec.dtype)
            for size in (dims.nope_dim, dims.v_head_dim)
        )
        return LatentTestLayer(spec, *weights, scales[0], index)
    sinks = torch.randn(spec.num_heads, generator=generator) if spec.sinks else None
    return Layer(spec, sinks, index, *scales)


def check(
    specs: list[AttentionSpec],
    name: str,
    layout: str,
    platform: Any = NAMED_PLATFORMS["cpu"],
    breaks: Callable[[Backend[Any]], Backend[Any]] = lambda backend: backend,
    num_blocks: int = 200,
    **sizes: Any,
) -> Any:
    """The results, of a pool that is found zeroed."""
    choice = select(specs, platform, block_size=16, backend=name, layout=layout)
    options = BackendOptions(
        specs=tuple(specs),
        routes=choice.routes,
        platform=platform,
        device=torch.device("cpu"),
        **({"max_rows": 16, "max_seq_len": 512} | sizes),
    )
    caches = [LAYOUTS[layout](16).allocate(spec, num_blocks, torch.device("cpu")) for spec in specs]
    backend = breaks(build_backend(choice, 16, options))
    results = self_check(name, backend, options, [layer_of(spec, i) for i, spec in enumerate(specs)], caches)
    for cache in caches:
        assert not cache.key.view(torch.uint8).any() and not cache.value.contiguous().view(torch.uint8).any()
    return results


def with_kv(spec: AttentionSpec, kv_dtype: torch.dtype) -> AttentionSpec:
    return dataclasses.replace(spec, kv_dtype=kv_dtype)


@pytest.mark.parametrize("layout", ["linear", "shuffled"])
@pytest.mark.parametrize("name", ["CPU_ATTN", "TORCH_ATTN"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_backends_pass(name: str, layout: str, dtype: torch.dtype) -> None:
    spec = dataclasses.replace(SPEC, dtype=dtype, kv_dtype=dtype)
    terms = ({}, {"sliding_window": 100}, {"softcap": 5.0}, {"sinks": True, "scale": 0.3})
    specs = [dataclasses.replace(spec, **more) for more in terms]
    results = check([*specs, spec], name, layout)
    assert all(result.ok for result in results)
    cases = ["prefill", "extend", "decode"] + ["decode with padding"] * (name == "CPU_ATTN")
    assert [(result.layer, result.case) for result in results] == list(product(range(4), cases))  # no layer twice
    assert all(0 < result.error < 0.01 for result in results)


@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_latent_attention_is_checked(kv_dtype: torch.dtype) -> None:
    results = check([with_kv(LATENT, kv_dtype)], "TORCH_MLA", "latent")
    assert [result.case for result in results] == ["prefill", "extend", "decode"]
    assert all(0 < result.error < 0.02 for result in results)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("ROCM_ATTN", "shuffled"),
        ("ROCM_AITER_FA", "linear"),
        ("ROCM_AITER_FA", "shuffled"),
        ("ROCM_AITER_UNIFIED_ATTN", "linear"),
        ("ROCM_AITER_UNIFIED_ATTN", "shuffled"),
        ("ROCM_AITER_GLUON", "shuffled"),
    ],
)
def test_aiter_paths_pass_on_the_stand_in(arch: str, name: str, layout: str) -> None:
    with stand_in(arch, CU_NUM):
        platform = emulated_platform(arch)
        spec = dataclasses.replace(SPEC, head_dim=128, scale=128**-0.5)
        for each in (spec, with_kv(spec, platform.fp8_dtype)):
            results = check([each], name, layout, platform)
            assert all(result.ok for result in results), [result.sentence() for result in results]
            cases = {result.case for result in results}
            assert "decode with padding" in cases
            assert ("decode of 9 rows" in cases) == ((name, layout) == ("ROCM_AITER_FA", "shuffled"))


def test_few_rows_short_contexts_and_small_pools_are_checked_as_far_as_they_go() -> None:
    for sizes in ({"max_rows": 1}, {"max_seq_len": 20}, {"num_blocks": 3}, {"max_seq_len": 1}):
        results = check([SPEC], "TORCH_ATTN", "linear", **sizes)
        assert results and all(result.ok for result in results)
    assert len(check([SPEC], "TORCH_ATTN", "linear", max_rows=1)) == 7 + 7 + 8


# --- wrong backends --------------------------------------------------------------------------------------------------


class Broken(TorchBackend):
    """Right, but for one way to go wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__(LinearLayout(16))
        self.fault = fault

    def write(self, layer: Any, cache: KVCache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
        if self.fault == "swaps key and value scales":
            layer = dataclasses.replace(layer, k_scale=layer.v_scale, v_scale=layer.k_scale)
        if self.fault == "does not reach the highest blocks":
            slots = slots % (cache.key.shape[0] * 16 - 32)
        if self.fault == "drops a token":
            slots, k, v = slots[1:], k[1:], v[1:]
        super().write(layer, cache, k, v, slots)

    def decode(self, layer: Any, q: torch.Tensor, cache: KVCache, meta: Any) -> torch.Tensor:
        if self.fault == "reads past the end":
            meta = dataclasses.replace(meta, seq_lens=meta.seq_lens + (meta.seq_lens % 16 > 0))
        if self.fault == "scales by something else":
            layer = dataclasses.replace(layer, spec=dataclasses.replace(layer.spec, scale=layer.spec.scale * 1.2))
        if self.fault == "raises":
            raise RuntimeError("cannot get heuristic kernel!\nand more")
        out = super().decode(layer, q, cache, meta)
        if self.fault == "NaN in a long row":
            out[meta.seq_lens == 256] = float("nan")
        if self.fault == "241 only":
            out[meta.seq_lens == 241] *= 1.13
        return out

    def build(self, batch: StepBatch) -> Any:
        if self.fault == "one block table" and batch.decode is not None:
            tables = batch.decode.block_tables[:1].expand_as(batch.decode.block_tables).contiguous()
            batch = dataclasses.replace(batch, decode=dataclasses.replace(batch.decode, block_tables=tables))
        return super().build(batch)


FAULTS = {
    "swaps key and value scales": "prefill|extend|decode",
    "does not reach the highest blocks": "extend|decode",
    "drops a token": "extend|decode",
    "reads past the end": "decode",
    "scales by something else": "decode",
    "NaN in a long row": "NaN in a row of 256 tokens",
    "241 only": "13.* off in a row of 241 tokens",
    "one block table": "decode",
    "raises": r"decode: RuntimeError: cannot get heuristic kernel! ?\(?",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_backend_is_refused_by_name(fault: str) -> None:
    spec = with_kv(SPEC, torch.float8_e4m3fn) if "scales" in fault else SPEC
    results = check([spec], "TORCH_ATTN", "linear", breaks=lambda _: Broken(fault))
    with pytest.raises(
        UserError, match=rf"TORCH_ATTN over the linear KV layout, layer 0, .*({FAULTS[fault]})"
    ) as error:
        require(results)
    assert "--attention-backend or --kv-layout" in str(error.value) and "\n" not in str(error.value)


def test_the_same_backend_without_a_fault_passes() -> None:
    require(check([SPEC], "TORCH_ATTN", "linear", breaks=lambda _: Broken("none")))


# --- the ASM kernel's feared lengths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile_bug", "max_rows", "said"), [(True, 16, "wrong"), (False, 16, "right"), (True, 8, None)])
def test_the_asm_kernel_is_trusted_with_the_feared_lengths_where_it_is_right(
    tile_bug: bool, max_rows: int, said: str | None
) -> None:
    with stand_in("gfx942", CU_NUM) as module, module._standin.emulate(arch="gfx942", cu_num=CU_NUM, tile_bug=tile_bug):
        platform = emulated_platform("gfx942")
        spec = dataclasses.replace(SPEC, head_dim=128, scale=128**-0.5)
        choice = select([spec], platform, block_size=16, backend="ROCM_AITER_FA", layout="shuffled")
        options = BackendOptions(
            specs=(spec,),
            routes=choice.routes,
            platform=platform,
            device=torch.device("cpu"),
            max_rows=max_rows,
            max_seq_len=512,
        )
        caches = [LAYOUTS["shuffled"](16).allocate(spec, 200, torch.device("cpu"))]
        backend, sentences = checked_backend(choice, 16, options, [layer_of(spec)], caches)
        trusted = backend._trust_asm_lengths  # type: ignore[attr-defined]
    assert trusted == (said == "right")
    assert [f"is {said} here for lengths 241…255" in sentence for sentence in sentences] == [True] * bool(said)


# --- the engine ------------------------------------------------------------------------------------------------------


def test_the_engine_refuses_a_path_that_fails_unless_told_not_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "write", lambda *_: None)
    options = {"device": "cpu", "attention_backend": "TORCH_ATTN", "max_model_len": 300, "progress": False}
    with pytest.raises(UserError, match=r"The self-check failed: TORCH_ATTN over the .* KV layout, layer 0, extend"):
        LLM(**options)
    assert "self-check: left out" in LLM(**options, self_check=False).info.attention
