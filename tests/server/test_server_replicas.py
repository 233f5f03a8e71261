"""Several engine processes behind one address: real processes, a runner without a model."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from engine_fakes import FACTORY, TINY, expected_tokens
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import RunningServer, running_server, wait_until

from miniserve.config import EngineConfig
from miniserve.core import Request, SamplingParams, UserError
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.replicas import Replicas

CONFIG = EngineConfig(data_parallel_size=2, max_model_len=1024)
LONG = {"max_tokens": 400, "ignore_eos": True}


def replicas(*options: str) -> Replicas:
    return Replicas(
        [
            AsyncEngine(replace(CONFIG, data_parallel_rank=rank), TINY, f"fake?{each}", runner_factory=FACTORY)
            for rank, each in enumerate(options)
        ]
    )


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server(replicas("step_seconds=0.01", "step_seconds=0.01&num_blocks=48")) as server:
        yield server


def ask(server: RunningServer, prompt: list[int], **body: Any) -> httpx.Response:
    return httpx.post(
        f"{server.url}/completions", json={"prompt": prompt, "return_token_ids": True, **body}, timeout=120
    )


def by_engine(server: RunningServer, name: str) -> list[float]:
    families = text_string_to_metric_families(httpx.get(f"{server.root}/metrics").text)
    samples = {s.labels["engine"]: s.value for family in families for s in family.samples if s.name == name}
    return [samples[number] for number in sorted(samples)]


def test_requests_are_shared_out_and_each_gets_its_own_answer(server: RunningServer) -> None:
    prompts = [[300 + number, 400, 401] for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, server, prompt, **LONG) for prompt in prompts]
        wait_until(lambda: httpx.get(f"{server.root}/health").json()["running"] == 8)
        assert by_engine(server, "vllm:num_requests_running") == [4, 4]
        for prompt, answer in zip(prompts, answers, strict=True):
            (choice,) = answer.result().json()["choices"]
            assert choice["token_ids"] == expected_tokens(prompt, 400)
    assert sum(by_engine(server, "vllm:generation_tokens_total")) == 8 * 400
    assert all(steps > 0 for steps in by_engine(server, "miniserve:decode_steps_total"))
    for number in range(2):
        records = httpx.get(f"{server.root}/debug/steps?engine={number}&limit=1000").json()["steps"]
        assert {record["rows"] for record in records} <= {0, 1, 2, 3, 4} and records, "its own steps alone"
    refused = httpx.get(f"{server.root}/debug/steps?engine=2")
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "engine"
    too_much = ask(server, [300] * 600, max_tokens=300)
    assert too_much.status_code == 400 and "the whole cache holds 768" in too_much.text, "the smallest cache counts"


def test_a_conversation_comes_back_to_its_engine_unless_that_is_busy(server: RunningServer) -> None:
    first, second = [*range(300, 600)], [*range(700, 1000)]
    with ThreadPoolExecutor(8) as pool:
        held = [pool.submit(ask, server, first, **LONG)]
        wait_until(lambda: by_engine(server, "vllm:num_requests_running") == [1, 0])
        held.append(pool.submit(ask, server, [*first, 7], **LONG))  # though the other has nothing to do
        wait_until(lambda: by_engine(server, "vllm:num_requests_running") == [2, 0])
        held.append(pool.submit(ask, server, second, **LONG))
        wait_until(lambda: by_engine(server, "vllm:num_requests_running") == [2, 1])
        assert by_engine(server, "vllm:prefix_cache_hits_total") == [288, 0]
        server.call(lambda: setattr(server.engine.engines[0], "_sequences", dict.fromkeys(range(9), None)))
        held.append(pool.submit(ask, server, [*first, 8], **LONG))
        wait_until(lambda: by_engine(server, "vllm:num_requests_running")[1] == 2)
        server.request_stop()


@pytest.mark.parametrize("killed", [0, 1])
def test_one_that_dies_ends_the_server_and_the_others_finish_what_they_run(server: RunningServer, killed: int) -> None:
    with ThreadPoolExecutor(2) as pool:
        answers = []
        for number in range(2):
            answers.append(pool.submit(ask, server, [300 + number, 400], **LONG))
            wait_until(lambda: httpx.get(f"{server.root}/health").json()["running"] == len(answers))
        process = server.engine.engines[killed]._process
        os.kill(process.pid, signal.SIGKILL)
        assert answers[killed].result().status_code == 503
        wait_until(lambda: server.engine.dead)
        health = httpx.get(f"{server.root}/health")
        assert health.status_code == 503 and f"Engine {killed} of 2: The engine died" in health.text
        assert ask(server, [300]).status_code == 503
        with pytest.raises(EngineDead, match=f"Engine {killed} of 2"):
            server.call(server.engine.generate, Request(request_id="r", prompt_token_ids=[1], params=SamplingParams()))
        (choice,) = answers[1 - killed].result().json()["choices"]
        assert choice["token_ids"] == expected_tokens([300 + 1 - killed, 400], 400)
    assert server.join() == 1


@pytest.mark.parametrize("options", [("start=user_error", ""), ("", "start=user_error")])
def test_all_start_or_none(options: tuple[str, str]) -> None:
    async def body() -> None:
        engine = replicas(*options)
        with pytest.raises(UserError, match="The fake device is too small"):
            await engine.start()
        assert all(each._process is not None and each._process.exit_reason() for each in engine.engines)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(body())


def test_progress_is_that_of_all_together() -> None:
    async def body() -> None:
        told: list[tuple[str, int, int]] = []
        engine = replicas("", "")
        await engine.start(lambda *progress: told.append(progress))
        assert await engine.shutdown(drain=False, timeout=5)
        assert told[-1] == ("weights", 4, 4) and {total for _, _, total in told} == {4}
        assert told == sorted(told)
        assert engine.dead == "The engine was shut down."

    asyncio.run(body())
