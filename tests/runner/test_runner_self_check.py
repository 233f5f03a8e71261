"""The self-check passes what is right, refuses what is wrong, and leaves the pool as it found it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_reference import Layer
from emulation import emulated_platform
from engine_support import stand_in
from latent_steps import LatentTestLayer

import miniserve
from miniserve.attention import aiter as adapter
from miniserve.attention.backends.torch_attn import TorchBackend
from miniserve.attention.layouts import LAYOUTS, KVCache, LinearLayout
from miniserve.attention.metadata import StepBatch
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.core import Chunk, SamplingParams, StepPlan, UserError
from miniserve.llm import LLM
from miniserve.models.config import load_model_config
from miniserve.models.decoder import CausalLM
from miniserve.models.layers.contracts import AITER_BLOCKSCALE, TRITON_ROUTER
from miniserve.models.layers.norm import Normed
from miniserve.models.layers.ops import Ops
from miniserve.models.layers.routing import Chosen, Router
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, describe_products
from miniserve.runner import self_check
from miniserve.runner.check_problem import STALE_NAN, Problem
from miniserve.runner.check_products import product_failure
from miniserve.runner.self_check import Checked, CheckResult, check_backend
from miniserve.runner.served import block_zeroer
from miniserve.runner.state import StepState
from tools.quantise import KINDS, quantise

SPEC = AttentionSpec(4, 2, 32, 32**-0.5, torch.bfloat16, torch.bfloat16)
LATENT = AttentionSpec(4, 1, 80, 0.2, torch.bfloat16, torch.bfloat16, latent=LatentDims(64, 16, 24, 20))
DEEPSEEK = str(Path(miniserve.__file__).parent / "assets" / "tiny-deepseek")
QWEN3 = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"
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


@dataclasses.dataclass
class Case:
    """A choice over zeroed pools: what `check_backend` takes."""

    specs: list[AttentionSpec]
    name: str
    layout: str
    platform: Any = NAMED_PLATFORMS["cpu"]
    num_blocks: int = 200
    max_rows: int = 16
    max_seq_len: int = 512

    def __post_init__(self) -> None:
        self.choice = select(self.specs, self.platform, block_size=16, backend=self.name, layout=self.layout)
        self.options = self.choice.options(torch.device("cpu"), self.max_rows, self.max_seq_len)
        layout = self.choice.kv_layout
        self.caches = [layout.allocate(spec, self.num_blocks, torch.device("cpu")) for spec in self.specs]
        self.layers = [layer_of(spec, index) for index, spec in enumerate(self.specs)]

    def check(self) -> Checked:
        return check_backend(self.choice, self.options, self.layers, self.caches)


def check(
    specs: list[AttentionSpec], name: str, layout: str, platform: Any = NAMED_PLATFORMS["cpu"], **sizes: Any
) -> list[CheckResult]:
    """The results, of a pool that is found zeroed."""
    case = Case(specs, name, layout, platform, **sizes)
    found = case.check()
    for cache in case.caches:
        assert not cache.key.view(torch.uint8).any() and not cache.value.contiguous().view(torch.uint8).any()
    assert not found.needs_zeros
    return found.results


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
        platform = emulated_platform()
        spec = dataclasses.replace(SPEC, head_dim=128, scale=128**-0.5)
        for each in (spec, with_kv(spec, platform.fp8_dtype)):
            found = Case([each], name, layout, platform).check()
            assert found.failure is None
            assert found.needs_zeros == (name in ("ROCM_ATTN", "ROCM_AITER_FA"))  # by their HIP kernels
            cases = {result.case for result in found.results}
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
    "241 only": "1[23].* off in a row of 241 tokens",
    "one block table": "decode",
    "raises": r"decode: RuntimeError: cannot get heuristic kernel! ?\(?",
}


@pytest.mark.parametrize("fault", [*FAULTS, "none"])
def test_a_wrong_backend_is_named_with_its_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_check, "build_backend", lambda *_: Broken(fault))
    spec = with_kv(SPEC, torch.float8_e4m3fn) if "scales" in fault else SPEC
    failure = Case([spec], "TORCH_ATTN", "linear").check().failure
    if fault == "none":
        assert failure is None
    else:
        assert failure is not None and "\n" not in failure
        assert re.match(rf"TORCH_ATTN over the linear KV layout, layer 0, .*({FAULTS[fault]})", failure), failure


# --- kernels that multiply in fp8 ------------------------------------------------------------------------------------


def without_fault(kernel: Callable[..., Any], given: dict[str, Any]) -> None:
    kernel(**given)


def tile_twice(kernel: Callable[..., Any], given: dict[str, Any]) -> None:
    """As the ASM kernel: the first tile of 256 keys once whole, with what lies beyond the length, and once masked."""
    lens, whole = given["context_lens"], given["out"].clone()
    kernel(**given)
    twice = (lens > 240) & (lens < 256)
    kernel(**given | {"out": whole, "context_lens": torch.where(twice, 256, lens)})
    given["out"][twice] = (given["out"][twice] + whole[twice]) / 2


def another_block(kernel: Callable[..., Any], given: dict[str, Any]) -> None:
    tables = given["block_tables"].clone()
    tables[:, 3] = tables[:, 2]
    kernel(**given | {"block_tables": tables})


def without_a_scale(kernel: Callable[..., Any], given: dict[str, Any]) -> None:
    kernel(**given | {"k_scale": torch.ones(1)})


def a_key_less(kernel: Callable[..., Any], given: dict[str, Any]) -> None:
    kernel(**given | {"context_lens": (given["context_lens"] - 1).clamp(min=1)})


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize(
    ("name", "layout", "kernel"),
    [
        ("ROCM_ATTN", "shuffled", "paged_attention_rocm"),
        ("ROCM_AITER_FA", "linear", "paged_attention_v1"),
        ("ROCM_AITER_FA", "shuffled", "paged_attention_rocm"),
    ],
)
@pytest.mark.parametrize("fault", [without_fault, tile_twice, another_block, without_a_scale, a_key_less])
def test_faults_show_beside_what_fp8_loses(
    arch: str, name: str, layout: str, kernel: str, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stand_in(arch, CU_NUM):
        real, platform = adapter.load(), emulated_platform()
        spec = dataclasses.replace(SPEC, head_dim=128, scale=128**-0.5, kv_dtype=platform.fp8_dtype)
        case = Case([spec], name, layout, platform, max_rows=8)
        names = [*inspect.signature(getattr(real, kernel)).parameters]

        def wrong(*given: Any, **more: Any) -> None:
            fault(getattr(real, kernel), dict(zip(names, given, strict=False)) | more)

        changed = dataclasses.replace(real, **{kernel: wrong})
        monkeypatch.setattr("miniserve.attention.aiter.load", lambda: changed)
        found = case.check()
    assert (found.failure is None) == (fault is without_fault)
    assert found.failure is None or "decode" in found.failure


@pytest.mark.parametrize(("arch", "low", "high"), [("gfx942", 0.05, 0.08), ("gfx950", 0.09, 0.15)])
def test_fp8_products_lose_more_than_other_roundings(arch: str, low: float, high: float) -> None:
    """As was seen where the kernels ran: 6 % by gfx942's format, 10 % by gfx950's."""
    fp8 = NAMED_PLATFORMS["mi300x" if arch == "gfx942" else "mi355x"].fp8_dtype
    spec = dataclasses.replace(SPEC, head_dim=128, scale=128**-0.5, kv_dtype=fp8)
    layout = LAYOUTS["shuffled"](16)
    cache = layout.allocate(spec, 200, torch.device("cpu"))
    rows = Problem(layout, layer_of(spec), cache, 512, STALE_NAN, True).rows
    lost = [self_check.distance(row.in_fp8, row.want[-1:]) for row in rows if row.in_fp8 is not None]
    assert low < max(lost) < high


# --- NaN in slots that a row does not use ----------------------------------------------------------------------------


def test_a_kernel_that_multiplies_nan_by_0_is_served_zeroed_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them one broken request's values would spoil those that get its blocks."""
    prompts = ["1 + 1 =", "A much longer prompt, of more than one block of tokens: 2 + 2 ="]
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    texts = {}
    with stand_in("gfx942", 0):
        for way, self_check_too in (("clean", True), ("zeroed", True), ("not zeroed", False)):
            engine = LLM(device="cpu", max_model_len=128, max_num_seqs=2, progress=False, self_check=self_check_too)
            zeroes = "self-check: passed; a kernel spreads NaN from unused slots, so blocks are zeroed before use"
            assert (zeroes in engine.info.attention) == self_check_too
            if way != "clean":
                for cache in engine._loop._runner._served.caches:
                    cache.key.fill_(math.nan), cache.value.fill_(math.nan)
            texts[way] = [each.outputs[0].text for each in engine.generate(prompts, params, progress=False)]
    assert texts["zeroed"] == texts["clean"] != texts["not zeroed"]


@pytest.mark.parametrize("layout", ["linear", "shuffled", "latent"])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_blocks_are_zeroed_before_their_first_token(layout: str, kv_dtype: torch.dtype) -> None:
    spec = with_kv(LATENT if layout == "latent" else SPEC, kv_dtype)
    caches = [LAYOUTS[layout](16).allocate(spec, 6, torch.device("cpu")) for _ in range(2)]
    for cache in caches:
        cache.key.view(torch.uint8).fill_(127), cache.value.copy_(cache.value)
        if layout != "latent":
            cache.value.view(torch.uint8).fill_(127)
    block_zeroer(caches, 16)(torch.tensor([5, 16, 17, -1, 63, 80]))  # of blocks 0, 1, 1, none, 3, 5
    for cache in caches:
        for plane in (cache.key, cache.value):
            zeroed = [not block.contiguous().view(torch.uint8).any() for block in plane]
            assert zeroed == [False, True, False, False, False, True]


# --- the ASM kernel's feared lengths ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile_bug", "max_rows", "said"), [(True, 16, "wrong"), (False, 16, "right"), (True, 8, None)])
def test_the_asm_kernel_is_trusted_with_the_feared_lengths_where_it_is_right(
    tile_bug: bool, max_rows: int, said: str | None
) -> None:
    with stand_in("gfx942", CU_NUM) as module, module._standin.emulate(arch="gfx942", cu_num=CU_NUM, tile_bug=tile_bug):
        platform = emulated_platform()
        spec = dataclasses.replace(SPEC, head_dim=128, scale=128**-0.5)
        found = Case([spec], "ROCM_AITER_FA", "shuffled", platform, max_rows=max_rows).check()
    assert found.backend._trust_asm_lengths == (said == "right")  # type: ignore[attr-defined]
    assert found.asm_lengths == {"right": True, "wrong": False, None: None}[said]
    assert any(f"is {said} here for lengths 241…255" in sentence for sentence in found.sentences()) == bool(said)


# --- the engine ------------------------------------------------------------------------------------------------------


def test_a_path_that_fails_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in("gfx942", 0):
        broken = dataclasses.replace(adapter.load(), paged_attention_rocm=lambda out, *_: out.zero_())
        monkeypatch.setattr("miniserve.attention.aiter.load", lambda: broken)
        options = {"device": "cpu", "max_model_len": 300, "max_num_seqs": 8, "progress": False}
        engine = LLM(**options)
        assert engine.info.attention[0].startswith("ROCM_AITER_FA over the linear KV layout: the first of ROCM_ATTN >")
        refused = (
            "not ROCM_ATTN (shuffled): the self-check failed: ROCM_ATTN over the shuffled KV layout, layer 0, decode"
        )
        assert any(sentence.startswith(refused) for sentence in engine.info.attention)
        assert engine.info.kv_layout == "linear"
        with pytest.raises(
            UserError, match=r"with --attention-backend ROCM_ATTN: ROCM_ATTN \(shuffled\): the self-check"
        ):
            LLM(**options, attention_backend="ROCM_ATTN")
        # An order that was measured is kept to: the next of it comes next.
        monkeypatch.setattr("miniserve.runner.build.load_preferred", lambda *_: ("ROCM_ATTN", "ROCM_AITER_GLUON"))
        assert LLM(**options).info.attention[0].startswith("ROCM_AITER_GLUON over the shuffled KV layout: measured")


def test_the_engine_refuses_a_path_that_fails_unless_told_not_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchBackend, "write", lambda *_: None)
    options = {"device": "cpu", "attention_backend": "TORCH_ATTN", "max_model_len": 300, "progress": False}
    with pytest.raises(UserError, match=r"TORCH_ATTN \(shuffled\): the self-check failed: .* layer 0, extend") as error:
        LLM(**options)
    assert "--no-self-check would serve wrong answers" in str(error.value)
    assert "self-check: left out" in LLM(**options, self_check=False).info.attention


@pytest.mark.parametrize(("arch", "kv_cache_dtype", "bounded"), [("gfx942", "auto", True), ("gfx950", "auto", False)])
def test_the_engine_keeps_its_pool_to_what_the_kernel_reaches(
    arch: str, kv_cache_dtype: str, bounded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miniserve.attention.backends.build.NARROW_PLANE", 20 * 16 * 576 * 2)
    with stand_in(arch, 4):
        options = {"device": "cpu", "kv_cache_dtype": kv_cache_dtype, "max_num_seqs": 4, "progress": False}
        info = LLM(DEEPSEEK, **options).info
        assert (info.num_blocks == 20) == bounded == (info.max_model_len == 320)
        told = "KV cache: no more than 320 tokens, as mla_decode_fwd reaches"
        assert any(sentence.startswith(told) for sentence in info.attention) == bounded
        if bounded:
            with pytest.raises(
                UserError, match="--max-model-len 400 is more than this attention path reaches, 320 tokens"
            ):
                LLM(DEEPSEEK, **options, max_model_len=400)


# --- experts ---------------------------------------------------------------------------------------------------------


def sparse_model(aiter: Any, **options: Any) -> CausalLM:
    """The built-in model with experts, on the meta device, for the stand-in's GPU."""
    config = load_model_config(Path(DEEPSEEK))
    built = BuildOptions(
        torch.bfloat16, torch.bfloat16, torch.device("cpu"), aiter=aiter, platform=emulated_platform(), **options
    )
    return build_model(config, built)


def test_kernels_that_fail_at_the_models_shapes_are_found() -> None:
    def refuses(*given: Any, **more: Any) -> torch.Tensor:
        raise RuntimeError("no tuned kernel\nand more")

    def wrong(x: torch.Tensor, *_: Any, **more: Any) -> torch.Tensor:
        return torch.zeros_like(x)

    def wrong_for_many(x: torch.Tensor, *more: Any, **others: Any) -> torch.Tensor:
        return real(x, *more, **others) * (1.05 if len(x) > 16 else 1.0)

    with stand_in("gfx942", 4):
        aiter = adapter.load_products()
        real = aiter.fused_moe
        for kernel, failure in (
            (real, None),
            (refuses, "RuntimeError: no tuned kernel"),
            (wrong, "for 1 tokens it is 100.00% off (2% allowed)"),
            (wrong_for_many, "for 40 tokens it is "),
        ):
            found = product_failure(sparse_model(dataclasses.replace(aiter, fused_moe=kernel)), 40)
            if failure is None:
                assert found is None
            else:
                assert found is not None and found[0] == "aiter fused_moe" and found[1].startswith(failure)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_kernels_of_8_bits_are_tried_too(arch: str, tmp_path: Path) -> None:
    """Within what rounding to 8 bits costs; a wrong scale is not."""
    quantise(KINDS["fp8-block"], QWEN3, tmp_path)
    config = load_model_config(tmp_path)
    with stand_in(arch, 4):
        aiter, platform = adapter.load_products(), emulated_platform()
        real = aiter.gemm_a8w8_blockscale
        for factor, failure in ((1.0, None), (1.1, "for 128 tokens it is ")):

            def scaled(*given: Any, factor: float = factor, **more: Any) -> torch.Tensor:
                result: torch.Tensor = real(*given, **more) * factor
                return result

            changed = dataclasses.replace(aiter, gemm_a8w8_blockscale=scaled)
            options = BuildOptions(
                torch.bfloat16, torch.bfloat16, torch.device("cpu"), aiter=changed, platform=platform
            )
            found = product_failure(build_model(config, options), 128)
            if failure is None:
                assert found is None
            else:
                assert found is not None and found[0] == AITER_BLOCKSCALE and found[1].startswith(failure)


class _Choosing(Ops):
    """Routes as PyTorch does, but where it is told to be wrong."""

    def __init__(self, spoil: Callable[[Chosen], Chosen]) -> None:
        self._spoil = spoil

    def choose_experts(self, router: Router, x: Normed) -> Chosen:
        weights, ids = super().choose_experts(router, x)
        return self._spoil((weights, ids)) if len(ids) > 16 else (weights, ids)


def test_a_wrong_choice_of_experts_is_found() -> None:
    def last(chosen: Chosen, expert: int) -> Chosen:
        weights, ids = (each.clone() for each in chosen)
        ids[-1, 0] = expert
        return weights, ids

    cases: list[tuple[Callable[[Chosen], Chosen], str | None]] = [
        (lambda chosen: chosen, None),
        (lambda chosen: last(chosen, int(chosen[1][-1, 1])), "for 40 tokens it chooses wrongly for 1"),
        (lambda chosen: last(chosen, 1 << 20), "for 40 tokens it chooses wrongly for 1"),
        (lambda chosen: (chosen[0] * 1.01, chosen[1]), "for 40 tokens it chooses wrongly for 40"),
        (lambda chosen: (chosen[0] * torch.nan, chosen[1]), "for 40 tokens it chooses wrongly for 40"),
        (lambda chosen: chosen[3], "IndexError"),
    ]
    config = load_model_config(Path(DEEPSEEK))
    options = BuildOptions(torch.float32, torch.float32, torch.device("cpu"))
    built = build_model(config, options)
    router = next(layer for layer in built.modules() if isinstance(layer, Router))
    for spoil, failure in cases:
        router.ops = _Choosing(spoil)
        found = product_failure(built, 40)
        if failure is None:
            assert found is None
        else:
            assert found is not None and found[0] == TRITON_ROUTER and found[1].startswith(failure)
    failed = build_model(config, dataclasses.replace(options, failed={TRITON_ROUTER: "wrong"}))
    assert describe_products(failed)[-1] == f"choice of experts by PyTorch; not by {TRITON_ROUTER}: wrong"
    assert all(type(layer.ops) is Ops for layer in failed.modules() if isinstance(layer, Router))


def test_the_engine_says_why_aiters_experts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = iter([("aiter fused_moe", "for 1 tokens it is 9.00% off (2% allowed)"), None])
    monkeypatch.setattr("miniserve.runner.build.product_failure", lambda *_: next(failures))
    with stand_in("gfx942", 4):
        info = LLM(DEEPSEEK, device="cpu", max_model_len=64, max_num_seqs=2, progress=False).info
    told = "; not by aiter fused_moe: the self-check failed: for 1 tokens it is 9.00% off (2% allowed)"
    assert any(line.startswith("experts by ") and line.endswith(told) for line in info.attention)


# --- block tables and padding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_model_len", "width"), [(32768, 2049), (32767, 2048), (32753, 2048), (32752, 2048)])
def test_block_tables_have_a_column_for_the_token_after_the_last(max_model_len: int, width: int) -> None:
    """Which kernels may look up: one of aiter's MLA did at 32,768 tokens."""
    state = StepState(2, max_model_len, 16, torch.device("cpu"))
    assert state.tables.shape == (2, width)
    plan = StepPlan([], [], [(0, 0, [1, 2])], [], [Chunk(0, 0, list(range(31)), True)])
    state.prepare(plan, torch.zeros(2, dtype=torch.int64))
    batch = state.prepare(StepPlan([], [], [], [0], []), torch.zeros(2, dtype=torch.int64)).batch
    assert batch.decode is not None
    assert (batch.decode.max_seq_len, batch.decode.block_tables.tolist()) == (32, [[1, 2, 0]])
