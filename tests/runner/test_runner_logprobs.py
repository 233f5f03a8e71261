"""Log-probabilities against float64, and their exact agreements."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from miniserve.runner.logprobs import LOWEST_LOGPROB, gather_logprobs, rows_per_chunk, to_token_logprobs

torch.set_num_threads(1)


@pytest.mark.parametrize(("num_rows", "vocab_size", "k"), [(1, 5, 5), (7, 5, 20), (40, 1000, 3), (30, 151936, 20)])
def test_equals_float64(num_rows, vocab_size, k):
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(num_rows, vocab_size, generator=generator) * 4
    token_ids = torch.randint(0, vocab_size, (num_rows,), generator=generator)
    token_ids[0] = logits[0].argmax()
    before = logits.clone()
    found = gather_logprobs(logits, token_ids, k)
    assert torch.equal(logits, before)
    exact = logits.double().log_softmax(-1)
    order = logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    torch.testing.assert_close(found.logprobs.double(), exact.gather(1, token_ids[:, None])[:, 0], atol=2e-6, rtol=1e-6)
    assert torch.equal(found.top_ids, order)
    torch.testing.assert_close(found.top_logprobs.double(), exact.gather(1, order), atol=2e-6, rtol=1e-6)
    assert found.ranks.tolist() == [
        int((row > row[token]).sum()) + 1 for row, token in zip(logits, token_ids, strict=True)
    ]
    assert found.ranks[0] == 1
    assert found.logprobs.dtype == found.top_logprobs.dtype == torch.float32


def test_chosen_token_has_the_same_float_among_the_best():
    logits = torch.randn(200, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    for place in (0, 1, 4):
        token_ids = logits.float().sort(dim=-1, descending=True, stable=True).indices[:, place]
        found = gather_logprobs(logits, token_ids, 5)
        assert torch.equal(found.top_ids[:, place], token_ids)
        assert torch.equal(found.top_logprobs[:, place], found.logprobs)


def test_rows_do_not_depend_on_their_neighbours_or_the_chunk():
    logits = torch.randn(3 * rows_per_chunk(70001, torch.device("cpu")) + 2, 70001) * 5
    token_ids = torch.arange(len(logits)) * 17
    together = gather_logprobs(logits, token_ids, 4)
    for row in (0, 30, len(logits) - 1):
        alone = gather_logprobs(logits[row : row + 1], token_ids[row : row + 1], 4)
        assert torch.equal(alone.logprobs[0], together.logprobs[row])
        assert torch.equal(alone.top_logprobs[0], together.top_logprobs[row])
        assert torch.equal(alone.top_ids[0], together.top_ids[row])
        assert alone.ranks[0] == together.ranks[row]


def test_impossible_tokens_are_clamped():
    logits = torch.tensor([[0.0, float("-inf"), float("-inf")], [0.0, -30000.0, 1.0]])
    found = gather_logprobs(logits, torch.tensor([1, 1]), 3)
    assert found.logprobs.tolist() == [LOWEST_LOGPROB, LOWEST_LOGPROB]
    assert found.ranks.tolist() == [2, 3]
    assert found.top_logprobs[0].tolist() == [0.0, LOWEST_LOGPROB, LOWEST_LOGPROB]
    assert math.isclose(found.top_logprobs[1, 0].item(), -math.log(1 + math.exp(-1)), rel_tol=1e-6)


def test_no_rows_and_no_alternatives():
    empty = gather_logprobs(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), 3)
    assert empty.logprobs.shape == (0,) and empty.top_ids.shape == (0, 3)
    alone = gather_logprobs(torch.zeros(2, 10), torch.tensor([4, 5]), 0)
    assert alone.top_ids.shape == alone.top_logprobs.shape == (2, 0)
    np.testing.assert_allclose(alone.logprobs.numpy(), -math.log(10), rtol=1e-6)


def test_entries_are_cut_to_what_each_request_asked_for():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    tensors = gather_logprobs(logits, torch.tensor([1, 3]), 3)
    entries = to_token_logprobs([9, 1, 3], tensors, [None, 0, 2])
    assert entries[0] is None
    assert (entries[1].token_id, entries[1].rank, entries[1].top_ids, entries[1].top_logprobs) == (1, 2, [], [])
    assert (entries[2].token_id, entries[2].rank, entries[2].top_ids) == (3, 1, [3, 2])
    assert entries[2].logprob == entries[2].top_logprobs[0]
    with pytest.raises(ValueError, match="zip"):
        to_token_logprobs([9], tensors, [0, 0])
