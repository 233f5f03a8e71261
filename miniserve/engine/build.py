"""Put an engine together: runner, scheduler and loop, from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name

from miniserve.config import EngineConfig, SchedulerConfig
from miniserve.core import EngineInfo, Request, Runner, SamplingParams, Step, StepPlan
from miniserve.engine.grammar import Matchers, Words
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.engine.tokenizer import open_tokenizer
from miniserve.models.config import load_model_config
from miniserve.models.generation_config import load_generation_defaults
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.step_cost import StepCost

_ROWS, _OUTPUT, _PROMPT = 8, 32, 1024  # rows that decode so many tokens, the last of them beside a prompt
_STEPS_ALONE = 8
_LARGE = 1 << 20  # bytes of a tokenizer.json

RUNNER_FACTORY = "miniserve.runner.ranks:build_ranks"
ProgressCallback = Callable[[str, int, int], None]
RunnerFactory = Callable[[EngineConfig, Path, str, ProgressCallback | None], tuple[Runner, EngineInfo]]


def build_engine(
    config: EngineConfig,
    source_path: Path,
    model_name: str,
    progress: ProgressCallback | None = None,
    runner_factory: str = RUNNER_FACTORY,
) -> tuple[EngineLoop, EngineInfo]:
    """Load the model at `source_path` and return an engine ready to step; takes as long as loading does.

    `runner_factory` is "module:function". Raises `UserError` for what the user can mend (no memory, wrong device, …).
    """
    factory: RunnerFactory = resolve_name(runner_factory)
    matchers = Matchers(partial(_words, config, source_path))
    preparing: list[Future[object]] = []

    def report(stage: str, done: int, total: int) -> None:
        if not preparing and _has_many_words(source_path):  # while the first of the weights are read
            preparing.append(matchers.prepare())
        if progress is not None:
            progress(stage, done, total)

    runner, info = factory(config, source_path, model_name, report)
    wait(preparing)  # it would stall steps, and change what they seem to cost
    settled = SchedulerConfig(
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        max_num_batched_tokens=info.max_num_batched_tokens,
        max_model_len=info.max_model_len,
        enable_prefix_caching=info.enable_prefix_caching,
        eos_token_ids=frozenset(info.eos_token_ids),
        num_draft_tokens=config.num_draft_tokens,
    )
    cost = StepCost(config.max_itl_ratio)
    if info.device != "cpu":  # which is too slow to try: its first requests show what steps cost
        cost = warm_up(runner, settled, config.max_itl_ratio)
    scheduler = Scheduler(settled, cost)
    log = StepLog(info.traffic, info.max_num_seqs)
    return EngineLoop(scheduler, runner, log, matchers, overlap=info.async_scheduling), info


def _words(config: EngineConfig, source_path: Path) -> Words:
    eos_token_ids = load_generation_defaults(source_path, config.generation_config).eos_token_ids
    vocab_size = load_model_config(source_path, weights=False).vocab_size
    return Words(open_tokenizer(source_path, config.load_format), vocab_size, eos_token_ids)


def _has_many_words(source_path: Path) -> bool:
    """Whether it takes more than a moment to make them ready for grammars."""
    file = source_path / "tokenizer.json"
    return file.is_file() and file.stat().st_size > _LARGE


def warm_up(runner: Runner, config: SchedulerConfig, max_ratio: float) -> StepCost:
    """Run a few made-up requests, which show what steps cost on this device: well under a second on a GPU."""
    drafts = min(config.num_draft_tokens, 1)  # with more the rows might be done before the prompt comes
    config = replace(config, enable_prefix_caching=False, eos_token_ids=frozenset(), num_draft_tokens=drafts)
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
    while (step := scheduler.schedule()) is not None:
        taken = taken.difference(step.plan.stops).union(start.row for start in step.plan.starts)
        runner.launch(step)
        runner.collect(step)
        scheduler.update(step)
        if step.record.device is not None:
            scheduler.observe(step, step.record.device)
        number += 1
        if number == _STEPS_ALONE:
            scheduler.add(_request("prompt", min(_PROMPT, longest - 1), 1))
    last = Step(StepPlan(sorted(taken), [], [], [], []))
    runner.launch(last)
    runner.collect(last)


def _request(name: str, prompt_len: int, max_tokens: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=[0] * prompt_len, params=params)
