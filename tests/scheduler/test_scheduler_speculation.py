"""What a step verifies, and what becomes of right and wrong guesses."""

from __future__ import annotations

import pytest
from scheduler_fakes import make_config, make_request
from scheduler_integrity import check_integrity

from miniserve.config import SchedulerConfig
from miniserve.core import DraftRun, FinishReason, RequestOutput, SchedulerStats, StepPlan
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.sequence import Sequence
from miniserve.scheduler.speculation import Speculation

LOOP = [1, 2, 3, 4, 5, 1, 2]  # what follows is 3, 4, 5, 1, …


class Steps:
    """A scheduler whose results the test dictates."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config)

    def add(self, request_id: str, prompt: list[int], **params: object) -> None:
        self.scheduler.add(make_request(request_id, prompt, **params))

    def step(self, *token_ids: int) -> tuple[StepPlan, list[RequestOutput]]:
        step = self.scheduler.schedule()
        assert step is not None
        check_integrity(self.scheduler)
        step.token_ids = list(token_ids)
        outputs = self.scheduler.update(step)
        check_integrity(self.scheduler)
        return step.plan, outputs


def new_tokens(outputs: list[RequestOutput], request_id: str = "a") -> list[int]:
    return [token for output in outputs if output.request_id == request_id for token in output.new_token_ids]


def test_guesses_count_up_to_the_first_wrong_one() -> None:
    steps = Steps(make_config(num_draft_tokens=3))
    steps.add("a", LOOP, max_tokens=20)
    assert not steps.step(3)[0].draft_runs  # the prefill
    plan, outputs = steps.step(4, 5, 9, 2)
    assert plan.decode_rows == [] and plan.draft_runs == [DraftRun(0, 7, [3, 4, 5, 1])]
    assert plan.sampling_rows == [0] * 4 and plan.run_positions == [7, 8, 9, 10] and plan.num_tokens == 4
    assert [output.new_token_ids for output in outputs] == [[4, 5, 9]]  # a stream has an event for all of them
    assert steps.step(7)[0].draft_runs == [DraftRun(0, 10, [9])]  # 5 9 has never been there
    stats = steps.scheduler.stats()
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (1, 3, 2)


def test_what_follows_a_stop_token_is_dropped() -> None:
    steps = Steps(make_config(num_draft_tokens=3, eos_token_ids=frozenset({5})))
    steps.add("a", LOOP, max_tokens=20)
    steps.step(3)
    outputs = steps.step(4, 5, 1, 2)[1]
    assert new_tokens(outputs) == [4, 5]
    assert [output.finish_reason for output in outputs] == [FinishReason.STOP]
    assert not steps.scheduler.has_work()


def test_a_stop_token_does_not_stop_before_min_tokens() -> None:
    steps = Steps(make_config(num_draft_tokens=3))
    steps.add("a", LOOP, max_tokens=20, min_tokens=3, stop_token_ids=(4, 5))
    steps.step(3)
    outputs = steps.step(4, 5, 1, 2)[1]
    assert new_tokens(outputs) == [4, 5]  # the third output token may stop, the second may not
    assert outputs[-1].stop_token_id == 5


@pytest.mark.parametrize(("max_tokens", "run"), [(2, [3]), (3, [3, 4]), (4, [3, 4, 5])])
def test_nothing_is_computed_beyond_the_end(max_tokens: int, run: list[int]) -> None:
    steps = Steps(make_config(num_draft_tokens=3))
    steps.add("a", LOOP, max_tokens=max_tokens)
    steps.step(3)
    plan, outputs = steps.step(*[4, 5, 1][: len(run)])
    assert [found.token_ids for found in plan.draft_runs] == [run]
    assert new_tokens(outputs) == [4, 5, 1][: len(run)]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_guesses_share_the_rows_that_are_left() -> None:
    steps = Steps(make_config(num_draft_tokens=4, max_num_seqs=8, max_num_batched_tokens=64))
    for name in "abc":
        steps.add(name, LOOP, max_tokens=20)
    steps.step(3, 3, 3)
    plan = steps.step(*[0] * 8)[0]
    assert [len(run.token_ids) for run in plan.draft_runs] == [3, 3, 2]


def test_who_guesses_badly_guesses_less() -> None:
    seq = Sequence(make_request("a", [1, 2, 1, 2]), 1, 1000, frozenset())
    speculation, lengths = Speculation(7, SchedulerStats()), []
    for right in (2, 0, 0, 1, 3, 7, 7):
        (run,) = speculation.draft([seq], 99, lambda _, count: count)
        guesses = run.token_ids[1:]
        lengths.append(len(guesses))
        found = [*guesses[:right], *([9] * (8 - right))][: len(run.token_ids)]
        speculation.verify([run], [seq] * len(found), found)
    assert lengths == [7, 5, 1, 1, 3, 7, 7]


def test_a_full_batch_and_a_full_budget_leave_no_guess() -> None:
    steps = Steps(make_config(num_draft_tokens=4, max_num_seqs=2))
    for name in "ab":
        steps.add(name, LOOP, max_tokens=20)
    steps.step(3, 3)
    assert [len(run.token_ids) for run in steps.step(4, 4)[0].draft_runs] == [1, 1]
    steps = Steps(make_config(num_draft_tokens=4, max_num_batched_tokens=8))
    steps.add("a", LOOP, max_tokens=20)
    steps.step(3)
    steps.add("b", [*LOOP, *LOOP], max_tokens=20)  # its prefill takes what the budget leaves
    plan = steps.step(4)[0]
    assert [len(run.token_ids) for run in plan.draft_runs] == [1] and len(plan.chunks[0].token_ids) == 7


@pytest.mark.parametrize(("num_blocks", "run", "new_blocks"), [(3, [3], 0), (4, [3, 4, 5], 1)])
def test_a_guess_takes_no_block_that_a_running_sequence_may_want(
    num_blocks: int, run: list[int], new_blocks: int
) -> None:
    # Block size 4: 8 positions are in the two blocks of the prompt, guesses need a third.
    steps = Steps(make_config(num_draft_tokens=2, num_blocks=num_blocks))
    steps.add("a", LOOP, max_tokens=4)
    steps.step(3)
    plan = steps.step(*[4, 5, 1][: len(run)])[0]
    assert [found.token_ids for found in plan.draft_runs] == [run]
    assert len(plan.new_blocks) == new_blocks


def test_penalised_requests_do_not_guess() -> None:
    steps = Steps(make_config(num_draft_tokens=3))
    steps.add("a", LOOP, max_tokens=20, presence_penalty=0.5)
    steps.step(3)
    assert steps.step(4)[0].draft_runs == [DraftRun(0, 7, [3])]


def test_speculation_allows_one_step_in_flight() -> None:
    scheduler = Scheduler(make_config(num_draft_tokens=3))
    scheduler.add(make_request("a", LOOP, max_tokens=20))
    scheduler.schedule()
    with pytest.raises(RuntimeError, match="one step in flight"):
        scheduler.schedule()
