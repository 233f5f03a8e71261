"""Samplers that have parts of the logits draw what one draws from all of them: the same numbers, so the same bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import ThreadGroup, run_ranks

from miniserve.core import Request, RowStart, SamplingParams
from miniserve.parallel.group import Alone, Group, shard_of
from miniserve.runner.logprobs import to_token_logprobs
from miniserve.runner.sampler import Sampler

torch.set_num_threads(1)
CPU = torch.device("cpu")
ROWS = 6
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    seed=st.integers(0, 3),
    top_k=st.sampled_from([0, 4]),
    top_p=st.sampled_from([1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.4]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    logit_bias=st.sampled_from([None, None, {2: 5.0, 0: -1.0}]),
    min_tokens=st.sampled_from([0, 2]),
    allowed_token_ids=st.sampled_from([None, None, (0, 3, 5)]),
    bad_words=st.sampled_from([(), (), ((4,), (1, 6))]),
    stop_token_ids=st.sampled_from([(), (1,)]),
    logprobs=st.sampled_from([None, None, 0, 3, 40]),
)
GREEDY = st.just(SamplingParams(temperature=0.0))
Steps = list[tuple[list[int], list[int] | None]]  # rows of each, and their positions where the host knows them


def drawn(params: list[SamplingParams], steps: Steps, logits: list[torch.Tensor], group: Group) -> list[object]:
    vocab_size = logits[0].shape[1]
    sampler = Sampler(ROWS, vocab_size, CPU, (0,), 7, group=group)
    for row, asked in enumerate(params):
        sampler.start_row(RowStart(row, Request(request_id=f"r{row}", prompt_token_ids=[row, 1], params=asked), []))
    found: list[object] = []
    for (rows, positions), whole in zip(steps, logits, strict=True):
        mine = whole[:, shard_of(group).part(vocab_size).held].contiguous()
        out = sampler.sample(mine, rows, positions)
        tokens = out.token_ids.tolist()
        found.append(tokens)
        if positions is None:
            found += [sampler.num_outputs.tolist(), sampler.last_tokens.tolist()]
        if out.logprobs is not None:
            found.append(to_token_logprobs(tokens, out.logprobs, out.num_logprobs))
    return found


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.integers(2, 5), st.sampled_from([7, 33, 300]), st.sampled_from([torch.float32, torch.bfloat16]))
def test_ranks_draw_what_one_process_draws(data: st.DataObject, size: int, vocab_size: int, dtype: torch.dtype) -> None:
    params = data.draw(st.lists(st.one_of(PARAMS, GREEDY), min_size=ROWS, max_size=ROWS))
    if data.draw(st.booleans()):
        params = [SamplingParams(temperature=0.0)] * ROWS
    rows = st.permutations(range(ROWS)).flatmap(lambda order: st.integers(1, ROWS).map(lambda n: order[:n]))
    steps: Steps = [(each, None) for each in data.draw(st.lists(rows, min_size=1, max_size=4))]
    if not any(each.penalised or each.bad_words for each in params):  # a draft run: a row several times
        row = data.draw(st.integers(0, ROWS - 1))
        steps.append(([row] * 3, [5, 6, 7]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = [torch.randn(len(each), vocab_size, generator=generator).mul_(2).to(dtype) for each, _ in steps]
    if data.draw(st.booleans()):  # many equals: the lowest id of all ranks counts
        logits = [each.round() for each in logits]
    want = drawn(params, steps, [each.clone() for each in logits], Alone())
    assert run_ranks(size, partial(drawn, params, steps, logits)) == [want] * size


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logits_go_to_the_owner_of_their_row_alone(temperature: float) -> None:
    """Drawn rows' logits move once, and nothing that all ranks get grows with the vocabulary."""
    vocab_size = 4001
    whole = torch.randn(ROWS, vocab_size)
    params = [SamplingParams(temperature=temperature, seed=row) for row in range(ROWS)]

    def moved(group: ThreadGroup) -> tuple[list[object], list[torch.Size], int]:
        owned, gathered = list[torch.Size](), list[int]()
        rows, gather = group.rows, group.gather

        def counted_rows(x: torch.Tensor, count: int) -> torch.Tensor:
            out = rows(x, count)
            owned.append(out.shape)
            return out

        def counted_gather(x: torch.Tensor) -> torch.Tensor:
            gathered.append(x.nbytes)
            return gather(x)

        group.rows, group.gather = counted_rows, counted_gather  # type: ignore[method-assign]
        return drawn(params, [([*range(ROWS)], None)], [whole], group), owned, sum(gathered)

    for rank, (found, owned, gathered) in enumerate(run_ranks(4, moved)):
        assert found == drawn(params, [([*range(ROWS)], None)], [whole.clone()], Alone())
        assert owned == ([(2 - rank // 2, vocab_size)] if temperature else [])
        assert gathered <= 16 * ROWS
