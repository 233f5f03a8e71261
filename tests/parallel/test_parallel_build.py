"""Runners that are built as each rank builds its own: its part of the weights, the memory plan, the KV cache and the
self-check."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from thread_ranks import run_ranks

import miniserve
from miniserve.config import EngineConfig, SchedulerConfig
from miniserve.core import EngineInfo, Request, SamplingParams
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.parallel.group import Alone, Group
from miniserve.runner.build import build_runner
from miniserve.runner.memory import plan_memory
from miniserve.scheduler.scheduler import Scheduler

torch.set_num_threads(1)
ASSETS = Path(miniserve.__file__).parent / "assets"
BLOCKS = 64


def answers(name: str, expert_parallel: bool, group: Group, device: str = "cpu") -> tuple[list[list[int]], EngineInfo]:
    config = EngineConfig(
        device=device,
        dtype="float32",
        max_num_seqs=4,
        max_num_batched_tokens=32,  # so that steps have no more chunks than graphs have
        max_model_len=256,
        kv_cache_memory=16 << 20,
        enable_expert_parallel=expert_parallel,
    )
    runner, info = build_runner(config, ASSETS / name, name, None, group)
    settled = SchedulerConfig(
        num_blocks=BLOCKS,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
    )
    loop = EngineLoop(Scheduler(settled), runner, StepLog(info.traffic, info.max_num_seqs), overlap=False)
    for number, temperature in enumerate([0.0, 0.8, 0.0]):
        params = SamplingParams(temperature=temperature, seed=number, max_tokens=16, ignore_eos=True)
        loop.add(Request(request_id=str(number), prompt_token_ids=[*range(20 + number)], params=params))
    found: list[list[int]] = [[], [], []]
    while loop.has_work:
        for output in loop.step():
            found[int(output.request_id)] += output.new_token_ids
    return found, info


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-deepseek"])
def test_built_ranks_give_the_tokens_of_one_process(name: str) -> None:
    want, alone = answers(name, False, Alone())
    for size, expert_parallel in ((2, False), (3, name == "tiny-deepseek")):
        ranks = run_ranks(size, partial(answers, name, expert_parallel))
        assert [found for found, _ in ranks] == [want] * size
        assert alone.traffic is not None
        for _, info in ranks:
            assert info.traffic is not None
            assert dict(info.memory)["weights"] < dict(alone.memory)["weights"]
            assert dict(info.memory)["activations"] < dict(alone.memory)["activations"]
            assert info.traffic.weights < alone.traffic.weights
            assert info.vocab_size == alone.vocab_size
            assert info.num_blocks >= alone.num_blocks >= BLOCKS


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rank_has_the_kv_cache_that_was_asked_for(device: str) -> None:
    config = EngineConfig(kv_cache_memory=1 << 20, tensor_parallel_size=2)
    plan = plan_memory(
        config,
        weights=0,
        activations=0,
        available=1 << 30,
        block_bytes=1 << 10,
        longest_context=1 << 20,
        device=torch.device(device),
        most_blocks=None,
    )
    assert (plan.num_blocks, plan.kv_cache) == (1 << 10, 1 << 20)


def test_a_rank_alone_runs_in_the_shapes_of_one_of_many() -> None:
    """To be measured without its peers; what it says has no meaning."""
    found, info = answers("tiny-qwen3", False, Alone(1, 3))
    assert [len(each) for each in found] == [16] * 3
    assert info.traffic is not None and info.traffic.kv
