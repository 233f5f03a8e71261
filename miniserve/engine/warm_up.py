"""A few made-up requests before there are others: they compile the kernels of steps with chunks, and tell what such
steps cost on this device."""

from __future__ import annotations

from dataclasses import replace

from miniserve.config import SchedulerConfig
from miniserve.core import Request, Runner, SamplingParams, StepPlan
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.step_cost import StepCost

_ROWS, _OUTPUT, _PROMPT = 8, 32, 1024  # rows that decode so many tokens, the last of them beside a prompt
_STEPS_ALONE = 8


def warm_up(runner: Runner, config: SchedulerConfig, max_ratio: float) -> StepCost:
    """Run them; well under a second on a GPU, and a few more where kernels are compiled for the first time."""
    drafts = min(config.num_draft_tokens, 1)  # with more the rows might be done before the prompt comes
    config = replace(config, enable_prefix_caching=False, eos_token_ids=frozenset(), num_draft_tokens=drafts)
    for _ in range(2):  # in the first round times are those of the compiler
        cost = StepCost(max_ratio)
        _run(runner, Scheduler(config, cost), config)
    return cost


def _run(runner: Runner, scheduler: Scheduler, config: SchedulerConfig) -> None:
    rows = min(_ROWS, config.max_num_seqs - 1)
    longest = min(config.max_model_len, config.num_blocks // (rows + 1) * config.block_size)
    if rows == 0 or longest < 2:
        return
    for row in range(rows):
        scheduler.add(_request(f"row {row}", 1, min(_OUTPUT, longest - 1)))
    taken: set[int] = set()
    number = 0
    while (plan := scheduler.schedule()) is not None:
        taken = taken.difference(plan.stops).union(start.row for start in plan.starts)
        result = runner.collect(runner.launch(plan))
        scheduler.update(plan, result)
        if result.device is not None and result.device.seconds is not None:
            scheduler.note_seconds(result.device.seconds)
        number += 1
        if number == _STEPS_ALONE:
            scheduler.add(_request("prompt", min(_PROMPT, longest - 1), 1))
    runner.collect(runner.launch(StepPlan(sorted(taken), [], [], [], [])))


def _request(name: str, prompt_len: int, max_tokens: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=[0] * prompt_len, params=params)
