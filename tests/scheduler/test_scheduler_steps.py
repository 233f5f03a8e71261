"""What single steps look like, and the moments that go wrong in engines: each its own small story."""

from __future__ import annotations

import msgspec
import pytest
from scheduler_fakes import VOCAB, Driver, context_of, expected_of, make_config, make_request, next_token
from scheduler_integrity import check_integrity

from miniserve.core import FinishReason, InvalidRequest, PoolView, Request, StepPlan, TokenLogprobs
from miniserve.scheduler.block_pool import sample
from miniserve.scheduler.scheduler import Scheduler

ALL_TOKENS = tuple(range(VOCAB))


def running(request_id: str, prompt_len: int, max_tokens: int | None = None, **params: object) -> Request:
    """A request whose prompt nobody shares."""
    base = 1000 * (1 + sum(request_id.encode()))
    return make_request(request_id, list(range(base, base + prompt_len)), max_tokens=max_tokens, **params)


def first_stopping(config_eos: int, after: int) -> Request:
    """A request that meets `config_eos` as its output number `after`, and not before."""
    config = make_config(eos_token_ids=frozenset({config_eos}))
    for base in range(10_000):
        request = make_request("eos", [base, base + 1], max_tokens=after + 10)
        if len(expected_of(request, config).token_ids) == after:
            return request
    raise AssertionError("no such request")


# --- what is seen of the pool -------------------------------------------------------------------------------------


def test_the_view_of_the_pool_tells_requests_shared_prefixes_and_what_is_kept_apart() -> None:
    driver = Driver(make_config(block_size=4, num_blocks=12))
    driver.add(make_request("gone", [*range(100, 108), 0], max_tokens=1))
    driver.drain()
    assert driver.scheduler.pool_view(12).owners == [PoolView.KEPT] * 2 + [PoolView.FREE] * 10
    driver.add(make_request("a", [*range(8), 50], max_tokens=20))
    driver.turn()
    driver.add(make_request("b", [*range(8), 60], max_tokens=20))
    driver.turn()
    view = driver.scheduler.pool_view(12)
    assert sorted(view.owners) == [PoolView.SHARED] * 2 + [PoolView.KEPT] * 2 + [PoolView.FREE] * 6 + [0, 1]
    assert set(view.num_tokens) == {0, 1} and view.stride == 1
    fewer = driver.scheduler.pool_view(5)
    assert (fewer.stride, fewer.owners) == (3, [view.owners[block] for block in sample(12, 3)])
    driver.scheduler.abort("a")  # the prefix is the other's alone now, whoever came first
    assert sorted(driver.scheduler.pool_view(12).owners) == [PoolView.KEPT] * 2 + [PoolView.FREE] * 7 + [1] * 3


# --- the shape of a step ------------------------------------------------------------------------------------------


def test_prefill_then_decode_with_blocks_just_in_time() -> None:
    driver = Driver(make_config(block_size=4))
    driver.add(running("a", 7, max_tokens=4))
    driver.drain()
    first, *decodes = driver.plans
    assert [start.row for start in first.starts] == [0]
    assert [(chunk.start, len(chunk.token_ids), chunk.samples) for chunk in first.chunks] == [(0, 7, True)]
    assert [(row, index, len(blocks)) for row, index, blocks in first.new_blocks] == [(0, 0, 2)]
    assert [plan.decode_rows for plan in decodes] == [[0], [0], [0]]
    # Tokens at positions 7, 8, 9: only position 8 needs a new block, and the fourth token is never computed.
    assert [len(plan.new_blocks) for plan in decodes] == [0, 1, 0]


def test_a_long_prompt_is_cut_to_what_decode_rows_leave_of_the_budget() -> None:
    driver = Driver(make_config(max_num_batched_tokens=8))
    driver.add(running("a", 3))
    driver.turn()
    driver.add(running("b", 18, max_tokens=2))
    plans = [driver.launch() for _ in range(3)]
    assert [[len(chunk.token_ids) for chunk in plan.chunks] for plan in plans if plan] == [[7], [7], [4]]
    assert [[chunk.samples for chunk in plan.chunks] for plan in plans if plan] == [[False], [False], [True]]
    assert all(plan and plan.decode_rows == [0] for plan in plans)


def chunks_of(driver: Driver, steps: int) -> list[list[tuple[int, int]]]:
    """Row and length of each chunk of the next `steps` steps."""
    plans = [driver.launch() for _ in range(steps)]
    return [[(chunk.row, len(chunk.token_ids)) for chunk in plan.chunks] for plan in plans if plan]


def test_short_prompts_pass_a_long_one_with_a_quarter_of_its_steps() -> None:
    driver = Driver(make_config(max_num_batched_tokens=16, max_model_len=128), depth=9)
    driver.add(running("long", 100))
    assert chunks_of(driver, 1) == [[(0, 16)]]
    driver.add(running("a", 6))
    driver.add(running("b", 1))
    assert chunks_of(driver, 2) == [[(1, 4), (0, 12)], [(1, 2), (2, 1), (0, 13)]]
    # Both decode now, and nobody else waits.
    assert chunks_of(driver, 1) == [[(0, 14)]]


def test_a_prompt_of_one_step_lets_nobody_pass() -> None:
    driver = Driver(make_config(max_num_batched_tokens=16), depth=9)
    driver.add(running("decoding", 10))
    driver.launch()
    driver.add(running("whole", 16))
    driver.add(running("short", 2))
    assert chunks_of(driver, 2) == [[(1, 15)], [(1, 1), (2, 2)]]


def test_a_short_prompt_also_passes_long_ones_that_wait() -> None:
    driver = Driver(make_config(max_num_batched_tokens=16, max_model_len=128), depth=9)
    for name, length in (("first", 60), ("second", 60), ("short", 3)):
        driver.add(running(name, length))
    assert chunks_of(driver, 2) == [[(1, 3), (0, 13)], [(0, 15)]]
    assert driver.runner.first_starts == ["first", "short"]
    driver.drain()
    assert driver.runner.first_starts == ["first", "short", "second"]


@pytest.mark.parametrize("room", ["rows", "blocks"])
def test_nobody_passes_where_that_would_take_the_room_of_the_passed(room: str) -> None:
    scarce = {"max_num_seqs": 2} if room == "rows" else {"num_blocks": 17 + 17 + 1, "block_size": 4}
    config = make_config(max_num_batched_tokens=16, max_model_len=128, **scarce)
    driver = Driver(config)
    for name, length in (("first", 64), ("second", 64), ("short", 5)):
        driver.add(running(name, length, max_tokens=2))
    driver.drain()
    assert driver.runner.first_starts == ["first", "second", "short"]


def test_those_of_a_lower_number_start_first_and_stop_nobody() -> None:
    driver = Driver(make_config(max_num_seqs=1, num_blocks=16, block_size=4))
    driver.add(running("running", 5, max_tokens=3))
    driver.turn()
    for name, priority in (
        ("later", 1),
        ("first of 0", 0),
        ("late", 1),
        ("soon", -1),
        ("second of 0", 0),
        ("soon 2", -1),
    ):
        driver.add(msgspec.structs.replace(running(name, 5, max_tokens=2), priority=priority))
    driver.drain()
    order = ["running", "soon", "soon 2", "first of 0", "second of 0", "later", "late"]
    assert driver.runner.first_starts == order


def test_a_preempted_request_returns_to_the_place_of_its_priority() -> None:
    driver = Driver(make_config(num_blocks=7, block_size=4, max_num_seqs=3))
    for name, priority in (("a", 0), ("b", 5)):
        driver.add(msgspec.structs.replace(running(name, 7, max_tokens=12), priority=priority))
    driver.turn()
    driver.add(msgspec.structs.replace(running("c", 3, max_tokens=2), priority=1))
    driver.drain()
    assert driver.scheduler.stats().num_preemptions
    assert driver.runner.first_starts == ["a", "b", "c"]


def test_only_requests_of_one_salt_share_their_prefix() -> None:
    driver = Driver(make_config(block_size=4))
    hits = []
    for salt in (None, "a", "b", "a", None, "0"):
        request = make_request(f"{len(hits)}", list(range(100, 118)), max_tokens=2)
        driver.add(msgspec.structs.replace(request, cache_salt=salt))
        before = driver.scheduler.stats().prefix_cache_hits
        driver.drain()
        hits.append(driver.scheduler.stats().prefix_cache_hits - before)
    assert hits == [0, 0, 0, 16, 16, 0]


def test_a_preempted_prompt_waits_in_its_place_by_arrival() -> None:
    config = make_config(max_num_batched_tokens=16, max_model_len=128, num_blocks=40, block_size=4)
    driver = Driver(config)
    driver.add(running("first", 64, max_tokens=40))
    driver.add(running("second", 60, max_tokens=2))
    driver.add(running("short", 3, max_tokens=60))
    for _ in range(200):
        driver.turn()
        waiting = [seq.request_id for seq in driver.scheduler._waiting.values()]
        assert waiting in ([], ["second"], ["short"], ["second", "short"])
    assert not driver.scheduler.has_work()
    for name, length, max_tokens in (("first", 64, 40), ("second", 60, 2), ("short", 3, 60)):
        driver.check_against_definition(running(name, length, max_tokens=max_tokens))


def test_decode_extend_and_prefill_share_a_step() -> None:
    driver = Driver(make_config(max_num_batched_tokens=10))
    driver.add(running("a", 4))
    driver.add(running("b", 12))
    driver.turn()
    driver.add(running("c", 3))
    plan = driver.launch()
    assert plan is not None
    assert plan.decode_rows == [0]
    assert [(chunk.row, chunk.start, len(chunk.token_ids)) for chunk in plan.chunks] == [(1, 6, 6), (2, 0, 3)]


def test_a_steady_decode_step_says_nothing_but_its_rows() -> None:
    driver = Driver(make_config(block_size=16, max_num_seqs=4))
    for name in "abcd":
        driver.add(running(name, 5))
    driver.turn()
    driver.turn()
    plan, after = driver.launch(), driver.launch()
    assert plan == after == StepPlan([], [], [], [0, 1, 2, 3], [], same_rows=True)


def test_a_plan_in_flight_does_not_change_when_rows_come_and_go() -> None:
    driver = Driver(make_config())
    for name in "ab":
        driver.add(running(name, 3))
    driver.turn()
    plan = driver.launch()
    driver.abort("a")
    driver.add(running("c", 3))
    driver.launch()
    driver.launch()
    assert plan is not None and plan.decode_rows == [0, 1]
    assert driver.plans[-1].decode_rows == [1, 0]  # b, then c in a's row


def test_nothing_to_do_is_no_step() -> None:
    driver = Driver(make_config())
    assert driver.launch() is None and not driver.scheduler.has_work()
    driver.add(running("a", 3, max_tokens=1))
    assert driver.launch() is not None
    assert driver.launch() is None and driver.scheduler.has_work()  # its only token is in flight
    driver.collect()
    assert not driver.scheduler.has_work()


@pytest.mark.parametrize("depth", [1, 2])
def test_a_budget_below_the_number_of_rows_bounds_who_runs(depth: int) -> None:
    driver = Driver(make_config(max_num_batched_tokens=3, max_num_seqs=8), depth)
    for name in "abcdef":
        driver.add(running(name, 2, max_tokens=5))
    driver.drain()  # the runner checks that nobody who runs is left out of a step
    assert max(len(plan.decode_rows) for plan in driver.plans) == 3


def test_a_step_in_flight_is_work_though_nobody_waits_for_it() -> None:
    driver = Driver(make_config())
    driver.add(running("a", 3))
    driver.launch()
    driver.abort("a")
    assert driver.scheduler.has_work()
    driver.collect()
    assert not driver.scheduler.has_work()


# --- admission ----------------------------------------------------------------------------------------------------


def test_nobody_overtakes_a_request_that_waits_for_blocks() -> None:
    driver = Driver(make_config(num_blocks=8, block_size=4))
    driver.add(running("first", 16, max_tokens=8))
    driver.turn()
    driver.add(running("large", 20, max_tokens=2))
    driver.add(running("small", 1, max_tokens=2))
    driver.drain()
    assert driver.runner.first_starts == ["first", "large", "small"]


def test_beside_others_a_request_is_admitted_only_with_blocks_to_grow_by() -> None:
    driver = Driver(make_config(num_blocks=4, block_size=4))
    driver.add(running("a", 4, max_tokens=4))
    driver.add(running("b", 12, max_tokens=1))  # fits into the three free blocks, but a is about to need one
    plan = driver.launch()
    assert plan is not None and len(plan.starts) == 1
    driver.drain()
    assert driver.scheduler.stats().num_preemptions == 0


def test_a_waiting_request_is_looked_up_again_only_when_blocks_came_free(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(make_config(num_blocks=8, block_size=4))
    driver.add(running("a", 16, max_tokens=12))
    driver.turn()
    lookups = []
    match = driver.scheduler._pool.match
    monkeypatch.setattr(driver.scheduler._pool, "match", lambda *args: lookups.append(1) or match(*args))
    driver.add(running("b", 20, max_tokens=1))
    for _ in range(8):
        driver.turn()
    assert len(lookups) == 1
    driver.drain()
    assert len(lookups) == 2


def test_a_request_that_can_never_fit_is_refused_at_once() -> None:
    scheduler = Scheduler(make_config(num_blocks=4, block_size=4, max_model_len=20))
    with pytest.raises(InvalidRequest, match=r"17.*16"):
        scheduler.add(running("a", 10, max_tokens=7))
    with pytest.raises(InvalidRequest, match=r"20 tokens.*20 input tokens"):
        scheduler.add(running("a", 20, max_tokens=1))
    assert not scheduler.has_work()


def test_an_id_in_use_is_refused_and_one_that_ended_is_not() -> None:
    driver = Driver(make_config())
    driver.add(running("a", 3, max_tokens=2))
    with pytest.raises(InvalidRequest, match="already running"):
        driver.scheduler.add(running("a", 3))
    driver.drain()
    driver.add(running("a", 3, max_tokens=2))
    driver.drain()
    assert len(driver.tokens_of("a")) == 2


def test_the_whole_pool_can_be_filled_by_one_request() -> None:
    driver = Driver(make_config(num_blocks=4, block_size=4), depth=2)
    request = running("a", 3)
    driver.add(request)
    driver.drain()
    assert len(driver.tokens_of("a")) == 13
    driver.check_against_definition(request)


# --- the ends of requests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("max_tokens", [1, 2, 9])
def test_no_step_is_wasted_on_a_request_that_ends_by_length(depth: int, max_tokens: int) -> None:
    driver = Driver(make_config(), depth)
    driver.add(running("a", 5, max_tokens=max_tokens))
    driver.drain()
    assert driver.outputs["a"][-1].finish_reason is FinishReason.LENGTH
    assert sum(len(plan.decode_rows) for plan in driver.plans) == max_tokens - 1


def test_the_context_limit_ends_a_request_by_length() -> None:
    driver = Driver(make_config(max_model_len=9), depth=2)
    driver.add(running("exact", 8))
    driver.add(running("open", 5, max_tokens=100))
    driver.drain()
    assert [len(driver.tokens_of(name)) for name in ("exact", "open")] == [1, 4]
    assert driver.outputs["open"][-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(("depth", "wasted"), [(1, 0), (2, 1)])
def test_eos_costs_one_row_of_the_step_in_flight(depth: int, wasted: int) -> None:
    request = first_stopping(0, after=5)
    driver = Driver(make_config(eos_token_ids=frozenset({0})), depth)
    driver.add(request)
    driver.drain()
    driver.check_against_definition(request)
    assert driver.outputs["eos"][-1].finish_reason is FinishReason.STOP
    assert sum(len(plan.decode_rows) for plan in driver.plans) == 4 + wasted


def test_row_and_blocks_of_an_ended_request_are_reused_while_its_last_step_is_in_flight() -> None:
    request = first_stopping(0, after=2)
    driver = Driver(make_config(num_blocks=4, max_num_seqs=1, eos_token_ids=frozenset({0})), depth=2)
    driver.add(request)
    driver.launch()
    driver.launch()
    heir = running("heir", 15, max_tokens=1, ignore_eos=True)
    driver.add(heir)
    driver.collect()
    driver.launch()  # computes the row once more: its end is in the result not yet collected
    driver.collect()
    assert driver.outputs["eos"][-1].finish_reason is FinishReason.STOP
    plan = driver.launch()
    assert plan is not None and plan.stops == [0] and [start.row for start in plan.starts] == [0]
    assert len(driver.in_flight) == 2
    driver.drain()
    driver.check_against_definition(request)
    driver.check_against_definition(heir)


@pytest.mark.parametrize(
    ("params", "reason", "stop_token_id"),
    [
        ({"stop_token_ids": ALL_TOKENS[1:]}, FinishReason.STOP, "the token"),
        ({}, FinishReason.STOP, None),  # EOS
        ({"ignore_eos": True}, FinishReason.LENGTH, None),
        ({"ignore_eos": True, "stop_token_ids": ALL_TOKENS}, FinishReason.STOP, "the token"),
        ({"stop_token_ids": ALL_TOKENS}, FinishReason.STOP, None),  # both: it is EOS first of all
    ],
)
def test_what_stops_a_request_is_named(
    params: dict[str, object], reason: FinishReason, stop_token_id: str | None
) -> None:
    config = make_config(eos_token_ids=frozenset({0}))
    wanted = range(1, VOCAB) if params.get("stop_token_ids") == ALL_TOKENS[1:] else [0]
    prompt = next([n] for n in range(999) if next_token(context_of([n]), 0, running("a", 1), config) in wanted)
    driver = Driver(config)
    driver.add(make_request("a", prompt, max_tokens=1, **params))
    driver.drain()
    [output] = driver.outputs["a"]
    expected = output.new_token_ids[0] if stop_token_id else None
    assert (output.finish_reason, output.stop_token_id) == (reason, expected)


def test_a_stop_token_before_min_tokens_does_not_stop() -> None:
    scheduler = Scheduler(make_config(eos_token_ids=frozenset({0})))
    scheduler.add(running("a", 3, max_tokens=10, min_tokens=3, stop_token_ids=(4,)))
    reasons = []
    for token in (0, 4, 0):
        step = scheduler.schedule()
        assert step is not None
        step.token_ids = [token]
        reasons += [output.finish_reason for output in scheduler.update(step)]
    assert reasons == [None, None, FinishReason.STOP]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_request_for_no_tokens_computes_its_prompt_and_ends(depth: int) -> None:
    driver = Driver(make_config(max_num_batched_tokens=8), depth)
    request = running("a", 20, max_tokens=0, prompt_logprobs=0)
    driver.add(request)
    driver.add(running("plain", 20, max_tokens=0))
    driver.drain()
    driver.check_against_definition(request)
    [output] = driver.outputs["a"]
    assert output.new_token_ids == [] and output.finish_reason is FinishReason.LENGTH
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 20
    assert [output.prompt_logprobs for output in driver.outputs["plain"]] == [None]
    assert all(plan.sampling_rows == [] for plan in driver.plans)


# --- aborts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launched", [0, 1, 2, 3])
@pytest.mark.parametrize("collected", [0, 1])
def test_abort_frees_everything_at_once_at_any_moment(launched: int, collected: int) -> None:
    driver = Driver(make_config(max_num_batched_tokens=8), depth=2)
    driver.add(running("a", 12))
    for _ in range(launched):
        driver.launch()
    for _ in range(min(collected, launched)):
        driver.collect()
    driver.abort("a")
    stats = driver.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert driver.outputs["a"][-1].finish_reason is FinishReason.ABORT
    assert driver.tokens_of("a") == []
    heir = running("a", 5, max_tokens=3)  # the same id, the same row, while steps of the old one are in flight
    driver.add(heir)
    driver.drain()
    driver.check_against_definition(heir)


def test_abort_of_the_head_of_the_queue_lets_the_next_one_in() -> None:
    driver = Driver(make_config(num_blocks=8, block_size=4))
    driver.add(running("a", 16, max_tokens=8))
    driver.turn()
    driver.add(running("large", 30, max_tokens=1))
    driver.add(running("small", 2, max_tokens=1))
    driver.turn()
    driver.abort("large")
    driver.turn()
    assert driver.outputs["small"][-1].finish_reason is FinishReason.LENGTH


def test_abort_of_nothing_is_nothing() -> None:
    driver = Driver(make_config())
    assert driver.scheduler.abort("ghost") is None
    driver.add(running("a", 2, max_tokens=1))
    driver.drain()
    assert driver.scheduler.abort("a") is None


# --- preemption ---------------------------------------------------------------------------------------------------


def overfull(depth: int) -> Driver:
    """Three requests whose blocks run out when they are half done; two of them fit."""
    driver = Driver(make_config(num_blocks=10, block_size=4, enable_prefix_caching=False), depth)
    for name in "abc":
        driver.add(running(name, 4, max_tokens=16))
    return driver


@pytest.mark.parametrize("depth", [1, 2])
def test_the_latest_arrival_is_preempted_and_resumes_with_its_output(depth: int) -> None:
    driver = overfull(depth)
    driver.drain()
    assert [driver.outputs[name][-1].num_preemptions for name in "abc"] == [0, 0, 1]
    [resumed] = [start for plan in driver.plans for start in plan.starts if start.output_token_ids]
    assert resumed.request.request_id == "c"
    assert resumed.output_token_ids == driver.tokens_of("c")[: len(resumed.output_token_ids)]
    for name in "abc":
        driver.check_against_definition(running(name, 4, max_tokens=16))
    assert driver.scheduler.stats().num_preemptions == 1


def preempt_in_flight() -> Driver:
    driver = overfull(depth=2)
    while driver.scheduler.stats().num_preemptions == 0:
        driver.launch()
        if len(driver.in_flight) == 2 and driver.scheduler.stats().num_preemptions == 0:
            driver.collect()
    assert len(driver.in_flight) == 2
    return driver


def test_a_token_in_flight_when_its_request_is_preempted_is_kept() -> None:
    driver = preempt_in_flight()
    before = len(driver.tokens_of("c"))
    driver.collect()
    assert len(driver.tokens_of("c")) == before + 1
    driver.drain()
    driver.check_against_definition(running("c", 4, max_tokens=16))


def test_a_preempted_request_may_be_aborted_before_its_token_arrives() -> None:
    driver = preempt_in_flight()
    driver.abort("c")
    driver.drain()
    assert driver.outputs["c"][-1].finish_reason is FinishReason.ABORT


def test_a_preempted_request_may_end_with_the_token_in_flight() -> None:
    driver = preempt_in_flight()
    driver.scheduler._sequences["c"].stop_ids = frozenset(ALL_TOKENS)
    driver.collect()
    assert driver.outputs["c"][-1].finish_reason is FinishReason.STOP
    assert driver.scheduler.stats().num_waiting == 0
    driver.drain()
    assert not any(start.output_token_ids for plan in driver.plans for start in plan.starts)


def test_a_preempted_request_need_not_wait_for_as_much_room_as_the_one_it_pushed_back() -> None:
    driver = Driver(make_config(num_blocks=9, block_size=4, enable_prefix_caching=False))
    driver.add(running("a", 11, max_tokens=20))
    driver.add(running("b", 7, max_tokens=8))
    driver.add(running("c", 3, max_tokens=20))
    driver.add(running("large", 24, max_tokens=1))
    while driver.scheduler.stats().num_preemptions == 0:
        driver.turn()
    assert driver.outputs["c"][-1].num_preemptions == 0  # told only when it gets its next token
    while driver.outputs["b"][-1].finish_reason is None:
        driver.turn()
    plan = driver.launch()
    assert plan is not None and [start.request.request_id for start in plan.starts] == ["c"]


# --- the prefix cache ---------------------------------------------------------------------------------------------


def test_a_running_prompt_is_shared_from_the_next_step_on() -> None:
    driver = Driver(make_config(block_size=4), depth=2)
    prompt = list(range(100, 110))
    driver.add(make_request("a", prompt, max_tokens=20))
    driver.add(make_request("same step", prompt, max_tokens=2))
    driver.launch()
    driver.add(make_request("b", prompt, max_tokens=20))
    plan = driver.launch()  # the first step is still in flight
    assert plan is not None
    assert [(chunk.start, chunk.token_ids) for chunk in plan.chunks] == [(8, [108, 109])]
    assert plan.new_blocks[0][2][:2] == driver.plans[0].new_blocks[0][2][:2]
    driver.drain()
    for name, cached in (("a", 0), ("same step", 0), ("b", 8)):
        assert {output.num_cached_tokens for output in driver.outputs[name]} == {cached}
    assert driver.tokens_of("a") == driver.tokens_of("b")
    stats = driver.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (30, 8)


def test_tokens_are_found_after_their_own_prefix_only() -> None:
    driver = Driver(make_config(block_size=2))
    head, middle, tail = [1, 2], [3, 4], [5, 6]
    for i, prompt in enumerate([[*head, 0], head + middle + tail, middle + tail + head, tail + tail + [1]]):
        request = make_request(f"r{i}", prompt, max_tokens=4)
        driver.add(request)
        driver.drain()
        driver.check_against_definition(request)
        assert driver.outputs[f"r{i}"][0].num_cached_tokens == (2 if i == 1 else 0)


def test_a_fully_cached_prompt_still_computes_one_token() -> None:
    driver = Driver(make_config(block_size=4))
    for name in "ab":
        driver.add(make_request(name, list(range(100, 108)), max_tokens=3))
        driver.drain()
    assert driver.outputs["b"][0].num_cached_tokens == 4
    assert driver.tokens_of("a") == driver.tokens_of("b")


def test_generated_tokens_are_found_while_their_request_runs() -> None:
    driver = Driver(make_config(block_size=4), depth=2)
    driver.add(running("a", 6))
    while len(driver.tokens_of("a")) < 12:
        driver.turn()
    fork = make_request("b", running("a", 6).prompt_token_ids + driver.tokens_of("a"), max_tokens=3)
    driver.add(fork)
    driver.turn()
    driver.turn()
    assert driver.outputs["b"][0].num_cached_tokens == 16
    driver.abort("a")
    driver.drain()
    driver.check_against_definition(fork)


@pytest.mark.parametrize("depth", [1, 2])
def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation(depth: int) -> None:
    driver = Driver(make_config(block_size=4), depth)
    driver.add(running("a", 6, max_tokens=15))
    driver.drain()
    conversation = running("a", 6).prompt_token_ids + driver.tokens_of("a")
    follow_up = make_request("b", [*conversation, 1, 2], max_tokens=3)
    driver.add(follow_up)
    driver.drain()
    # The last token's KV was never computed: 20 of the 21 tokens can be found, all in full blocks.
    assert driver.outputs["b"][0].num_cached_tokens == 20
    driver.check_against_definition(follow_up)


def test_prompt_logprobs_skip_the_cache_but_fill_it() -> None:
    driver = Driver(make_config(block_size=4))
    prompt = list(range(100, 110))
    for name, cached in (("a", 0), ("b", 0), ("c", 8)):
        wanted = None if name == "c" else 0
        request = make_request(name, prompt, max_tokens=3, prompt_logprobs=wanted)
        driver.add(request)
        driver.drain()
        driver.check_against_definition(request)
        assert driver.outputs[name][0].num_cached_tokens == cached
    assert driver.scheduler.stats().prefix_cache_queries == 10


def test_prompt_logprobs_restart_when_the_prefill_is_preempted() -> None:
    driver = Driver(make_config(num_blocks=10, block_size=4, max_num_batched_tokens=4), depth=2)
    driver.add(running("a", 4, max_tokens=24))
    driver.add(running("b", 4, max_tokens=24))
    late = running("c", 14, max_tokens=2, prompt_logprobs=0)
    driver.add(late)
    driver.drain()
    assert driver.outputs["c"][-1].num_preemptions > 0
    driver.check_against_definition(late)


def test_the_cache_can_be_off() -> None:
    driver = Driver(make_config(enable_prefix_caching=False))
    for name in "ab":
        driver.add(make_request(name, list(range(100, 110)), max_tokens=3))
        driver.drain()
    assert driver.outputs["b"][0].num_cached_tokens == 0
    assert driver.scheduler.stats().prefix_cache_queries == 0


# --- what must not go unnoticed -----------------------------------------------------------------------------------


def test_results_out_of_order_or_of_the_wrong_size_are_refused() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(running("a", 3))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    first.token_ids, second.token_ids = [1, 2], [1]
    with pytest.raises(RuntimeError, match="order"):
        scheduler.update(second)
    with pytest.raises(RuntimeError, match="samples 1 tokens returned 2"):
        scheduler.update(first)


def test_missing_prompt_logprobs_are_noticed() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(running("a", 3, prompt_logprobs=0))
    step = scheduler.schedule()
    assert step is not None
    step.token_ids, step.prompt_logprobs = [1], {0: [TokenLogprobs(1, -1.0, 1, [], [])]}
    with pytest.raises(RuntimeError, match="A chunk with 2 logprob targets returned 1"):
        scheduler.update(step)


def test_the_audit_sees_a_leaked_row_and_a_lost_block() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(running("a", 9))
    scheduler.schedule()
    check_integrity(scheduler)
    row = scheduler._free_rows.pop(0)
    with pytest.raises(RuntimeError, match="rows are leaked"):
        check_integrity(scheduler)
    scheduler._free_rows.insert(0, row)
    scheduler._sequences["a"].blocks.pop()
    with pytest.raises(RuntimeError, match=r"counts 1 holders, has 0.*no blocks for its 9 computed tokens"):
        check_integrity(scheduler)
