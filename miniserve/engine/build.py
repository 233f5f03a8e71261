"""Put an engine together: runner, scheduler and loop, from the configuration."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from miniserve.config import EngineConfig, SchedulerConfig
from miniserve.core import EngineInfo, Runner
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.engine.warm_up import warm_up
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.step_cost import StepCost

RUNNER_FACTORY = "miniserve.runner.build:build_runner"
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
    module_name, _, function_name = runner_factory.partition(":")
    factory: RunnerFactory = getattr(importlib.import_module(module_name), function_name)
    runner, info = factory(config, source_path, model_name, progress)
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
    return EngineLoop(scheduler, runner, log, overlap=info.async_scheduling), info
