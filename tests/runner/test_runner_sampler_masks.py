"""Grammars' masks: only allowed tokens are drawn, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from miniserve.core import Grammar, Request, RowStart, SamplingParams, TokenMasks
from miniserve.kernels import sampling
from miniserve.runner.sampler import Sampler
from miniserve.runner.sampling_masks import apply_masks

CPU = torch.device("cpu")
VOCAB = 77  # no multiple of 8 or 32
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)]


def masks_of(allowed: dict[int, list[int]], vocab_size: int = VOCAB) -> TokenMasks:
    words = np.zeros((len(allowed), -(-vocab_size // 32)), dtype="<u4")
    for mask, ids in zip(words, allowed.values(), strict=True):
        for token_id in ids:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return TokenMasks(list(allowed), bytearray(words.tobytes()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("longer", [0, 64])
def test_what_is_not_allowed_is_minus_infinity(device: torch.device, dtype: torch.dtype, longer: int) -> None:
    for allowed in ({1: [0, 31, 32, 76], 3: [5]}, {0: [7, 8], 1: [76], 2: [64], 3: list(range(VOCAB))}, {}):
        logits = torch.randn(4, VOCAB, dtype=dtype, device=device)
        want = logits.clone()
        for entry, ids in allowed.items():
            want[entry] = float("-inf")
            want[entry, ids] = logits[entry, ids]
        apply_masks(logits, masks_of(allowed, VOCAB + longer))
        assert torch.equal(logits, want)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "completed"])
def test_masked_rows_draw_what_is_allowed_and_the_others_what_they_would(temperature: float, split: bool) -> None:
    """`split`: a graph has drawn for rows that need nothing else. Logprobs stay those of the raw logits."""
    sampler = Sampler(8, VOCAB, CPU, frozenset({9}), draw=sampling.draw)
    plain = Sampler(8, VOCAB, CPU, frozenset({9}), draw=sampling.draw)
    grammar = Grammar("regex", "x")
    for row in range(6):
        mine = SamplingParams(
            temperature=temperature,
            seed=row,
            grammar=grammar if row % 2 else None,
            logprobs=1 if row in (1, 2) else None,
        )
        theirs = SamplingParams(temperature=temperature, seed=row, logprobs=mine.logprobs)
        for each, params in ((sampler, mine), (plain, theirs)):
            each.start_row(RowStart(row, Request(request_id=f"{row}", prompt_token_ids=[1], params=params), []))
    rows = [4, 1, 2, 5, 0, 3]
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(1))
    want = plain.sample(logits.clone(), rows)
    allowed = {1: [3, 70], 3: [11], 5: [40, 41, 42]}
    if split:
        got = sampler.complete(want.token_ids.clone(), logits.clone(), rows, masks=masks_of(allowed))
    else:
        got = sampler.sample(logits.clone(), rows, masks=masks_of(allowed))
    for entry in range(len(rows)):
        token = int(got.token_ids[entry])
        assert token in allowed[entry] if entry in allowed else token == int(want.token_ids[entry])
    assert got.logprobs is not None and got.num_logprobs == want.num_logprobs == (None, 1, 1, None, None, None)
    chosen = torch.log_softmax(logits, -1)[[1, 2], got.token_ids[[1, 2]]]
    assert torch.allclose(got.logprobs.logprobs, chosen, atol=1e-5)
