"""Steps whose last layer computes only the tokens that are read, beside steps that compute all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_real import BACKENDS, CPU, MAX_LEN, Setup, make_backend, small_model

from miniserve.core import Chunk, DraftRun, StepPlan
from miniserve.runner.served import ServedModel
from miniserve.runner.state import StepState

ROWS, BLOCKS = 8, 8  # a row's blocks follow one another
BLOCK_SIZE = MAX_LEN // BLOCKS


def tokens(count: int, first: int = 1) -> list[int]:
    return [(first + 7 * i) % 97 for i in range(count)]


def blocks_of(*rows: int) -> list[tuple[int, int, list[int]]]:
    return [(row, 0, [*range(1 + row * BLOCKS, 1 + (row + 1) * BLOCKS)]) for row in rows]


PLANS = [
    StepPlan([], [], blocks_of(0, 1, 2, 3), [], [Chunk(0, 0, tokens(50), False), Chunk(1, 0, tokens(21, 3), True)]),
    StepPlan([], [], [], [1], [Chunk(0, 50, tokens(30, 5), False), Chunk(2, 0, tokens(9), True)]),
    StepPlan([], [], [], [], [Chunk(3, 0, tokens(40), False)]),
    StepPlan([], [], [], [2, 1], [Chunk(3, 40, tokens(17, 2), True), Chunk(0, 80, tokens(3), True)]),
    StepPlan([], [], [], [], [Chunk(3, 57, tokens(30), True)], [DraftRun(0, 83, tokens(3)), DraftRun(1, 23, [4])]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["linear", "shuffled"])
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"]
)
def test_tokens_that_are_read_have_their_states_and_all_have_keys(
    architecture: str, layout: str, backend: str, tmp_path: Path
) -> None:
    model = small_model(tmp_path, architecture, 1)
    paths = make_backend(model, Setup(backend=backend, layout=layout, block_size=BLOCK_SIZE))
    served = [
        ServedModel(
            model, paths, [paths.layout.allocate(spec, 1 + ROWS * BLOCKS, CPU) for spec in model.attention_specs]
        )
        for _ in range(2)
    ]
    state, last_tokens = StepState(ROWS, MAX_LEN, BLOCK_SIZE, CPU), torch.arange(ROWS) + 3
    with torch.inference_mode():
        for plan in PLANS:
            inputs = state.prepare(plan, last_tokens)
            read = state.read_tokens(plan, inputs)
            assert read is not None
            assert len(read.indices) == len(plan.sampling_rows) or (len(read.indices) == 1 and not plan.sampling_rows)
            every = served[0].hidden(inputs.input_ids, inputs.positions, inputs.batch)
            some = served[1].hidden(inputs.input_ids, inputs.positions, replace(inputs.batch, read=read))
            torch.testing.assert_close(some, every[read.indices], atol=2e-5, rtol=1e-4)
            for ours, theirs in zip(served[1].caches, served[0].caches, strict=True):
                torch.testing.assert_close(ours.key, theirs.key, atol=0, rtol=0)
                torch.testing.assert_close(ours.value, theirs.value, atol=0, rtol=0)


def test_all_is_computed_where_prompt_tokens_or_most_tokens_are_read() -> None:
    state = StepState(ROWS, MAX_LEN, BLOCK_SIZE, CPU)
    plans = [
        StepPlan([], [], blocks_of(0), [], [Chunk(0, 0, tokens(20), True, tokens(19))]),
        StepPlan([], [], blocks_of(1), [0], [Chunk(1, 0, tokens(2), True)]),
        StepPlan([], [], [], [0, 1], []),
        StepPlan([], [], blocks_of(2), [], [Chunk(2, 0, tokens(9), True)], [DraftRun(0, 21, tokens(ROWS))]),
    ]
    for plan in plans:
        assert state.read_tokens(plan, state.prepare(plan, torch.zeros(ROWS, dtype=torch.int64))) is None
