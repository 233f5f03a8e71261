"""The residual stream: what is added to it, and norms that are taken when they are read."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from miniserve.models.layers.norm import Residual, RMSNorm
from miniserve.models.layers.ops import Ops, rms_norm
from miniserve.parallel.group import Alone

WEIGHT = torch.tensor([1.0, 2.0, -1.0])
STREAM, PART = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.5, -4.0, 1.0]])


def layer_norm(ranks: int = 1) -> RMSNorm:
    norm = RMSNorm(3, 1e-6, torch.float32, Ops(), Alone(0, ranks))
    norm.replace("weight", WEIGHT)
    return norm


def test_a_norm_adds_the_part_once_when_it_is_read() -> None:
    norm, x = layer_norm(), Residual(STREAM) + PART
    with mock.patch.object(norm.ops, "add_rms_norm", wraps=norm.ops.add_rms_norm) as added:
        normed = norm(x)
        assert not added.called
        assert torch.equal(normed.read(), rms_norm(STREAM + PART, WEIGHT, 1e-6))
        assert normed.read() is normed.read()
    assert added.call_count == 1
    assert torch.equal(x.stream, STREAM + PART)
    assert x.part is None


def test_a_kernel_that_goes_on_from_the_norm_gets_the_part_and_the_stream() -> None:
    norm, x = layer_norm(), Residual(STREAM) + PART
    normed = norm(x)
    total = STREAM + PART
    assert normed.read_with(lambda *given: (given[0] * 0, given[0] + given[1], "next")) == "next"
    assert torch.equal(normed.read(), PART * 0)
    assert torch.equal(x.stream, total)
    assert normed.read_with(lambda *given: pytest.fail("the norm is known")) is None


@pytest.mark.parametrize(("ranks", "part"), [(2, PART), (1, None)], ids=["a part of a sum over ranks", "nothing"])
def test_a_kernel_is_not_asked_for_what_it_cannot_add(ranks: int, part: torch.Tensor | None) -> None:
    normed = layer_norm(ranks)(Residual(STREAM, part))
    assert normed.read_with(lambda *given: pytest.fail("not for it")) is None


def test_a_second_part_without_a_norm_between_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="without a norm between them"):
        Residual(STREAM) + PART + PART


def test_tokens_are_chosen_of_what_a_norm_has_summed() -> None:
    stream, part, last = torch.cat([STREAM, 2 * STREAM]), torch.cat([PART, PART]), torch.tensor([1])
    x = Residual(stream.clone()) + part
    with pytest.raises(RuntimeError, match="without a norm before that"):
        x.reading(last)
    layer_norm()(x).read()
    assert torch.equal(x.reading(last).stream, (stream + part)[last])
    assert x.reading(None) is x
