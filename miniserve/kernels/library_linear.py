"""Linear layers by the vendor's library. Sizes that graphs run are timed when they are first used.

For a size cuBLASLt proposes several algorithms, the one that it expects to be fastest first; often another one is
faster (by up to 27 % on an H100, at 96 to 320 rows). PyTorch takes the first and has no way to choose, so the library
is called here directly: https://docs.nvidia.com/cuda/cublas/#using-the-cublaslt-api.
"""

from __future__ import annotations

import ctypes
import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

_logger = logging.getLogger(__name__)

_CANDIDATES, _ROUNDS = 8, 7
_LEAST_VALUES = 1 << 23  # of a weight: a smaller one is read in too short a time to compare
_GAIN = 0.96  # of PyTorch's time; with a smaller gain another start might choose otherwise
_TOLERANCE = 0.02  # of the largest value; 16 bits summed in another order differ by less than half of it
_TRANSPOSED, _FLOAT32, _COMPUTE_FLOAT32 = 1, 0, 68
_DTYPES = {torch.float16: 2, torch.bfloat16: 14}
_DESC_TRANSA, _PREFERENCE_WORKSPACE, _ALIGNMENT = 3, 1, 256


class _Heuristic(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class _Library:
    """The functions that are needed, and a handle. Raises OSError if this PyTorch does not include the library."""

    def __init__(self) -> None:
        version = (torch.version.cuda or "none").split(".")[0]
        self._functions = ctypes.CDLL(f"libcublasLt.so.{version}")
        self._functions.cublasLtMatmul.argtypes = [ctypes.c_void_p] * 14 + [ctypes.c_size_t, ctypes.c_void_p]
        self.handle = self.created("Create")

    def call(self, name: str, *arguments: object) -> None:
        """Raises RuntimeError if the library reports a failure."""
        if status := getattr(self._functions, f"cublasLt{name}")(*arguments):
            raise RuntimeError(f"cublasLt{name} failed with status {status}")

    def created(self, name: str, *arguments: object) -> ctypes.c_void_p:
        made = ctypes.c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return made


class _Product:
    """y = x Wᵀ for x [rows, k] and W [n, k], contiguous and of one dtype, by each of the library's `algorithms` that
    need no workspace. The library is column-major, so it computes yᵀ = W xᵀ."""

    def __init__(self, library: _Library, rows: int, n: int, k: int, dtype: torch.dtype) -> None:
        self._library, self._one, self._zero = library, ctypes.c_float(1.0), ctypes.c_float(0.0)
        kind = _DTYPES[dtype]
        self._how = library.created("MatmulDescCreate", _COMPUTE_FLOAT32, _FLOAT32)
        transposed = ctypes.c_int(_TRANSPOSED)
        library.call("MatmulDescSetAttribute", self._how, _DESC_TRANSA, ctypes.byref(transposed), ctypes.c_size_t(4))
        self._w, self._x, self._y = (
            library.created(
                "MatrixLayoutCreate", kind, ctypes.c_uint64(high), ctypes.c_uint64(wide), ctypes.c_int64(high)
            )
            for high, wide in ((k, n), (k, rows), (n, rows))
        )
        preference = library.created("MatmulPreferenceCreate")
        none, found = ctypes.c_uint64(0), ctypes.c_int()
        library.call(
            "MatmulPreferenceSetAttribute", preference, _PREFERENCE_WORKSPACE, ctypes.byref(none), ctypes.c_size_t(8)
        )
        results = (_Heuristic * _CANDIDATES)()
        library.call(
            "MatmulAlgoGetHeuristic", library.handle, self._how, self._w, self._x, self._y, self._y, preference,
            _CANDIDATES, results, ctypes.byref(found),
        )  # fmt: skip
        library.call("MatmulPreferenceDestroy", preference)
        self.algorithms: Sequence[_Heuristic] = results[: found.value]

    def run(self, algorithm: _Heuristic, x: Tensor, weight: Tensor) -> Tensor:
        y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
        self._library.call(
            "Matmul", self._library.handle, self._how, ctypes.addressof(self._one), weight.data_ptr(), self._w,
            x.data_ptr(), self._x, ctypes.addressof(self._zero), y.data_ptr(), self._y, y.data_ptr(), self._y,
            ctypes.addressof(algorithm.algo), None, 0, torch.cuda.current_stream(x.device).cuda_stream,
        )  # fmt: skip
        return y


class LibraryLinear:
    """`functional.linear`, or for sizes first used within `tuning` a faster algorithm of the same library, if there is
    one."""

    def __init__(self, device: torch.device) -> None:
        self._library: _Library | None = None
        self._tuning = False
        self._chosen: dict[tuple[object, ...], Callable[[Tensor, Tensor], Tensor] | None] = {}
        if device.type != "cuda" or torch.version.cuda is None:
            return
        try:
            self._library = _Library()
        except (OSError, RuntimeError, AttributeError) as error:
            _logger.warning("cuBLASLt cannot be called, so its algorithms are not compared: %r", error)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [rows, k], weight [n, k], bias [n] -> [rows, n]."""
        size = (*x.shape, len(weight), x.dtype)
        if self._tuning and bias is None and size not in self._chosen:
            self._chosen[size] = self._fastest(x, weight)
        chosen = self._chosen.get(size) if bias is None else None
        if chosen is None or not (_is_plain(x) and _is_plain(weight)):
            return functional.linear(x, weight, bias)
        return chosen(x, weight)

    @contextmanager
    def tuning(self) -> Iterator[None]:
        """Within this block sizes are timed when first used, which takes some milliseconds and waits for the device: do
        not use it while a graph is captured."""
        self._tuning = self._library is not None
        try:
            yield
        finally:
            self._tuning = False

    def _fastest(self, x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        """The fastest algorithm; None if PyTorch's is as fast, or nearly."""
        if self._library is None or x.dtype not in _DTYPES or weight.numel() < _LEAST_VALUES:
            return None
        if not (_is_plain(x) and _is_plain(weight)):
            return None
        size = len(x), len(weight), x.shape[1]
        x = torch.randn_like(x)  # padding rows may be zeros, for which the comparison would prove nothing
        try:
            product = _Product(self._library, *size, x.dtype)
            ways = [partial(product.run, algorithm) for algorithm in product.algorithms]
            first, *times = _seconds([functional.linear, *ways], x, weight)
        except RuntimeError as error:
            _logger.warning("The algorithms for a linear layer of %d x %d x %d were not compared: %s", *size, error)
            return None
        best = min(range(len(ways)), key=times.__getitem__, default=None)
        if best is None or times[best] > _GAIN * first:
            return None
        wanted = functional.linear(x, weight)
        if (ways[best](x, weight) - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
            return ways[best]
        _logger.warning("cuBLASLt's fastest algorithm for %d x %d x %d differs from PyTorch's: it is not used", *size)
        return None


def _is_plain(x: Tensor) -> bool:
    """Whether x is laid out as the library assumes by default."""
    return x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0


def _seconds(ways: Sequence[Callable[[Tensor, Tensor], Tensor]], x: Tensor, weight: Tensor) -> list[float]:
    """The median time of each way, run in turn, with the weight not in the device's cache, as in a step."""
    cache = torch.cuda.get_device_properties(x.device).L2_cache_size
    other = torch.empty(2 * cache, dtype=torch.uint8, device=x.device)
    events = []
    for _ in range(_ROUNDS):
        for way in ways:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            other.zero_()  # also gives the host time to launch the timed kernels
            start.record()
            way(x, weight)
            end.record()
            events.append((start, end))
    torch.cuda.synchronize(x.device)
    times = [start.elapsed_time(end) / 1e3 for start, end in events]
    return [statistics.median(times[index :: len(ways)]) for index in range(len(ways))]
