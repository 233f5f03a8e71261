from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_fakes import Driver, make_config, make_request

from miniserve.scheduler.step_cost import MIN_TOKENS, UNKNOWN_TOKENS, StepCost, StepShape


def gpu_seconds(shape: StepShape) -> float:
    """About what an 8B model takes on an H100."""
    seconds = 5.5e-3 + 2e-5 * shape.rows + 4e-8 * shape.context
    return seconds + (8e-4 + 24e-6 * shape.tokens + 2.4e-9 * shape.keys if shape.tokens else 0.0)


def serve(cost: StepCost, rows: int, prompt: int, steps_alone: int = 30, noise: float = 0.0) -> list[float]:
    """Rows that decode, then a prompt beside them; by how much each of the prompt's steps took longer than without."""
    rng = random.Random(rows)
    context = rows * 1024
    for _ in range(steps_alone):
        shape = StepShape(rows, context)
        cost.observe(shape, gpu_seconds(shape))
        context += rows
    ratios, start = [], 0
    while start < prompt:
        shape = StepShape(rows, context)
        alone = gpu_seconds(shape)
        tokens = min(prompt - start, cost.chunk_tokens(shape, start))
        shape.add_chunk(start, tokens)
        seconds = gpu_seconds(shape) * (1.0 + noise * rng.uniform(-1.0, 1.0))
        cost.observe(shape, seconds)
        ratios.append(seconds / alone)
        start, context = start + tokens, context + rows
    return ratios


@pytest.mark.parametrize("rows", [1, 16, 100])
@pytest.mark.parametrize("max_ratio", [2.0, 3.0, 5.0])
def test_once_learned_steps_stay_within_the_ratio_and_near_it(max_ratio: float, rows: int) -> None:
    cost = StepCost(max_ratio)
    for _ in range(3):
        serve(cost, rows, 8192)
    ratios = serve(cost, rows, 8192)
    assert max(ratios) <= 1.05 * max_ratio
    assert sum(ratios) / len(ratios) >= 0.8 * max_ratio


def test_noise_does_not_carry_the_slowest_steps_far_beyond_the_ratio() -> None:
    cost = StepCost(2.0)
    for _ in range(3):
        serve(cost, 16, 8192, noise=0.1)
    ratios = sorted(serve(cost, 16, 8192, noise=0.1))
    assert ratios[int(0.9 * len(ratios))] <= 2.1


def test_where_launching_takes_longer_than_a_decode_step_chunks_get_what_costs_little_more() -> None:
    cost = StepCost(2.0)
    for size in (256, 256, 64, 512, 64, 128, 64, 256) * 20:
        cost.observe(StepShape(4, 0), 2e-3)
        cost.observe(StepShape(4, 0, size, 0), 2e-3 + 8e-3 + 8e-6 * size)
    assert 2 * MIN_TOKENS <= cost.chunk_tokens(StepShape(4, 0), 0) <= 6 * MIN_TOKENS


def test_one_odd_step_is_soon_forgotten() -> None:
    cost = StepCost(2.0)
    for _ in range(3):
        serve(cost, 16, 8192)
    shape = StepShape(16, 16 * 1024)
    before = cost.chunk_tokens(shape, 0)
    odd = StepShape(16, 16 * 1024, 128, 128 * 64)
    cost.observe(odd, 3.0)  # a kernel was compiled
    assert cost.chunk_tokens(shape, 0) >= before / 2
    serve(cost, 16, 4096)
    assert cost.chunk_tokens(shape, 0) >= 0.8 * before


def test_what_is_not_known_yet_is_bounded_too_and_no_rows_are_bounded_by_nothing() -> None:
    cost = StepCost(2.0)
    assert cost.chunk_tokens(StepShape(4, 100), 0) == UNKNOWN_TOKENS
    assert cost.chunk_tokens(StepShape(4, 100, 200, 0), 0) == UNKNOWN_TOKENS - 200
    assert cost.chunk_tokens(StepShape(0, 0), 0) > 1 << 30
    serve(cost, 4, 1024)
    assert cost.chunk_tokens(StepShape(0, 0), 0) > 1 << 30
    assert StepCost(0.0).chunk_tokens(StepShape(4, 100), 0) > 1 << 30


shapes = st.builds(
    StepShape,
    st.integers(1, 256),
    st.integers(0, 1 << 20),
    st.sampled_from([0, 0, 1, 63, 64, 500, 8192]),
    st.integers(0, 1 << 28),
)


@given(st.lists(st.tuples(shapes, st.floats(0.0, 1e3)), max_size=30), shapes, st.integers(0, 1 << 20))
def test_whatever_is_observed_prompts_get_on_and_a_longer_context_gives_no_more(
    steps: list[tuple[StepShape, float]], shape: StepShape, start: int
) -> None:
    cost = StepCost(2.0)
    for step, seconds in steps:
        cost.observe(step, seconds)
    tokens = cost.chunk_tokens(shape, start)
    assert tokens >= max(0, MIN_TOKENS - shape.tokens)
    assert cost.chunk_tokens(shape, start + 4096) <= tokens


class Bounded(Driver):
    """A device whose steps take what `gpu_seconds` says."""

    def __init__(self, max_ratio: float, depth: int) -> None:
        config = make_config(
            num_blocks=1024, max_model_len=1024, max_num_batched_tokens=512, enable_prefix_caching=False
        )
        super().__init__(config, depth, cost=StepCost(max_ratio))

    def collect(self) -> None:
        step = self.in_flight[0]
        shape = StepShape(len(step.plan.decode_rows), 0)
        for chunk in step.plan.chunks:
            shape.add_chunk(chunk.start, len(chunk.token_ids))
        super().collect()
        self.scheduler.observe(step, gpu_seconds(shape))


def chunk_sizes(driver: Driver) -> list[int]:
    """Tokens of the chunks beside decode rows, step by step."""
    return [plan.num_tokens - len(plan.decode_rows) for plan in driver.plans if plan.chunks and plan.decode_rows]


@pytest.mark.parametrize("depth", [1, 2])
def test_chunks_beside_decode_rows_follow_the_bound_and_take_all_where_none_decode(depth: int) -> None:
    driver = Bounded(2.0, depth)
    driver.add(make_request("long", list(range(900)), max_tokens=2))
    driver.drain()
    assert [plan.num_tokens for plan in driver.plans if plan.chunks] == [512, 388]
    driver.plans.clear()
    driver.add(make_request("decoding", [1], max_tokens=120))
    for _ in range(20):
        driver.turn()
    for name in "abc":
        driver.add(make_request(name, list(range(900)), max_tokens=2))
    driver.drain()
    mixed = chunk_sizes(driver)
    assert MIN_TOKENS <= max(mixed) <= UNKNOWN_TOKENS
    assert sum(mixed) == 3 * 900
    settled = [gpu_seconds(StepShape(1, 0, n, n * 450)) / gpu_seconds(StepShape(1, 0)) for n in mixed[3:-1]]
    assert max(settled) <= 2.1


def test_a_prompt_gets_on_beside_rows_that_can_bear_nothing() -> None:
    driver = Bounded(1.0001, 2)
    driver.add(make_request("decoding", [1], max_tokens=60))
    for _ in range(5):
        driver.turn()
    driver.add(make_request("long", list(range(640)), max_tokens=2))
    driver.drain()
    sizes = chunk_sizes(driver)
    assert sizes[0] == UNKNOWN_TOKENS and sizes[-2:] == [MIN_TOKENS, MIN_TOKENS]
