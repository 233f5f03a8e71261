"""Decode graphs without a GPU: what they would record runs each time instead, its Triton kernels in the interpreter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from engine_real import (
    CPU,
    MAX_LEN,
    Setup,
    generate,
    make_backend,
    make_matchers,
    read_model,
    small_model,
    tokens,
    write_model,
)
from thread_ranks import one_kernel_at_a_time, run_ranks

from miniserve.attention.metadata import StepBatch
from miniserve.config import SchedulerConfig
from miniserve.core import Grammar, SamplingParams, StepPlan, TokenMasks
from miniserve.engine.loop import EngineLoop
from miniserve.engine.step_log import StepLog
from miniserve.kernels.step_tensors import RowState
from miniserve.kernels.triton.sampling import draw
from miniserve.models.decoder import CausalLM
from miniserve.parallel.group import Alone, Group
from miniserve.runner.decode_graph import DecodeGraphs
from miniserve.runner.runner import ModelRunner
from miniserve.runner.sampler import Sampler
from miniserve.runner.served import ServedModel
from miniserve.runner.state import GraphInputs, StepState
from miniserve.scheduler.scheduler import Scheduler

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU records them: tests/engine/test_engine_gpu.py")
ROWS, BLOCKS = 8, 40


class Unrecorded(DecodeGraphs):
    def greedy(self, bucket: int, inputs: GraphInputs) -> torch.Tensor:
        self._greedy[bucket] = SimpleNamespace(replay=lambda: self._take_argmax(self._run(bucket)))  # type: ignore[assignment]
        return super().greedy(bucket, inputs)

    def drawn(self, bucket: int, inputs: GraphInputs) -> tuple[torch.Tensor, torch.Tensor]:
        self._drawn[bucket] = SimpleNamespace(replay=lambda: self._draw(self._run(bucket)))  # type: ignore[assignment]
        return super().drawn(bucket, inputs)

    def masked(self, masks: TokenMasks) -> torch.Tensor | None:
        bucket, _ = self._rows
        self._masked[bucket] = SimpleNamespace(replay=lambda: self._draw_masked(bucket))  # type: ignore[assignment]
        return super().masked(masks)


def make_engine(
    model: CausalLM, layout: str, num_draft_tokens: int, *, graphs: bool, overlap: bool = False
) -> EngineLoop:
    backend = make_backend(model, Setup(layout=layout))
    caches = [backend.layout.allocate(spec, BLOCKS, CPU) for spec in model.attention_specs]
    served = ServedModel(model, backend, caches)
    state = StepState(ROWS, MAX_LEN, 16, CPU)
    if graphs:
        sampler = Sampler(ROWS, model.config.vocab_size, CPU, frozenset({7}), draw=draw, group=model.options.group)
        rows = RowState(state.tables, state.lens, sampler.last_tokens, sampler.num_outputs)
        recorded: DecodeGraphs | None = Unrecorded(
            served,
            rows,
            sampler.params,
            block_size=16,
            max_seq_len=MAX_LEN,
            buckets=range(1, ROWS + 1),  # no padding, which this backend would write
            num_draft_tokens=num_draft_tokens,
        )
    else:
        sampler, recorded = Sampler(ROWS, model.config.vocab_size, CPU, frozenset({7})), None
    config = SchedulerConfig(
        num_blocks=BLOCKS,
        block_size=16,
        max_num_seqs=ROWS,
        max_num_batched_tokens=64,
        max_model_len=MAX_LEN,
        eos_token_ids=frozenset({7}),
        num_draft_tokens=num_draft_tokens,
    )
    runner = ModelRunner(served, state, sampler, recorded)
    matchers = make_matchers(model.config.vocab_size, config.eos_token_ids)
    return EngineLoop(Scheduler(config), runner, StepLog(None, ROWS), matchers, overlap=overlap)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> CausalLM:
    return small_model(tmp_path_factory.mktemp("model"), "Qwen3ForCausalLM", 4)


def without_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def unpinned(*shape: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*shape, **options)

    monkeypatch.setattr(torch, "empty", unpinned)


@pytest.mark.parametrize(("layout", "num_draft_tokens"), [("linear", 3), ("shuffled", 0)])
def test_graphs_give_the_tokens_of_eager_steps(
    model: CausalLM, layout: str, num_draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pinned_memory(monkeypatch)
    fresh, hidden = set(), ServedModel.hidden

    def watched(self: ServedModel, ids: torch.Tensor, positions: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        fresh.update([] if batch.decode is None or batch.chunks else [batch.decode.fresh])
        return hidden(self, ids, positions, batch)

    monkeypatch.setattr(ServedModel, "hidden", watched)
    stem = [3, 9, 4, 17, 5, 3, 9, 4, 17, 6, 3, 9, 4]
    requests = [
        ([*stem, n], SamplingParams(temperature=temperature, seed=n, max_tokens=24, min_tokens=n, logprobs=logprobs))
        for n, (temperature, logprobs) in enumerate([(0.0, None), (0.0, None), (0.8, 1), (0.0, 0)])
    ]
    grammar = Grammar("regex", "[0-9a-c]{20}")
    requests += [
        ([*stem, 4], SamplingParams(temperature=0.0, max_tokens=24, grammar=grammar, logprobs=1)),
        ([*stem, 5], SamplingParams(seed=5, max_tokens=24, grammar=grammar)),
    ]
    arrivals = [0, 3, 9, 30, 2, 2]
    want = generate(make_engine(model, layout, 0, graphs=False), requests, arrivals)
    assert fresh == {None}, "eager steps have no kernel in between that others need not wait for"
    fresh.clear()
    engine = make_engine(model, layout, num_draft_tokens, graphs=True)
    got = generate(engine, requests, arrivals)
    assert [tokens(outputs) for outputs in got] == [tokens(outputs) for outputs in want]
    assert (engine.stats.num_accepted_tokens > 0) == (num_draft_tokens > 0)
    assert fresh == {num_draft_tokens + 1}


@pytest.mark.parametrize(("num_draft_tokens", "overlap"), [(0, False), (0, True), (3, False)])
def test_masked_rows_are_drawn_by_graphs_beside_others(
    model: CausalLM, num_draft_tokens: int, overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that asks for logprobs comes and goes: the host's sampler draws beside it. A grammar ends, and its row."""
    without_pinned_memory(monkeypatch)
    letters, short = Grammar("regex", "[0-9a-c]{20}"), Grammar("regex", "[a-z]{5}")
    drawn: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "grammar": letters},
        {"seed": 2, "grammar": letters},
        {"seed": 3, "top_k": 5},
        {"seed": 4, "top_p": 0.8, "grammar": short},
        {"seed": 5, "logprobs": 1, "max_tokens": 6},
    ]
    requests = [([3, 9, n], SamplingParams(**{"max_tokens": 16, **each})) for n, each in enumerate(drawn)]
    arrivals = [0, 0, 2, 2, 2, 8]
    want = generate(make_engine(model, "linear", 0, graphs=False), requests, arrivals)
    with mock.patch.object(Unrecorded, "masked", autospec=True, side_effect=Unrecorded.masked) as masked:
        engine = make_engine(model, "linear", num_draft_tokens, graphs=True, overlap=overlap)
        got = generate(engine, requests, arrivals)
    assert [tokens(outputs) for outputs in got] == [tokens(outputs) for outputs in want]
    assert masked.call_count > 5


@pytest.mark.parametrize("num_draft_tokens", [0, 3])
def test_graphs_of_ranks_draw_together(
    model: CausalLM, num_draft_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pinned_memory(monkeypatch)
    one_kernel_at_a_time(monkeypatch)
    write_model(tmp_path, "Qwen3ForCausalLM", 4, num_attention_heads=4, num_key_value_heads=2, hidden_size=48)
    stem = [3, 9, 4, 17, 5, 3, 9, 4, 17, 6, 3, 9, 4]
    requests = [
        ([*stem, n], SamplingParams(temperature=temperature, seed=n, max_tokens=8, min_tokens=n, logprobs=logprobs))
        for n, (temperature, logprobs) in enumerate([(0.0, None), (0.0, None), (0.8, 1), (0.7, None)])
    ]
    arrivals = [0, 2, 4, 5]  # greedy rows alone at first

    def found(group: Group, graphs: bool = True) -> list[list[int]]:
        engine = make_engine(read_model(tmp_path, group=group), "linear", num_draft_tokens, graphs=graphs)
        return [tokens(outputs) for outputs in generate(engine, requests, arrivals)]

    want = found(Alone(), graphs=False)
    together = DecodeGraphs._draw_together
    with mock.patch.object(DecodeGraphs, "_draw_together", autospec=True, side_effect=together) as drawn:
        assert run_ranks(3, found) == [want] * 3
    assert drawn.call_count


def test_padding_rows_come_last(model: CausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may spoil the rows behind one without keys, as aiter's persistent MLA does: only padding has none."""
    without_pinned_memory(monkeypatch)
    backend = make_backend(model, Setup(layout="linear"))
    caches = [backend.layout.allocate(spec, BLOCKS, CPU) for spec in model.attention_specs]
    state = StepState(ROWS, MAX_LEN, 16, CPU)
    sampler = Sampler(ROWS, model.config.vocab_size, CPU, frozenset(), draw=draw)
    rows = RowState(state.tables, state.lens, sampler.last_tokens, sampler.num_outputs)
    sizes = {"block_size": 16, "max_seq_len": MAX_LEN, "buckets": [4, ROWS], "num_draft_tokens": 0}
    graphs = Unrecorded(ServedModel(model, backend, caches), rows, sampler.params, **sizes)
    lens: list[list[int]] = []

    def watched(self: ServedModel, ids: torch.Tensor, positions: torch.Tensor, batch: StepBatch) -> torch.Tensor:
        assert batch.decode is not None
        lens.append(batch.decode.seq_lens.tolist())
        return torch.zeros(len(ids), model.config.vocab_size)

    monkeypatch.setattr(ServedModel, "logits", watched)
    state.lens.copy_(torch.arange(10, 10 + ROWS))
    for bucket, active in ((4, [3, 0]), (4, [5]), (ROWS, [7, 1, 2, 6, 4]), (4, [0, 1, 2, 3])):
        nothing = state.prepare_graph(StepPlan([], [], [], [], []))
        graphs.greedy(bucket, replace(nothing, rows=active))
    assert [[length > 0 for length in each] for each in lens] == [
        [True, True, False, False],
        [True, False, False, False],
        [True] * 5 + [False] * 3,
        [True] * 4,
    ]
