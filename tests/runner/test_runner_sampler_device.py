"""A GPU's draw within the sampler, against PyTorch's: in steps that the sampler ends and in steps that a graph ends."""

from __future__ import annotations

import pytest
import torch
import triton_support
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.core import Request, RowStart, SamplingParams
from miniserve.kernels.step_tensors import RowState
from miniserve.kernels.triton.sampling import compile_draw, draw, sample
from miniserve.runner.logprobs import to_token_logprobs
from miniserve.runner.sampler import SampleOutput, Sampler

ROWS, VOCAB, EOS, CPU = 6, 300, 2, torch.device("cpu")
DEVICE = triton_support.DEVICE

PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-6, 0.5, 1.7]),
    top_k=st.sampled_from([0, 1, 7, 150]),
    top_p=st.sampled_from([1.0, 0.9173]),
    min_p=st.sampled_from([0.0, 0.053]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.7]),
    logit_bias=st.sampled_from([None, None, {3: 4.0, 0: -100.0}]),
    min_tokens=st.sampled_from([0, 0, 2]),
    max_tokens=st.just(16),
    logprobs=st.sampled_from([None, None, 0, 3]),
)
UNFILTERED = st.builds(SamplingParams, temperature=st.sampled_from([0.0, 0.8]), logprobs=st.sampled_from([None, 2]))


class Graph:
    """What a graph does at the end of a step: draws for the rows that want no logits, and hands their tokens over; or
    draws at the positions that it is told."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        nothing = torch.zeros(0, device=DEVICE)
        self.state = RowState(nothing, nothing, sampler.last_tokens, sampler.num_outputs)

    def step(self, logits: torch.Tensor, rows: list[int], positions: list[int] | None = None) -> SampleOutput:
        self.sampler.upload()
        padded = torch.tensor([*rows, -1], device=DEVICE)
        logits = torch.cat([logits, torch.zeros_like(logits[:1])])
        tokens, left = torch.zeros_like(padded), torch.full_like(logits, float("nan"))
        params = self.sampler.params
        if positions is None:
            sample(logits, padded, params, tokens, self.state, undrawn=left)
        else:
            num_outputs = torch.tensor([*positions, 0], device=DEVICE) + 1 - params.prompt_lens[padded.clamp(min=0)]
            sample(logits, padded, params, tokens, num_outputs=num_outputs, undrawn=left)
        return self.sampler.complete(tokens[:-1], left[:-1], rows, positions)


def check(output: SampleOutput, expected: SampleOutput) -> None:
    tokens = expected.token_ids.tolist()
    assert output.token_ids.tolist() == tokens
    assert output.num_logprobs == expected.num_logprobs
    assert (output.logprobs is None) == (expected.logprobs is None)
    if output.logprobs is None or expected.logprobs is None:
        return
    for found, wanted in zip(
        to_token_logprobs(tokens, output.logprobs, output.num_logprobs),
        to_token_logprobs(tokens, expected.logprobs, expected.num_logprobs),
        strict=True,
    ):
        assert (found is None) == (wanted is None)
        if found is not None and wanted is not None:
            assert (found.token_id, found.rank, found.top_ids) == (wanted.token_id, wanted.rank, wanted.top_ids)
            assert [found.logprob, *found.top_logprobs] == pytest.approx([wanted.logprob, *wanted.top_logprobs])


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16]),
    data=st.data(),
    params=st.lists(PARAMS | UNFILTERED, min_size=1, max_size=4),
)
def test_steps_end_alike_in_pytorch_in_kernels_and_in_graphs(
    dtype: torch.dtype, data: st.DataObject, params: list[SamplingParams]
) -> None:
    torch_sampler = Sampler(ROWS, VOCAB, CPU, (EOS,))
    eager, in_graph, told_positions = (Sampler(ROWS, VOCAB, DEVICE, (EOS,), draw=draw) for _ in range(3))
    graph, explicit_graph = Graph(in_graph), Graph(told_positions)
    rows = data.draw(st.permutations(range(ROWS)))[: len(params)]
    for row, asked in zip(rows, params, strict=True):
        request = Request(request_id=f"request {row}", prompt_token_ids=[1, 2, 3], params=asked)
        for sampler in (torch_sampler, eager, in_graph, told_positions):
            sampler.start_row(RowStart(row, request, [5] * (row % 2)))
    for step in range(2):
        logits = (torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(step)) * 2).to(dtype)
        expected = torch_sampler.sample(logits.clone(), rows)
        check(eager.sample(logits.to(DEVICE, copy=True), rows), expected)
        check(graph.step(logits.to(DEVICE), rows), expected)
        positions = [2 + row % 2 + step for row in rows]
        check(explicit_graph.step(logits.to(DEVICE), rows, positions), expected)
        for sampler in (eager, in_graph):
            assert sampler.last_tokens.tolist() == torch_sampler.last_tokens.tolist()
            assert sampler.num_outputs.tolist() == torch_sampler.num_outputs.tolist()


def test_a_row_that_is_taken_again_is_drawn_by_its_new_request() -> None:
    sampler = Sampler(2, VOCAB, DEVICE, (EOS,), draw=draw)
    compile_draw(VOCAB, torch.float16, sampler.params)  # draws for nobody
    graph = Graph(sampler)
    logits = torch.zeros(1, VOCAB, device=DEVICE)
    logits[0, 9] = 3.0
    for params, expected in (
        (SamplingParams(temperature=0.0, logprobs=0), {9}),
        (SamplingParams(temperature=5.0, top_k=40, seed=1), set(range(41))),
        (SamplingParams(temperature=0.0), {9}),
    ):
        sampler.start_row(RowStart(1, Request(request_id="a", prompt_token_ids=[1], params=params), []))
        found = graph.step(logits, [1])
        assert found.token_ids.tolist()[0] in expected
        assert (found.logprobs is None) == (params.logprobs is None)
        sampler.stop_row(1)
