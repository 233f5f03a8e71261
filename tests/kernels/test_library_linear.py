"""Linear layers by the vendor's library: which algorithm is taken, and that on a GPU each gives the product."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from miniserve.kernels import library_linear
from miniserve.kernels.library_linear import LibraryLinear

ROWS, OUTPUTS, INPUTS = 4, 2048, 4096


class Measured:
    """What timing finds, PyTorch's way first; which of the library's algorithms then multiplied; by what it is off."""

    def __init__(self) -> None:
        self.times: list[float] = [1.0]
        self.calls: list[int] = []
        self.error = 0.0


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Measured:
    found = Measured()

    class Product:
        def __init__(self, library: object, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
            self.algorithms = [*range(len(found.times) - 1)]

        def run(self, algorithm: int, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            found.calls.append(algorithm)
            return functional.linear(x, weight) * (1.0 + found.error)

    monkeypatch.setattr(library_linear, "_ALIGNMENT", 64)  # as PyTorch allocates on a CPU
    monkeypatch.setattr(library_linear, "_Product", Product)
    monkeypatch.setattr(library_linear, "_seconds", lambda ways, x, weight: found.times)
    return found


def linear_with_library() -> LibraryLinear:
    linear = LibraryLinear(torch.device("cpu"))
    linear._library = SimpleNamespace()  # type: ignore[assignment]
    return linear


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(ROWS, INPUTS, dtype=dtype), torch.ones(OUTPUTS, INPUTS, dtype=dtype)


@pytest.mark.parametrize(
    ("times", "taken"),
    [([1.0, 1.1, 0.8, 0.9], [1]), ([1.0, 0.95], [0]), ([1.0, 0.97, 1.2], []), ([1.0], [])],
    ids=["the fastest", "a clear gain", "nearly as fast", "no algorithm"],
)
def test_the_fastest_algorithm_is_taken_where_it_is_clearly_faster(
    measured: Measured, times: list[float], taken: list[int]
) -> None:
    measured.times = times
    linear, (x, weight) = linear_with_library(), operands()
    with linear.tuning():
        linear(x, weight, None)
    measured.calls.clear()
    assert torch.equal(linear(x, weight, None), functional.linear(x, weight))
    assert measured.calls == taken


def test_an_algorithm_that_multiplies_wrongly_is_left_out(measured: Measured, caplog: pytest.LogCaptureFixture) -> None:
    measured.times, measured.error = [1.0, 0.5], 0.1
    linear, (x, weight) = linear_with_library(), operands()
    with linear.tuning():
        linear(x, weight, None)
    assert torch.equal(linear(x, weight, None), functional.linear(x, weight))
    assert "4 x 2048 x 4096 differs from PyTorch's: it is not used" in caplog.text


def test_a_library_that_fails_leaves_the_size_as_it_is(
    measured: Measured, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> list[float]:
        raise RuntimeError("cublasLtMatmul failed with status 15")

    measured.times = [1.0, 0.5]
    monkeypatch.setattr(library_linear, "_seconds", fail)
    linear, (x, weight) = linear_with_library(), operands()
    with linear.tuning():
        assert torch.equal(linear(x, weight, None), functional.linear(x, weight))
    assert torch.equal(linear(x, weight, None), functional.linear(x, weight)) and not measured.calls
    assert "4 x 2048 x 4096 were not compared: cublasLtMatmul failed" in caplog.text


def test_only_what_was_met_while_tuning_changes(measured: Measured) -> None:
    measured.times = [1.0, 0.5]
    linear, (x, weight) = linear_with_library(), operands()
    linear(x, weight, None)
    assert not measured.calls
    with linear.tuning():
        linear(x, weight, None)
    measured.calls.clear()
    linear(x, weight, None)
    assert measured.calls == [0]
    linear(x, weight, torch.ones(OUTPUTS, dtype=x.dtype))
    linear(x[:2], weight, None)
    linear(torch.ones(ROWS * INPUTS + 1, dtype=x.dtype)[1:].view(ROWS, INPUTS), weight, None)
    linear(torch.ones(ROWS, 2 * INPUTS, dtype=x.dtype)[:, ::2], weight, None)
    assert measured.calls == [0], "with a bias, for other rows, or where a matrix is not as the library expects"


def test_small_weights_and_other_dtypes_are_not_timed(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_linear, "_seconds", lambda *_: pytest.fail("timed"))
    linear, (x, weight) = linear_with_library(), operands(torch.float32)
    with linear.tuning():
        assert torch.equal(linear(x, weight, None), functional.linear(x, weight))
        x, weight = operands()
        assert torch.equal(linear(x, weight[:1024], None), functional.linear(x, weight[:1024]))


def test_without_the_library_tuning_changes_nothing(measured: Measured) -> None:
    measured.times = [1.0, 0.5]
    linear, (x, weight) = LibraryLinear(torch.device("cpu")), operands()
    with contextlib.suppress(ZeroDivisionError), linear.tuning():
        raise ZeroDivisionError
    with linear.tuning():
        assert torch.equal(linear(x, weight, None), functional.linear(x, weight))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "n", "k"), [(96, 4096, 12288), (200, 2048, 4096), (256, 6144, 4096)])
def test_every_algorithm_gives_the_product(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    linear = LibraryLinear(device)
    assert linear._library is not None
    x, weight = torch.randn(rows, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype) / 64
    wanted = functional.linear(x.float(), weight.float())
    product = library_linear._Product(linear._library, rows, n, k, dtype)
    assert product.algorithms
    for algorithm in product.algorithms:
        assert (product.run(algorithm, x, weight) - wanted).abs().max() < 1e-2 * wanted.abs().max()
    with linear.tuning():
        linear(x, weight, None)
    assert [*linear._chosen] == [(rows, k, n, dtype)]
    graph, y = torch.cuda.CUDAGraph(), linear(x, weight, None)
    with torch.cuda.graph(graph):
        y = linear(x, weight, None)
    x.neg_()
    graph.replay()
    assert (y + wanted).abs().max() < 1e-2 * wanted.abs().max()
