"""The selector: what it chooses, what it rejects and says, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from miniserve.attention.contracts import KernelContract, Platform
from miniserve.attention.select import select
from miniserve.attention.spec import AttentionSpec
from miniserve.core import UserError

BF16 = torch.bfloat16
SPEC = AttentionSpec(16, 8, 128, 128**-0.5, BF16, BF16)
CPU, CUDA = Platform("cpu"), Platform("cuda")


def test_the_cpu_kernels_come_first_with_the_linear_layout() -> None:
    choice = select([SPEC], CPU, block_size=16)
    assert (choice.backend, choice.layout, choice.rejected) == ("CPU_ATTN", "linear", ())
    assert choice.explain() == [
        "CPU_ATTN over the linear KV layout: the first of CPU_ATTN > TORCH_ATTN that serves all layers, "
        "in the first layout of linear > shuffled that fits"
    ]


def test_a_platform_may_read_another_layout_faster() -> None:
    fast = Platform("cpu", None, "shuffled")
    choice = select([SPEC], fast, block_size=16)
    assert (choice.backend, choice.layout) == ("CPU_ATTN", "shuffled")
    assert "shuffled > linear" in choice.explain()[0]
    choice = select([SPEC], fast, block_size=12)  # which shuffled cannot have
    assert (choice.backend, choice.layout) == ("CPU_ATTN", "linear")
    assert "multiple of 8" in choice.rejected[0][2]


def test_what_was_asked_for_is_the_reason() -> None:
    choice = select([SPEC], CPU, block_size=16, backend="TORCH_ATTN", layout="shuffled")
    assert choice.explain() == ["TORCH_ATTN over the shuffled KV layout: asked for, the layout asked for"]


def test_without_a_compiler_pytorch_serves_and_says_why() -> None:
    choice = select([SPEC], Platform("cpu", "no C++ compiler was found"), block_size=16)
    assert choice.backend == "TORCH_ATTN"
    assert ("CPU_ATTN", "linear", "no C++ compiler was found") in choice.rejected
    assert "not CPU_ATTN (linear): no C++ compiler was found" in choice.explain()


def test_on_a_gpu_the_cpu_path_is_rejected_by_its_device() -> None:
    choice = select([SPEC], CUDA, block_size=16)
    assert choice.backend == "TORCH_ATTN"
    assert any("not on cuda" in reason for _, _, reason in choice.rejected)


def test_an_explicit_choice_that_cannot_be_honoured_lists_every_reason() -> None:
    with pytest.raises(UserError) as error:
        select([SPEC], Platform("cuda", "no compiler"), block_size=12, backend="CPU_ATTN", layout="shuffled")
    message = str(error.value)
    assert "--attention-backend CPU_ATTN --kv-layout shuffled" in message
    for reason in ("not on cuda", "no compiler", "multiple of 8"):
        assert reason in message


@pytest.mark.parametrize("field", ["backend", "layout"])
def test_unknown_names_are_refused_with_the_known_ones(field: str) -> None:
    with pytest.raises(UserError, match="choose one of auto"):
        select([SPEC], CPU, block_size=16, **{field: "NONSENSE"})  # type: ignore[arg-type]


def test_a_path_must_serve_every_layer() -> None:
    narrow = KernelContract("NARROW", (), ("linear",), (BF16,), head_dims=(128,), sliding_window=False, sinks=False)
    wide = KernelContract("WIDE", (), ("linear",), (BF16,))
    windowed = AttentionSpec(16, 8, 128, 1.0, BF16, BF16, sliding_window=64)
    sunk = AttentionSpec(16, 8, 64, 1.0, BF16, BF16, sinks=True, softcap=3.0)
    assert select([SPEC], CPU, block_size=16, contracts=(narrow, wide)).backend == "NARROW"
    choice = select([SPEC, windowed, sunk], CPU, block_size=16, contracts=(narrow, wide))
    assert choice.backend == "WIDE"
    reasons = [reason for _, _, reason in choice.rejected]
    assert reasons == ["it has no sliding window", "it does not take head_dim 64", "it has no sinks"]


def test_nothing_serves_is_an_error_not_a_fallback() -> None:
    only = KernelContract("ONLY", (), ("linear",), (torch.float32,), block_sizes=(32,), softcap=False)
    with pytest.raises(UserError) as error:
        select([SPEC], CPU, block_size=16, contracts=(only,))
    assert "it does not compute in bfloat16" in str(error.value)
    assert "it does not take block size 16" in str(error.value)
