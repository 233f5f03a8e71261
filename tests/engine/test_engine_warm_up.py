from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_fakes import FakeRunner
from engine_real import CPU, MAX_LEN, Setup, make_backend, small_model

from miniserve.config import SchedulerConfig
from miniserve.core import Request, SamplingParams, Step
from miniserve.engine.build import warm_up
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.runner.runner import ModelRunner
from miniserve.runner.sampler import Sampler
from miniserve.runner.served import ServedModel
from miniserve.runner.state import StepState
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.step_cost import MIN_TOKENS, UNKNOWN_TOKENS, StepCost, StepShape

CONFIG = SchedulerConfig(
    num_blocks=256, block_size=16, max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=2048
)


class Timed(FakeRunner):
    """Steps take 4 ms, and 20 µs for each token of a chunk."""

    def launch(self, step: Step) -> None:
        step.record.device = 4e-3 + 2e-5 * (step.plan.num_tokens - len(step.plan.decode_rows))
        super().launch(step)


def test_it_tells_what_a_step_costs_and_leaves_no_row_taken() -> None:
    runner = Timed()
    cost = warm_up(runner, CONFIG, 2.0)
    assert 100 < cost.chunk_tokens(StepShape(8, 1000), 0) <= 200  # 4 ms are 200 tokens
    assert not runner._rows


@pytest.mark.parametrize(
    "config",
    [replace(CONFIG, max_num_seqs=1), replace(CONFIG, max_num_seqs=2, num_blocks=2), replace(CONFIG, num_blocks=1)],
    ids=["one row", "two blocks", "one block"],
)
def test_it_makes_do_with_little_room(config: SchedulerConfig) -> None:
    runner = Timed()
    cost = warm_up(runner, config, 2.0)
    assert MIN_TOKENS <= cost.chunk_tokens(StepShape(1, 1), 0) <= UNKNOWN_TOKENS
    assert not runner._rows


@torch.inference_mode()
def test_a_runner_serves_others_afterwards(tmp_path) -> None:  # type: ignore[no-untyped-def]
    setup = Setup()
    model = small_model(tmp_path, "Qwen3ForCausalLM", 0)

    def make_runner() -> ModelRunner:
        backend = make_backend(model, setup)
        caches = [backend.layout.allocate(spec, setup.num_blocks, CPU) for spec in model.attention_specs]
        return ModelRunner(
            ServedModel(model, backend, caches),
            StepState(setup.max_num_seqs, MAX_LEN, setup.block_size, CPU),
            Sampler(setup.max_num_seqs, model.config.vocab_size, CPU, frozenset(), seed=0),
        )

    config = replace(CONFIG, num_blocks=setup.num_blocks, max_num_seqs=setup.max_num_seqs, max_model_len=MAX_LEN)
    found = []
    for runner in (make_runner(), make_runner()):
        if found:
            warm_up(runner, config, 2.0)
        loop = EngineLoop(Scheduler(config, StepCost(2.0)), runner, StepLog(None, setup.max_num_seqs), overlap=False)
        for row in range(setup.max_num_seqs):
            params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
            loop.add(Request(request_id=str(row), prompt_token_ids=[row + 1, 5, 3], params=params))
        tokens: dict[str, list[int]] = {}
        while loop.has_work:
            for output in loop.step():
                tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
        found.append(tokens)
    assert found[0] == found[1] and len(found[0]) == setup.max_num_seqs
