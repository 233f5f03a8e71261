"""How many ranks a model gets: what the settings and the GPUs' memory say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import miniserve
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.llm import LLM
from miniserve.models.config import load_model_config
from miniserve.models.registry import described_model, weight_bytes
from miniserve.runner import memory, ranks
from miniserve.runner.device import rank_device

ASSETS = Path(miniserve.__file__).parent / "assets"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be a positive number"),
        ({"tensor_parallel_size": 5000}, "--tensor-parallel-size must be at most 1024"),
        ({"nnodes": 0}, "--nnodes must be a positive number"),
        ({"node_rank": 1}, "--node-rank is for a model on several hosts"),
        ({"master_addr": "h"}, "--master-addr is for a model on several hosts"),
        ({"master_port": 1}, "--master-port is for a model on several hosts"),
        ({"nnodes": 2}, "a --tensor-parallel-size that is a multiple of it"),
        ({"nnodes": 2, "tensor_parallel_size": 3, "master_addr": "h"}, "a multiple of it"),
        ({"nnodes": 2, "tensor_parallel_size": 4}, "--nnodes needs --master-addr"),
        ({"nnodes": 2, "tensor_parallel_size": 4, "master_addr": "h", "node_rank": 2}, "between 0 and 1"),
        ({"nnodes": 2, "tensor_parallel_size": 4, "master_addr": "h", "node_rank": -1}, "between 0 and 1"),
        ({"nnodes": 2, "tensor_parallel_size": 4, "master_addr": "h", "master_port": 70_000}, "between 1 and 65535"),
        ({"data_parallel_size": 0}, "--data-parallel-size must be a positive number"),
        ({"data_parallel_size": 5000}, "--data-parallel-size must be at most 1024"),
        ({"data_parallel_rank": 1}, "is set by the server"),
        (
            {"nnodes": 2, "tensor_parallel_size": 4, "master_addr": "h", "data_parallel_size": 2},
            "--data-parallel-size is for the GPUs of one host",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig(**settings)


def test_hosts_are_told_which_setting_differs() -> None:
    shared = {"nnodes": 2, "tensor_parallel_size": 4, "master_addr": "h"}
    first, second = EngineConfig(model="/a", **shared), EngineConfig(model="/b", node_rank=1, **shared)
    assert first.differs(second) is None
    assert first.differs(EngineConfig(node_rank=1, max_num_seqs=3, **shared)) == "--max-num-seqs"
    assert (first.ranks_here, first.master) == (2, ("h", 29_500))


@pytest.mark.parametrize(
    ("room", "gpus", "expected"),
    [
        (2.0, 1, 1),
        (0.8, 2, 2),
        (0.8, 8, 2),
        (0.42, 8, 5),
        (0.42, 2, r"they fit 5 GPUs with .* available on each, and this machine has 2.*--tensor-parallel-size 5"),
        (0.01, 8, 1),  # no number of ranks is enough: building the model for one says so
    ],
)
def test_auto_takes_the_fewest_gpus_that_the_model_fits(
    room: float, gpus: int, expected: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """room: of a GPU, in models."""
    path, config, device = ASSETS / "tiny-deepseek", EngineConfig(dtype="float32"), torch.device("cuda")
    model = load_model_config(path)
    whole = weight_bytes(described_model(model, torch.float32, NAMED_PLATFORMS["h200"]), device)
    monkeypatch.setattr(ranks, "detect_platform", lambda device, dtype: NAMED_PLATFORMS["h200"])
    monkeypatch.setattr(memory, "available_bytes", lambda device, share: int(room * whole))
    monkeypatch.setattr(ranks, "find_device", lambda name: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if isinstance(expected, int):
        assert ranks._find_size(config, path) == expected
        return
    with pytest.raises(UserError, match=expected):
        ranks._find_size(config, path)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("tiny-qwen3", {"enable_expert_parallel": True}, "is for several ranks"),
        ("tiny-qwen3", {"enable_expert_parallel": True, "tensor_parallel_size": 2}, "this one has none"),
        ("tiny-qwen3", {"tensor_parallel_size": 5}, "5 is more than this model can be shared by; at most 4 can"),
    ],
)
def test_what_cannot_be_shared_is_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranks.build_ranks(EngineConfig(device="cpu", **settings), ASSETS / name, name)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "find_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="needs 2 GPUs on each host and this one has 1"):
        ranks.build_ranks(EngineConfig(tensor_parallel_size=2), ASSETS / "tiny-qwen3", "m")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--data-parallel-size 3 needs as many GPUs and this host has 2"),
        ({"data_parallel_size": 2, "tensor_parallel_size": 2}, "this one has 1 for each of 2 engines"),
    ],
)
def test_more_engines_than_gpus_are_refused(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    config = EngineConfig(**({"data_parallel_size": 3, "device": "cuda"} | settings))
    with pytest.raises(UserError, match=message):
        ranks.build_ranks(config, ASSETS / "tiny-qwen3", "m")


def test_engines_have_shares_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)

    def devices(engines: int, size: int) -> list[list[int | None]]:
        configs = [
            EngineConfig(data_parallel_size=engines, data_parallel_rank=rank, tensor_parallel_size=size)
            for rank in range(engines)
        ]
        return [[rank_device(config, rank).index for rank in range(size)] for config in configs]

    assert devices(1, 1) == [[None]]
    assert devices(1, 3) == [[0, 1, 2]]
    assert devices(2, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert devices(3, 2) == [[0, 1], [2, 3], [4, 5]]
    assert devices(8, 1) == [[number] for number in range(8)]


def test_an_llm_is_one_engine() -> None:
    with pytest.raises(UserError, match="data_parallel_size is for a server"):
        LLM(data_parallel_size=2)


def test_a_host_beyond_the_first_does_not_serve() -> None:
    config = EngineConfig(device="cpu", nnodes=2, node_rank=1, tensor_parallel_size=2, master_addr="127.0.0.1")
    with pytest.raises(UserError, match="--node-rank 1"):
        ranks.build_ranks(config, ASSETS / "tiny-qwen3", "m")
