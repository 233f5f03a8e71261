"""Whatever the batch, budget, pool, prefix hits, preemptions, aborts and loop: every request gets its own tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_fakes import VOCAB, Driver, expected_of, make_request

from miniserve.config import SchedulerConfig
from miniserve.core import FinishReason, InvalidRequest, Request
from miniserve.scheduler.step_cost import StepCost, StepShape

T = TypeVar("T")


class Fickle(StepCost):
    """Grants what it likes beside decode rows, but something to the first chunk."""

    def __init__(self, seed: int) -> None:
        super().__init__(2.0)
        self._random = random.Random(seed)

    def chunk_tokens(self, shape: StepShape, start: int) -> int:
        return self._random.randrange(0 if shape.tokens else 1, 9) if shape.rows else 64


@dataclass
class Workload:
    config: SchedulerConfig
    requests: list[Request]
    arrivals: list[int]  # the turn in which each request arrives
    aborts: dict[str, int]  # the turn in which a request is aborted
    depth: int
    seed: int
    bounded: bool
    right_guesses: float  # share of them, under speculation


class Choices:
    """Choices made by bytes. Hypothesis draws many bytes at the cost of one choice, and still shrinks them: to 0, the
    first of the options."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def among(self, *options: T) -> T:
        return options[next(self._data) % len(options)]

    def tokens(self, count: int) -> list[int]:
        return [next(self._data) % VOCAB for _ in range(count)]


def choices(count: int) -> st.SearchStrategy[Choices]:
    return st.binary(min_size=count, max_size=count).map(Choices)


def draw_config(among: Callable[..., Any]) -> SchedulerConfig:
    block_size = among(1, 2, 3, 4)
    max_model_len = among(20, 40, 64)
    return SchedulerConfig(
        # From a pool that holds little more than the longest sequence, so that preemptions abound, to an ample one.
        num_blocks=-(-max_model_len // block_size) + among(-3, 0, 0, 1, 2, 5, 60),
        block_size=block_size,
        max_num_seqs=among(8, 5, 4, 3, 2, 1),
        max_num_batched_tokens=among(64, 16, 8, 5, 3, 2, 1),
        max_model_len=max_model_len,
        enable_prefix_caching=among(True, True, True, False),
        eos_token_ids=frozenset(among((), (), (0,), (0, 1))),
        num_draft_tokens=among(0, 0, 0, 1, 3, 7),
    )


def draw_request(name: str, choices: Choices, segments: list[list[int]], ignore_eos: bool | None) -> Request:
    """Prompts share segments in any order, so that the same tokens turn up after different prefixes."""
    among = choices.among
    prompt = [token for _ in range(among(0, 1, 2, 3)) for token in among(*segments)]
    prompt += choices.tokens(among(0, 1, 2, 3))
    max_tokens = among(20, 11, 30, None, 5, 2, 1, 0)
    return make_request(
        name,
        prompt or [3],
        max_tokens=max_tokens,
        min_tokens=among(*range(min(4, 99 if max_tokens is None else max_tokens) + 1)),
        stop_token_ids=among((), (), (), (2,), (0, 5)),
        ignore_eos=among(False, True) if ignore_eos is None else ignore_eos,
        logprobs=among(None, None, 0),
        prompt_logprobs=among(None, None, 0),
    )


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    common = draw(choices(64))
    among = common.among
    config = draw_config(among)
    segments = [
        common.tokens(among(config.block_size, 2 * config.block_size, 3 * config.block_size, 5))
        for _ in range(among(1, 2, 3))
    ]
    ignore_eos = among(False, True, None)  # of all, or request by request
    requests, arrivals, aborts = [], [], {}
    for i in range(draw(st.integers(1, 16))):
        each = draw(choices(24))
        requests.append(draw_request(f"r{i}", each, segments, ignore_eos))
        arrivals.append(each.among(0, 0, 0, 1, 2, 3, 5, 8, 13))
        if each.among(False, False, False, False, True):
            aborts[f"r{i}"] = arrivals[-1] + each.among(*range(16))
    return Workload(
        config,
        requests,
        arrivals,
        aborts,
        depth=1 if config.num_draft_tokens else among(1, 2, 2, 3),
        seed=among(*range(100)),
        bounded=among(False, True),
        right_guesses=among(0.0, 0.5, 0.9, 1.0),
    )


def run(load: Workload) -> tuple[Driver, list[Request]]:
    cost = Fickle(load.seed) if load.bounded else None
    driver = Driver(load.config, load.depth, load.seed, cost, load.right_guesses)
    accepted = []
    for turn in range(max([*load.arrivals, *load.aborts.values()]) + 1):
        for request, arrival in zip(load.requests, load.arrivals, strict=True):
            if arrival == turn:
                try:
                    driver.add(request)
                    accepted.append(request)
                except InvalidRequest:
                    continue
        for request_id, when in load.aborts.items():
            if when == turn:
                driver.abort(request_id)
        driver.turn()
    driver.drain()
    return driver, accepted


def check_order(driver: Driver, accepted: list[Request]) -> None:
    """First come, first served, but that a prompt of one step may pass longer ones."""
    lens = {request.request_id: len(request.prompt_token_ids) for request in accepted}
    arrived = list(lens)
    for place, name in enumerate(started := driver.runner.first_starts):
        for later in started[place + 1 :]:
            if arrived.index(later) < arrived.index(name):
                assert lens[name] <= driver.config.max_num_batched_tokens < lens[later]


@settings(max_examples=500, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(workloads())
def test_tokens_do_not_depend_on_the_schedule(load: Workload) -> None:
    driver, accepted = run(load)
    for request in accepted:
        outputs = driver.outputs[request.request_id]
        if outputs[-1].finish_reason is FinishReason.ABORT:
            assert request.request_id in load.aborts
            tokens = driver.tokens_of(request.request_id)
            assert tokens == expected_of(request, load.config).token_ids[: len(tokens)]
        else:
            driver.check_against_definition(request)

    stats = driver.scheduler.stats()
    guesses = [len(run.token_ids) - 1 for plan in driver.plans for run in plan.draft_runs]
    assert stats.num_draft_tokens == sum(guesses)
    assert stats.num_drafts == sum(count > 0 for count in guesses)
    assert max(guesses, default=0) <= load.config.num_draft_tokens
    if load.right_guesses in (0.0, 1.0) and not any(request.params.min_tokens for request in accepted):
        assert stats.num_accepted_tokens == load.right_guesses * stats.num_draft_tokens
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.num_steps == len(driver.plans)
    finals = [driver.outputs[request.request_id][-1] for request in accepted]
    assert stats.num_preemptions == sum(final.num_preemptions for final in finals)
    assert stats.prefix_cache_hits == sum(final.num_cached_tokens for final in finals)
    assert stats.prefix_cache_hits <= stats.prefix_cache_queries
    check_order(driver, accepted)
