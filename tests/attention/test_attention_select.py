"""The selector: what it chooses, what it rejects and says, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from miniserve.attention.platform import NAMED_PLATFORMS, Platform
from miniserve.attention.select import Choice, select
from miniserve.attention.spec import AttentionSpec, LatentDims
from miniserve.attention.terms import BackendContract, KernelContract, Sizes
from miniserve.core import UserError

BF16 = torch.bfloat16
SPEC = AttentionSpec(16, 8, 128, 128**-0.5, BF16, BF16)
CPU, H100, MI300X, MI355X = (NAMED_PLATFORMS[name] for name in ("cpu", "h100", "mi300x", "mi355x"))
ROCM_ORDER = "ROCM_ATTN > ROCM_AITER_FA > ROCM_AITER_UNIFIED_ATTN > ROCM_AITER_GLUON > TRITON_ATTN > TORCH_ATTN"


def contract(name: str, **terms: object) -> BackendContract:
    kernel = KernelContract(name=name, layouts=("linear",), dtypes=(BF16,), **terms)  # type: ignore[arg-type]
    return BackendContract(name=name, implementation="", layouts=("linear",), decode=(kernel,), chunks=(kernel,))


def reasons(choice: Choice, backend: str, layout: str = "") -> list[str]:
    return [reason for name, plan, reason in choice.rejected if (name, plan) == (backend, layout)]


def test_the_cpu_kernels_come_first_with_the_linear_layout() -> None:
    choice = select([SPEC], CPU, block_size=16)
    assert (choice.backend, choice.layout) == ("CPU_ATTN", "linear")
    assert choice.explain()[0] == (
        "CPU_ATTN over the linear KV layout: the first of CPU_ATTN > TORCH_ATTN that serves all layers, "
        "in the first layout of linear > shuffled that fits"
    )
    rocm = "ROCM_ATTN, ROCM_AITER_FA, ROCM_AITER_UNIFIED_ATTN, ROCM_AITER_GLUON"
    assert f"not {rocm}: it runs on gfx942 or gfx950, not on cpu" in choice.explain()


def test_a_platform_may_read_another_layout_faster() -> None:
    fast = replace(CPU, fastest_layout="shuffled")
    choice = select([SPEC], fast, block_size=16)
    assert (choice.backend, choice.layout) == ("CPU_ATTN", "shuffled")
    assert "shuffled > linear" in choice.explain()[0]
    choice = select([SPEC], fast, block_size=12)  # which shuffled cannot have
    assert (choice.backend, choice.layout) == ("CPU_ATTN", "linear")
    assert "multiple of 8" in reasons(choice, "CPU_ATTN", "shuffled")[0]


def test_what_was_asked_for_is_the_reason() -> None:
    choice = select([SPEC], CPU, block_size=16, backend="TORCH_ATTN", layout="shuffled")
    assert choice.explain() == ["TORCH_ATTN over the shuffled KV layout: asked for, the layout asked for"]


def test_without_a_compiler_pytorch_serves_and_says_why() -> None:
    choice = select([SPEC], replace(CPU, native_unavailable="no C++ compiler was found"), block_size=16)
    assert choice.backend == "TORCH_ATTN"
    assert "not CPU_ATTN: no C++ compiler was found" in choice.explain()


def test_the_order_on_rocm_and_what_each_step_down_says() -> None:
    for platform in (MI300X, MI355X):
        choice = select([SPEC], platform, block_size=16)
        assert (choice.backend, choice.layout, choice.rejected) == ("ROCM_ATTN", "shuffled", ())
        assert ROCM_ORDER in choice.reason
        # Linear leaves ROCM_ATTN out, which reads shuffled alone.
        choice = select([SPEC], platform, block_size=16, layout="linear")
        assert choice.backend == "ROCM_AITER_FA"
        assert reasons(choice, "ROCM_ATTN", "linear") == ["it does not read the linear layout"]
        assert choice.routes[0].decode == "paged_attention_v1"
    no_aiter = Platform("gfx942", 304, None, "aiter is not installed")
    choice = select([SPEC], no_aiter, block_size=16)
    assert (choice.backend, choice.layout) == ("TRITON_ATTN", "linear")
    assert choice.explain()[1:] == [
        "not ROCM_ATTN, ROCM_AITER_FA, ROCM_AITER_UNIFIED_ATTN, ROCM_AITER_GLUON: aiter is not installed",
    ]


def test_triton_serves_cuda_and_pytorch_where_there_is_no_triton() -> None:
    assert select([SPEC], H100, block_size=16).backend == "TRITON_ATTN"
    choice = select([SPEC], replace(H100, triton_unavailable="Triton is not installed"), block_size=16)
    assert choice.backend == "TORCH_ATTN"
    assert "not TRITON_ATTN: Triton is not installed" in choice.explain()
    old = select([SPEC], Platform("sm_75", 40), block_size=16)
    assert old.backend == "TORCH_ATTN"
    assert reasons(old, "TRITON_ATTN") == ["it runs on sm_80+ or gfx*, not on sm_75"]


def test_a_gpu_that_aiter_does_not_know_gets_triton() -> None:
    for arch in ("gfx90a", "gfx1100", "gfx1201"):
        choice = select([SPEC], Platform(arch, 104, (0, 1, 20)), block_size=16)
        assert choice.backend == "TRITON_ATTN"
        assert reasons(choice, "ROCM_ATTN") == [f"it runs on gfx942 or gfx950, not on {arch}"]


def test_an_explicit_choice_that_cannot_be_honoured_lists_every_reason() -> None:
    spec = AttentionSpec(64, 2, 80, 1.0, BF16, BF16, sliding_window=128, sinks=True)
    with pytest.raises(UserError) as error:
        select([spec], MI300X, block_size=16, backend="ROCM_ATTN", layout="shuffled")
    message = str(error.value)
    assert "--attention-backend ROCM_ATTN --kv-layout shuffled" in message
    for reason in (
        "paged_attention_rocm does not take head_dim 80",
        "paged_attention_rocm takes at most 16 query heads per KV head, not 32",
        "paged_attention_rocm has no sliding window",
        "paged_attention_rocm has no sinks",
    ):
        assert reason in message


@pytest.mark.parametrize("field", ["backend", "layout"])
def test_unknown_names_are_refused_with_the_known_ones(field: str) -> None:
    with pytest.raises(UserError, match="choose one of auto"):
        select([SPEC], CPU, block_size=16, **{field: "NONSENSE"})  # type: ignore[arg-type]


def test_a_path_must_serve_every_layer() -> None:
    narrow = contract("NARROW", head_dim=Sizes(only=(128,)), min_window=None, sinks=False)
    windowed = replace(SPEC, sliding_window=64)
    sunk = AttentionSpec(16, 8, 64, 1.0, BF16, BF16, sinks=True, softcap=3.0)
    table = (narrow, contract("WIDE"))
    assert select([SPEC], CPU, block_size=16, contracts=table).backend == "NARROW"
    choice = select([SPEC, windowed, sunk], CPU, block_size=16, contracts=table)
    assert choice.backend == "WIDE"
    assert reasons(choice, "NARROW", "linear") == [
        "it has no sliding window",
        "it does not take head_dim 64",
        "it has no sinks",
    ]


def test_nothing_serves_is_an_error_not_a_fallback() -> None:
    only = contract("ONLY", block_size=Sizes(only=(32,)), softcap=False)
    with pytest.raises(UserError) as error:
        select([replace(SPEC, dtype=torch.float32)], CPU, block_size=16, contracts=(only,))
    assert "it does not compute in float32" in str(error.value)
    assert "it does not take block size 16" in str(error.value)


def test_a_measurement_comes_before_the_order_of_the_table() -> None:
    choice = select([SPEC], MI300X, block_size=16, preferred=["ROCM_AITER_FA:shuffled", "ROCM_ATTN"])
    assert (choice.backend, choice.layout) == ("ROCM_AITER_FA", "shuffled")
    assert choice.reason == "measured fastest by `miniserve tune`"
    # One that cannot be had here is told and passed over; what was asked for comes before what was measured.
    windowed = replace(SPEC, sliding_window=100)
    choice = select([windowed], MI300X, block_size=16, preferred=["ROCM_AITER_FA:shuffled"])
    assert (choice.backend, choice.layout) == ("ROCM_AITER_FA", "linear")
    assert reasons(choice, "ROCM_AITER_FA", "shuffled").count("paged_attention_common has no sliding window") == 1
    choice = select([SPEC], MI300X, block_size=16, backend="TRITON_ATTN", preferred=["ROCM_AITER_FA"])
    assert choice.backend == "TRITON_ATTN"
    assert "asked for" in choice.reason


def test_each_layer_gets_its_own_route() -> None:
    """Layers with a window beside layers without: only those are rerouted."""
    windowed = replace(SPEC, sliding_window=128)
    choice = select([windowed, SPEC], MI300X, block_size=16, backend="ROCM_AITER_FA", layout="shuffled")
    assert [route.decode for route in choice.routes] == ["unified_attention", "paged_attention_common"]
    assert {route.chunks for route in choice.routes} == {"flash_attn_varlen_func"}
    choice = select([windowed, SPEC], MI300X, block_size=16)
    assert [route.decode for route in choice.routes] == ["triton paged_decode", "paged_attention_rocm"]


def test_a_layout_of_another_kind_of_attention_is_refused_in_a_sentence() -> None:
    latent = AttentionSpec(16, 1, 576, 192**-0.5, BF16, BF16, latent=LatentDims(512, 64, 128, 128))
    for platform in (CPU, MI300X, H100):
        assert select([latent], platform, block_size=16, layout="latent").layout == "latent"
        for layout in ("linear", "shuffled"):
            with pytest.raises(UserError, match=rf"^--kv-layout {layout} holds .* MLA model .*; use latent or auto\.$"):
                select([latent], platform, block_size=16, layout=layout)
        with pytest.raises(UserError, match=r"^--kv-layout latent holds .*; use linear, shuffled or auto\.$"):
            select([SPEC], platform, block_size=16, layout="latent")


def test_latent_layers_are_kept_from_attention_by_heads() -> None:
    latent = AttentionSpec(16, 1, 576, 192**-0.5, BF16, BF16, latent=LatentDims(512, 64, 128, 128))
    with pytest.raises(UserError, match="it has no latent"):
        select([latent], H100, block_size=16, backend="TRITON_ATTN")


def test_fp8_is_the_format_of_the_gpu() -> None:
    right = replace(SPEC, kv_dtype=torch.float8_e4m3fnuz)
    assert MI300X.fp8_dtype == torch.float8_e4m3fnuz
    assert {platform.fp8_dtype for platform in (MI355X, H100, CPU)} == {torch.float8_e4m3fn}
    assert select([right], MI300X, block_size=16).backend == "ROCM_ATTN"
    older = replace(SPEC, kv_dtype=torch.float8_e4m3fn)
    assert select([older], H100, block_size=16).backend == "TRITON_ATTN"
    choice = select([older], NAMED_PLATFORMS["a100"], block_size=16)
    assert choice.backend == "TORCH_ATTN"
    assert reasons(choice, "TRITON_ATTN", "linear") == [
        "it reads an fp8 KV cache on sm_89+ or gfx942 or gfx950 or gfx12*, not on sm_80"
    ]
    with pytest.raises(UserError, match="fp8 on gfx950 is float8_e4m3fn, not float8_e4m3fnuz"):
        select([right], MI355X, block_size=16)
    choice = select([replace(SPEC, kv_dtype=torch.float8_e4m3fn)], CPU, block_size=16)
    assert choice.backend == "TORCH_ATTN"
    assert reasons(choice, "CPU_ATTN", "linear") == ["it does not read an fp8 KV cache"]
