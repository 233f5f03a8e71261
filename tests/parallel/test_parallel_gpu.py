"""Ranks that share one GPU: kernels that wait for each other, as threads with a stream each and as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from one_gpu import rows_by_gather
from test_parallel_build import ASSETS, answers
from thread_ranks import ThreadGroup, make_inboxes, run_ranks
from torch import Tensor

from miniserve.kernels.triton.pdl import launch_options
from miniserve.parallel.distributed import DistributedGroup, open_store
from miniserve.parallel.group import Alone
from miniserve.runner import chunk_graph
from miniserve.runner.chunk_graph import ChunkGraphs
from miniserve.runner.decode_graph import DecodeGraphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
LIMIT = 2_000_000  # reads, which take a second or two: a test that hangs would hang the GPU
REPLAY_SECONDS = 5.0
EPS = 1e-6


def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def no_early_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels start when those before them have ended. Else, while a rank waits, its next kernels would come to wait on
    the GPU too, as many as it holds, and leave no room for the rank that it waits for."""
    options = launch_options(cuda())
    for name in options:
        monkeypatch.setitem(options, name, False)


class Chain:
    """One rank's sums, each of other data and another size, recorded one behind the other; and what they should give.
    mismatches: replays that ended with another bit."""

    def __init__(self, rank: int, inboxes: list[Any], most_rows: int, length: int) -> None:
        random = torch.Generator(cuda()).manual_seed(0)  # the same data on each rank, of which each sends its own
        make = partial(torch.randn, generator=random, device=cuda())
        self._box, self.stream = inboxes[rank], torch.cuda.Stream()
        self._weight = make(4096).bfloat16()
        self._sums: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []
        self.mismatches = torch.zeros((), dtype=torch.int64, device=cuda())
        for index in range(length):
            rows, k = 1 + index * 7 % most_rows, index % 3 + 1
            parts = make(len(inboxes), rows * k, 4096)
            more = make(len(inboxes), rows, 4096).bfloat16() if index % 2 else None
            if k == 1:
                parts = parts.bfloat16()
            residual, total = make(rows, 4096).bfloat16(), torch.zeros(rows, 4096, device=cuda())
            for source in range(len(inboxes)):
                own = torch.zeros_like(total)
                for part in parts[source].float().view(rows, k, -1).unbind(1):
                    own += part
                total += (own if more is None else own + more[source]).bfloat16().float()
            want = residual + total.bfloat16()
            self._sums.append((parts[rank].contiguous(), None if more is None else more[rank], residual, want))
        self.graph = torch.cuda.CUDAGraph()

    def run(self) -> None:
        streams = [residual.clone() for _, _, residual, _ in self._sums]
        for (parts, more, _, _), stream in zip(self._sums, streams, strict=True):
            self._box.reduce_norm(parts, more, stream, self._weight, EPS)
        found = self._box.gather(torch.stack([stream.view(torch.int16)[0] for stream in streams]))
        wrong = (found != found[0]).any()
        for (*_, want), stream in zip(self._sums, streams, strict=True):
            wrong = wrong | (stream.view(torch.int16) != want.view(torch.int16)).any()
        self.mismatches += wrong

    def record(self) -> None:
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.run()


@pytest.mark.usefixtures("no_early_start")
@pytest.mark.parametrize(("size", "most_rows"), [(2, 64), (4, 16)])
def test_replays_on_streams_give_the_sum_in_rank_order_each_time(size: int, most_rows: int) -> None:
    """No more ranks and rows than a GPU holds the programs of all at once."""
    memory, inboxes = make_inboxes(size, cuda(), LIMIT)
    chains = [Chain(rank, inboxes, most_rows, 25) for rank in range(size)]
    torch.cuda.synchronize()
    # No kernel may be compiled or loaded while another waits: the first run gives up at once, and counts for nothing.
    hasty = make_inboxes(size, cuda(), 1)
    for chain in chains:
        chain._box, box = hasty[1][0], chain._box
        with torch.cuda.stream(chain.stream):
            chain.run()
        torch.cuda.synchronize()
        chain.mismatches.zero_()
        chain._box = box
    for chain in chains:
        chain.record()
    torch.cuda.synchronize()
    begin, replays = time.monotonic(), 0
    while time.monotonic() - begin < REPLAY_SECONDS and replays < 40_000:
        for _ in range(50):
            for chain in chains:
                with torch.cuda.stream(chain.stream):
                    chain.graph.replay()
            replays += 1
        torch.cuda.synchronize()
    print(f"{size} ranks: {replays * 25} sums and {replays} gathers in {time.monotonic() - begin:.1f} s")
    assert [each.state.tolist()[3] for each in inboxes] == [0] * size, "a rank gave up"
    assert [int(chain.mismatches) for chain in chains] == [0] * size
    assert len(memory) == size


class DeviceGroup(ThreadGroup):
    """All tensors pass through inboxes, whose kernels can be recorded."""

    def reduce(self, x: Tensor) -> Tensor:
        raise AssertionError("this does not fit an inbox")

    def gather(self, x: Tensor) -> Tensor:
        assert self.inboxes.take_gather(x)
        return self.inboxes.gather(x)

    rows = rows_by_gather


class UnmetInboxes:
    """Launches what `Inboxes` does, of ranks that never come, and gives something harmless instead of the result."""

    def __init__(self, inboxes: Any) -> None:
        self.take, self.take_gather, self._inboxes = inboxes.take, inboxes.take_gather, inboxes

    def reduce_norm(self, parts: Tensor, shared: Tensor | None, residual: Tensor, *more: Any) -> Tensor:
        self._inboxes.reduce_norm(parts, shared, residual.clone(), *more)
        return torch.zeros_like(residual)

    def gather(self, x: Tensor) -> Tensor:
        self._inboxes.gather(x)
        return torch.stack([x] * self._inboxes.size)


class Unmet(DeviceGroup):
    """A rank whose peers never come, and which does not wait for them."""

    def __init__(self, inboxes: Any) -> None:
        self.rank, self.size, self.inboxes = inboxes.rank, inboxes.size, UnmetInboxes(inboxes)

    def exchange(self, message: bytes) -> list[bytes]:
        return [message] * self.size


@pytest.mark.usefixtures("no_early_start")
@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-deepseek"])
def test_threads_with_graphs_give_the_tokens_of_one_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want, _ = answers(name, False, Alone(), "cuda")
    hasty_memory, hasty = make_inboxes(2, cuda(), 1)
    for each in hasty:  # compiles and loads all kernels, see above
        answers(name, False, Unmet(each), "cuda")
    torch.cuda.synchronize()
    memory, inboxes = make_inboxes(2, cuda(), LIMIT)
    torch.cuda.synchronize()
    recorded: list[int] = []

    def one_at_a_time(group: Any, record: Callable[[], Any]) -> Any:
        """Nothing else may happen on the device."""
        for turn in range(group.size):
            group._meeting.barrier.wait()
            if turn == group.rank:
                found = record()
                recorded.append(turn)
        group._meeting.barrier.wait()
        return found

    decode, chunk, run_chunks = DecodeGraphs._record, chunk_graph._record, ChunkGraphs.run
    replayed: list[bool] = []

    def record_chunks(work: Any, pool: Any) -> Any:
        return one_at_a_time(work.func.__self__._served.model.options.group, partial(chunk, work, pool))

    def counted(graphs: ChunkGraphs, inputs: Any) -> Tensor | None:
        hidden = run_chunks(graphs, inputs)
        replayed.append(hidden is not None)
        return hidden

    def record_decode(graphs: DecodeGraphs, *arguments: Any) -> Any:
        return one_at_a_time(graphs._group, partial(decode, graphs, *arguments))

    monkeypatch.setattr(DecodeGraphs, "_record", record_decode)
    monkeypatch.setattr(chunk_graph, "_record", record_chunks)
    monkeypatch.setattr(ChunkGraphs, "run", counted)

    def found(plain: ThreadGroup) -> list[list[int]]:
        group = DeviceGroup(plain.rank, plain._meeting)
        group.inboxes = inboxes[plain.rank]
        with torch.cuda.stream(torch.cuda.Stream()):
            return answers(name, False, group, "cuda")[0]

    assert run_ranks(2, found) == [want] * 2
    assert [each.state.tolist()[3] for each in inboxes] == [0, 0], "a rank gave up"
    assert recorded.count(0) == recorded.count(1) > 0
    assert any(replayed) == (name == "tiny-qwen3")  # models with experts have none for chunks
    assert len(memory) == len(hasty_memory) == 2


def start_processes(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parent / "one_gpu.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script), str(ASSETS / "tiny-qwen3"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)


def test_processes_with_decode_graphs_give_the_tokens_of_one_rank(tmp_path: Path) -> None:
    from one_gpu import PARAMS, tokens

    together = start_processes()
    assert together.returncode == 0, together.stderr[-4000:]
    assert "cannot write" not in together.stderr
    found = json.loads(together.stdout.splitlines()[-1])
    assert found == tokens(str(ASSETS / "tiny-qwen3"), 1, PARAMS)


def test_a_rank_that_dies_ends_the_one_whose_kernel_waits_for_it() -> None:
    begin = time.monotonic()
    ended = start_processes("3")
    print(f"ended after {time.monotonic() - begin:.1f} s")
    assert ended.returncode not in (0, -9) and "rank 1 was killed by SIGKILL" in ended.stderr, ended.stderr[-4000:]


def test_the_library_works_in_graphs() -> None:
    """NCCL refuses ranks that share a GPU: one rank shows that its calls can be recorded, not what they bring."""
    group = DistributedGroup(open_store("127.0.0.1", 0), 0, 1, cuda(), "127.0.0.1")
    assert group.inboxes is not None
    words, large = torch.randn(6, 33, device=cuda()), torch.randn(600, 4096, device=cuda())
    group.inboxes = None

    def calls() -> list[Tensor]:
        return [group.gather(words)[0], group.rows(words, 33), group.reduce(words), group.reduce(large)]

    calls()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = calls()
    words.normal_()
    large.normal_()
    graph.replay()
    for got, want in zip(found, [words, words, words, large], strict=True):
        assert torch.equal(got, want)
