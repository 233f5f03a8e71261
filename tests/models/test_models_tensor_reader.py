"""The reader of safetensors files: the values that safetensors reads, no more of the file than asked for, and no memory
beside its buffers."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from miniserve.core import UserError
from miniserve.models.checkpoint import find_tensors
from miniserve.models.tensor_reader import DTYPES, TensorReader

CPU = torch.device("cpu")
SLACK = 64 << 10  # bytes that may be read beside tensors


def read(reader: TensorReader, path: Path, name: str, source: tuple[slice, ...], target: torch.Tensor) -> torch.Tensor:
    (tensor,) = find_tensors([path])[name]
    with reader.opened(path):
        reader.copy(tensor, source, target)
    return target


def bytes_read() -> int:
    """By this process, from disk or from the system's cache."""
    (line,) = (line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


@st.composite
def slices(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """A tensor's shape, and a part of it: of all dimensions or of the first ones."""
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    bounds = [sorted(draw(st.tuples(st.integers(0, count), st.integers(0, count)))) for count in shape]
    parts = [
        slice(0, count) if draw(st.booleans()) else slice(*each) for count, each in zip(shape, bounds, strict=True)
    ]
    return tuple(shape), tuple(parts[: draw(st.integers(0, len(parts)))])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    part=slices(),
    stored=st.sampled_from(list(DTYPES.values())),
    target=st.sampled_from([torch.float32, torch.bfloat16, None]),
    buffer_bytes=st.sampled_from([4, 12, 64, 1 << 12]),
    padding=st.integers(0, 9),
)
def test_parts_are_those_that_safetensors_reads(
    part: tuple[tuple[int, ...], tuple[slice, ...]],
    stored: torch.dtype,
    target: torch.dtype | None,
    buffer_bytes: int,
    padding: int,
    tmp_path: Path,
) -> None:
    """Whatever the buffer, a row or a tensor being larger than it or not; the tensors begin at any byte."""
    shape, source = part
    codes = torch.arange(math.prod(shape) * stored.itemsize) * 37 % 120  # bytes that make no NaN in any dtype
    tensor = codes.to(torch.uint8).view(stored).reshape(shape)
    file = tmp_path / "model.safetensors"
    save_file({"wanted": tensor, "another": tensor.clone()}, file)
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    file.write_bytes(
        (size + padding).to_bytes(8, "little") + content[8 : 8 + size] + b" " * padding + content[8 + size :]
    )
    with safe_open(str(file), framework="pt") as tensors:
        expected = tensors.get_tensor("wanted")[source].to(target or stored)
    found = torch.zeros(expected.shape, dtype=expected.dtype)
    read(TensorReader(CPU, buffer_bytes), file, "wanted", source, found)
    assert torch.equal(found.float(), expected.float())


@pytest.mark.parametrize("shape", [(1024, 2048), (16, 64, 2048)], ids=["rows", "experts"])
def test_rows_and_experts_are_read_by_one_rank_alone(shape: tuple[int, ...], tmp_path: Path) -> None:
    """An eighth of the rows reads an eighth of the tensor, and the ranks together read it once."""
    file, whole = tmp_path / "model.safetensors", torch.randn(shape)
    save_file({"before": torch.ones(3), "wanted": whole}, file)
    reader, counts = TensorReader(CPU), []
    for rank in range(8):
        rows = slice(rank * shape[0] // 8, (rank + 1) * shape[0] // 8)
        start = bytes_read()
        found = read(reader, file, "wanted", (rows,), torch.empty(whole[rows].shape))
        counts.append(bytes_read() - start)
        assert torch.equal(found, whole[rows])
    assert max(counts) < whole.nbytes / 8 + SLACK
    assert whole.nbytes <= sum(counts) < whole.nbytes + 8 * SLACK


def test_the_rows_of_each_expert_are_read_alone_and_columns_by_whole_rows(tmp_path: Path) -> None:
    file, whole = tmp_path / "model.safetensors", torch.randn(8, 512, 256)
    save_file({"wanted": whole}, file)
    experts, some = slice(2, 6), slice(64, 128)
    for source, share in (((experts, some), 1 / 16), ((experts, slice(0, 512), some), 1 / 2)):
        start = bytes_read()
        found = read(TensorReader(CPU), file, "wanted", source, torch.empty(whole[source].shape))
        assert whole.nbytes * share <= bytes_read() - start < whole.nbytes * share + SLACK
        assert torch.equal(found, whole[source])


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"wanted": torch.ones(100, 10)}, file)
    (tensor,) = find_tensors([file])["wanted"]
    reader, target = TensorReader(CPU, 256), torch.zeros(100, 10)
    with reader.opened(file):
        reader.copy(tensor, (slice(0, 10),), target[:10])
        os.truncate(file, tensor.begin + 2001)
        reader.copy(tensor, (slice(40, 50),), target[40:50])
        with pytest.raises(UserError, match=f"{file} ends at byte {tensor.begin + 2001}, .*; download it again"):
            reader.copy(tensor, (), target)
    with pytest.raises(UserError, match=r"is not a readable safetensors file .*; download it again"):
        find_tensors([file])
    file.unlink()
    with (
        pytest.raises(UserError, match=r"is not a readable safetensors file .*; download it again"),
        reader.opened(file),
    ):
        pass


class LateTarget:
    """A GPU's tensor, the copies to which are carried out when their events are waited for: as late as can be."""

    def __init__(self, target: torch.Tensor, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._target, self._copies = target, copies

    def __getitem__(self, rows: slice) -> LateTarget:
        return LateTarget(self._target[rows], self._copies)

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self._copies.append((self._target, source))


def test_a_gpus_buffers_are_not_filled_before_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are two: one is filled while the copy of the other is under way."""
    copies: list[tuple[torch.Tensor, torch.Tensor]] = []
    waiting = []

    class Event:
        def __init__(self) -> None:
            self.target, self.source = copies[-1]

        def synchronize(self) -> None:
            waiting.append(len(copies))
            self.target.copy_(self.source)
            del copies[0]

    empty = torch.empty

    def unpinned(count: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        return empty(count, dtype=dtype)

    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=Event))
    file, whole = tmp_path / "model.safetensors", torch.randn(100, 16)
    save_file({"wanted": whole}, file)
    found = torch.zeros(100, 16)
    reader = TensorReader(torch.device("cuda"), 640)
    read(reader, file, "wanted", (slice(0, 100),), cast(torch.Tensor, LateTarget(found, copies)))
    assert waiting == [2] * 8, "ten fillings of two buffers"
    for target, source in copies:
        target.copy_(source)
    assert torch.equal(found, whole)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("columns", [slice(0, 1024), slice(128, 256)], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gpu_gets_the_same_values(columns: slice, dtype: torch.dtype, tmp_path: Path) -> None:
    file, whole = tmp_path / "model.safetensors", torch.randn(16384, 1024).bfloat16()
    save_file({"wanted": whole}, file)
    source = (slice(100, 16000), columns)
    target = torch.zeros(whole[source].shape, dtype=dtype, device="cuda")
    read(TensorReader(target.device, 1 << 20), file, "wanted", source, target)
    assert torch.equal(target.cpu(), whole[source].to(dtype))


MEASURE = """
import resource, sys
from pathlib import Path
import torch
from miniserve.models.checkpoint import find_tensors
from miniserve.models.tensor_reader import TensorReader
torch.set_num_threads(1)
path, rows = Path(sys.argv[1]), slice(*map(int, sys.argv[2:4]))
columns = slice(*map(int, sys.argv[4:6]))
tensor = find_tensors([path])["wanted"][0]
target = torch.ones(rows.stop - rows.start, columns.stop - columns.start, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = TensorReader(torch.device("cpu"))
with reader.opened(path):
    reader.copy(tensor, (rows, columns), target)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("columns", [(0, 4096), (512, 1024)], ids=["rows", "columns"])
def test_reading_takes_no_memory_beside_the_buffer(columns: tuple[int, int], tmp_path: Path) -> None:
    """Peak resident memory, of a file that is one tensor."""
    file, rows = tmp_path / "model.safetensors", 24 << 10
    save_file({"wanted": torch.zeros(rows, 4096, dtype=torch.bfloat16)}, file)
    assert file.stat().st_size > 200e6
    command = [sys.executable, "-c", MEASURE, str(file), "0", str(rows), *map(str, columns)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50e6
