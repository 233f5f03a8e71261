"""The way into the engine: bounded, in turn, and free again after whoever leaves it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, running_server, wait_until

from miniserve.core import InvalidRequest
from miniserve.server.errors import APIError
from miniserve.server.generation import Turns


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        await asyncio.wait_for(body(), 30)

    asyncio.run(within())


async def hand_in(turns: Turns, name: str, prompts: int, n: int, log: list[str], priority: int = 0) -> None:
    turns.admit(prompts, n)
    for _ in range(prompts):
        await turns.enter(n, priority)
        log.append(name)


def test_a_small_request_enters_after_one_turn_of_each_large_one() -> None:
    async def body() -> None:
        turns, log = Turns(4, 1000, 1000), []
        large = [asyncio.create_task(hand_in(turns, name, 50, 1, log)) for name in "ab"]
        await asyncio.sleep(0)
        small = asyncio.create_task(hand_in(turns, "c", 1, 1, log))
        await asyncio.sleep(0)
        assert log == ["a"] * 4
        while not small.done():
            turns.leave(1)
            await asyncio.sleep(0)
        assert log[4:] == ["a", "b", "c"]
        for _ in range(97):
            turns.leave(1)
            await asyncio.sleep(0)
        assert log.count("b") == 50 and log[7:47] == ["a", "b"] * 20
        assert turns.waiting == 0
        await asyncio.gather(*large)

    run(body)


def test_those_of_a_lower_number_enter_first() -> None:
    async def body() -> None:
        turns, log = Turns(1, 1000, 1000), []
        asked = [("running", 0), ("late", 7), ("first", 0), ("second", 0), ("soon", -3)]
        tasks = [asyncio.create_task(hand_in(turns, name, 1, 1, log, priority)) for name, priority in asked]
        for _ in tasks:
            await asyncio.sleep(0)
            turns.leave(1)
        await asyncio.gather(*tasks)
        assert log == ["running", "soon", "first", "second", "late"]

    run(body)


def test_who_leaves_the_queue_makes_room_for_those_behind() -> None:
    async def body() -> None:
        turns, log = Turns(4, 1000, 1000), []
        await hand_in(turns, "a", 1, 3, log)
        blocked = asyncio.create_task(hand_in(turns, "b", 1, 2, log))
        behind = asyncio.create_task(hand_in(turns, "c", 1, 1, log))
        await asyncio.sleep(0)
        assert log == ["a"]
        blocked.cancel()
        await behind
        assert log == ["a", "c"]
        turns.withdraw(2)
        woken = asyncio.create_task(hand_in(turns, "d", 1, 4, log))
        await asyncio.sleep(0)
        turns.leave(3)
        turns.leave(1)
        woken.cancel()  # its turn has come, but it does not know yet
        await asyncio.wait([woken])
        assert log == ["a", "c"]
        turns.withdraw(4)
        assert turns.enter_now(0)
        assert turns.waiting == 0 and turns._inside == 0

    run(body)


def test_more_than_the_capacity_enters_alone() -> None:
    turns = Turns(4, 256, 256)
    turns.admit(1, 128)
    assert turns.enter_now(128)
    turns.admit(1, 64)
    assert not turns.enter_now(64)
    turns.withdraw(64)
    turns.leave(128)


def test_large_requests_leave_room_for_small_ones() -> None:
    turns = Turns(4, 8, 8)
    with pytest.raises(InvalidRequest, match="at most 4"):
        turns.check(1, 5)
    for sequences in (4, 2, 1, 1):
        with pytest.raises((APIError, InvalidRequest)):
            turns.check(1, sequences + 1)
        turns.admit(1, sequences)
    with pytest.raises(APIError) as busy:
        turns.check(1, 1)
    assert busy.value.status == 429
    turns.withdraw(8)
    turns.check(1, 4)


def test_beyond_the_queue_requests_are_a_429() -> None:
    engine = FakeEngine(hold_at=0)
    with running_server(engine, max_queue=14) as server, ThreadPoolExecutor() as pool:

        def post(**body: Any) -> httpx.Response:
            return httpx.post(f"{server.url}/completions", json={"max_tokens": 1, **body}, timeout=60)

        waiting = pool.submit(post, prompt=["a"] * 3, n=2)
        wait_until(lambda: engine.num_running == 6)
        for streams in (False, True):
            refused = post(prompt=["a"] * 5, stream=streams)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "5"
            assert refused.json()["error"]["type"] == "RateLimitError"
        assert post(prompt=["a"] * 8).status_code == 400, "it would never fit"
        (line,) = [line for line in httpx.get(f"{server.root}/metrics").text.splitlines()
                   if line.startswith("vllm:admission_rejections_total{")]  # fmt: skip
        assert line.endswith(" 2.0")
        fits = pool.submit(post, prompt=["a"] * 4)
        wait_until(lambda: engine.num_running == 10)
        server.call(engine.gate.set)
        assert waiting.result().is_success and fits.result().is_success
        assert post(prompt=["a"] * 7).is_success


def test_a_request_of_many_prompts_lets_a_small_one_pass() -> None:
    engine = FakeEngine(hold_at=0, max_num_seqs=2)
    with running_server(engine) as server, ThreadPoolExecutor() as pool:

        def post(prompt: object) -> httpx.Response:
            return httpx.post(f"{server.url}/completions", json={"prompt": prompt, "max_tokens": 2}, timeout=60)

        large = [pool.submit(post, [[7, number]] * 100) for number in range(2)]
        wait_until(lambda: 'vllm:num_requests_waiting{engine="0",model_name="tiny/fake"} 196.0' in metrics(server.root))
        assert engine.num_running == 4
        assert httpx.get(f"{server.root}/health").json()["waiting"] == 196
        small = pool.submit(post, [9, 9])
        wait_until(lambda: httpx.get(f"{server.root}/health").json()["waiting"] == 197)
        server.call(engine.gate.set)
        assert small.result().is_success
        for answer in large:
            choices = answer.result().json()["choices"]
            assert [choice["index"] for choice in choices] == list(range(100))
        place = [prompt for prompt, _ in engine.seen].index([9, 9])
        assert place < 10, "it was handed in after all of the others"
        assert httpx.get(f"{server.root}/health").json()["waiting"] == 0


def metrics(root: str) -> str:
    return httpx.get(f"{root}/metrics").text


def test_leaving_while_prompts_wait_frees_every_place() -> None:
    engine = FakeEngine(hold_at=0, max_num_seqs=2)
    with running_server(engine, max_queue=200) as server:
        idle = server.num_tasks()
        for streams in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                body = {"prompt": ["a"] * 100, "max_tokens": 1, "stream": streams}
                if streams:
                    with httpx.stream("POST", f"{server.url}/completions", json=body, timeout=0.5) as response:
                        response.read()
                httpx.post(f"{server.url}/completions", json=body, timeout=0.5)
            wait_until(lambda: engine.num_running == 0)
            wait_until(lambda: httpx.get(f"{server.root}/health").json()["waiting"] == 0)
        wait_until(lambda: server.num_tasks() == idle)
        server.call(engine.gate.set)
        response = httpx.post(f"{server.url}/completions", json={"prompt": ["a"] * 100, "max_tokens": 1}, timeout=60)
        assert response.is_success
