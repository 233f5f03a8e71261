"""Builds a model for one rank or several: decides how many, starts the others, and brings them together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from miniserve import __version__
from miniserve.attention.platform import detect_platform
from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, Runner, UserError
from miniserve.models.config import load_model_config
from miniserve.models.registry import check_ranks, described_model, least_ranks, weight_bytes
from miniserve.parallel.child import describe_exit
from miniserve.parallel.distributed import DistributedGroup, find_store, open_store, own_address
from miniserve.runner import memory
from miniserve.runner.build import build_runner
from miniserve.runner.device import find_device, find_dtype, rank_device
from miniserve.runner.ranked import Hello, Loading, Progress, RankedRunner, Ranks, RankStart, start_rank

_BUILDER = "miniserve.runner.ranks:build_rank"
_PLANS = "plans"  # key of the port at which rank 0 waits for ranks of other hosts
_POLL = 0.1
_MEETING = 60.0  # seconds


def build_ranks(
    config: EngineConfig, source_path: Path, model_name: str, progress: Progress | None = None
) -> tuple[Runner, EngineInfo]:
    """As `build_runner`, over as many ranks as the settings or the GPUs' memory say; this process is the first of them.
    Raises `RankFailed` where another one ends before all are ready."""
    if config.data_parallel_size > 1 and (device := rank_device(config, 0)).type == "cuda":
        torch.cuda.set_device(device)  # what follows is about this engine's share of the GPUs
    size = _find_size(config, source_path)
    if config.node_rank:
        raise UserError(f"--node-rank {config.node_rank} only works for host 0; start it there by `miniserve serve`.")
    if size == 1:
        return build_runner(config, source_path, model_name, progress)
    config = replace(config, tensor_parallel_size=size)
    here = config.ranks_here
    address, port = config.master if config.nnodes > 1 else ("127.0.0.1", 0)
    ranks = Ranks()
    with ranks.guard():
        try:
            store = open_store(address, port)
        except OSError as error:
            raise UserError(
                f"--master-addr {address} --master-port {port} cannot be listened at ({error.strerror}); give an "
                "address of this host and a free port."
            ) from error
        with socket.create_server((address, 0)) as listener:
            store.set(_PLANS, f"{listener.getsockname()[1]}")
            ranks.start(_starts(config, source_path, range(1, here), (address, store.port)))
            ranks.meet(listener, Hello(0, __version__, config), size - here)
        group = DistributedGroup(store, 0, size, rank_device(config, 0), address, ranks.check)
        loading = Loading(ranks, progress or (lambda what, done, total: None))
        runner, info = build_runner(config, source_path, model_name, loading, group)
        loading.end()
    return RankedRunner(runner, ranks), info


def build_rank(start: RankStart, progress: Progress) -> Runner:
    """Another rank than the first, in its own process."""
    config = start.config
    device = rank_device(config, start.rank)
    store = find_store(*start.meeting, _MEETING)
    size = config.tensor_parallel_size or 1
    group = DistributedGroup(store, start.rank, size, device, own_address(*start.meeting))
    return build_runner(config, Path(start.source_path), start.source_path, progress, group)[0]


def run_node(config: EngineConfig, source_path: Path, report: Callable[[str], None]) -> int:
    """The part of a host that is not the first: run its ranks until host 0 ends. Returns the exit code; `report` is
    told, in sentences, what goes on."""
    size = _find_size(config, source_path)
    here = config.ranks_here
    address, port = config.master
    report(f"Waiting for host 0 at {address}:{port}.")
    while not _answers(address, port):  # the store's own attempts to connect fill the log
        time.sleep(_POLL)
    store = find_store(address, port, _MEETING)
    plans = (address, int(store.get(_PLANS)))
    first = config.node_rank * here
    starts = _starts(config, source_path, range(first, first + here), (address, port), plans)
    started = {start.rank: start_rank(start) for start in starts}
    report(f"Running rank {', '.join(map(str, started))} of {size}, until host 0 ends.")
    try:
        while all(process.poll() is None for _, process in started.values()):
            time.sleep(_POLL)
        for rank, (_, process) in started.items():
            if code := process.wait(_MEETING):
                report(f"{describe_exit(code, f'rank {rank}')}: the model is gone")
                return 1
        return 0
    finally:
        for _, process in started.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=_MEETING).close()
    except OSError:
        return False
    return True


def _starts(
    config: EngineConfig,
    source_path: Path,
    numbers: Iterable[int],
    meeting: tuple[str, int],
    plans: tuple[str, int] | None = None,
) -> list[RankStart]:
    return [
        RankStart(
            config=config,
            source_path=str(source_path),
            rank=rank,
            builder=_BUILDER,
            parent_pid=os.getpid(),
            meeting=meeting,
            plans=plans,
        )
        for rank in numbers
    ]


def _find_size(config: EngineConfig, source_path: Path) -> int:
    """How many ranks share the model. Raises `UserError` where there are too few GPUs, or nothing to share."""
    size = config.tensor_parallel_size
    device = find_device(config.device)
    count = torch.cuda.device_count() // config.data_parallel_size if device.type == "cuda" else None
    if count == 0:
        raise UserError(
            f"--data-parallel-size {config.data_parallel_size} needs as many GPUs and this host has "
            f"{torch.cuda.device_count()}; lower it."
        )
    if size is None:
        size = 1 if count is None else _least_size(config, source_path, device, count)
    if count is not None and size // config.nnodes > count:
        raise UserError(
            f"--tensor-parallel-size {size} needs {size // config.nnodes} GPUs on each host and this one has "
            f"{count}{_for_each(config)}."
        )
    if size > 1 or config.enable_expert_parallel:
        model = load_model_config(source_path, weights=config.load_format != "dummy")
        check_ranks(model, size, expert_parallel=config.enable_expert_parallel)
    return size


def _least_size(config: EngineConfig, source_path: Path, device: torch.device, count: int) -> int:
    """The fewest GPUs that the weights fit, with room for the cache. Raises `UserError` where there are not so many."""
    model = load_model_config(source_path, weights=config.load_format != "dummy")
    dtype = find_dtype(config.dtype, model.dtype)
    room = memory.available_bytes(device, config.gpu_memory_utilization)  # of one, for all of its kind
    platform = detect_platform(device, dtype)
    size = least_ranks(model, dtype, platform, room, expert_parallel=config.enable_expert_parallel)
    if size is None:
        return 1  # whose refusal says what is missing
    if size <= count:
        return size
    whole = weight_bytes(described_model(model, dtype, platform), device)
    raise UserError(
        f"The model's weights need {memory.size(whole)}: they fit {size} GPUs with {memory.size(room)} available on "
        f"each, and this machine has {count}{_for_each(config)}. Choose a smaller model or a smaller --dtype, or "
        f"spread it over hosts with --tensor-parallel-size {size} and --nnodes."
    )


def _for_each(config: EngineConfig) -> str:
    engines = config.data_parallel_size
    return f" for each of {engines} engines (--data-parallel-size)" if engines > 1 else ""
