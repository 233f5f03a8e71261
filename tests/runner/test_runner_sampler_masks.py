"""Grammars' masks: only allowed tokens are drawn, and nothing else changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_support import DEVICE, NATIVE

from miniserve.core import Grammar, Request, RowStart, SamplingParams, TokenMasks
from miniserve.kernels import native, sampling
from miniserve.kernels.sampling import Draw, RowMasks, RowParams
from miniserve.kernels.triton import sampling as triton_sampling
from miniserve.runner.sampler import Sampler
from miniserve.runner.sampling_masks import MaskRoom, masks_within, row_masks

CPU = torch.device("cpu")
VOCAB = 77  # no multiple of 8 or 32
WAYS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(bool(native.unavailable_reason()), reason="no C++ compiler")),
    pytest.param("triton", marks=[pytest.mark.gpu] if NATIVE else []),
]


def draws() -> dict[str, tuple[Draw, torch.device]]:
    """And the device of each."""
    found: dict[str, tuple[Draw, torch.device]] = {"torch": (sampling.draw, CPU)}
    if not native.unavailable_reason():
        found["native"] = (native.NativeKernels(1).draw, CPU)
    return found | {"triton": (triton_sampling.draw, DEVICE)}


def masks_of(allowed: dict[int, list[int]], vocab_size: int = VOCAB) -> TokenMasks:
    words = np.zeros((len(allowed), -(-vocab_size // 32)), dtype="<u4")
    for mask, ids in zip(words, allowed.values(), strict=True):
        for token_id in ids:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)
    return TokenMasks(list(allowed), bytearray(words.tobytes()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [32, VOCAB, 4200])
def test_what_is_not_allowed_is_minus_infinity(way: str, dtype: torch.dtype, vocab_size: int) -> None:
    """And what is drawn then is what would be drawn from those logits, whatever else the rows ask for."""
    draw, device = draws()[way]
    last, rows = vocab_size - 1, torch.tensor([2, 0, 3, 1], device=device)
    params = RowParams(
        torch.arange(4, device=device) * 7919,
        torch.ones(4, dtype=torch.int64, device=device),
        torch.tensor([[0.0, 0, 1, 0, 1], [1, 0, 1, 0, 1], [0.7, 3, 1, 0, 1], [1, 0, 0.9, 0.01, 0]], device=device),
    )
    num_outputs = torch.arange(4, device=device)
    for seed, longer in itertools.product(range(3), (0, 64)):
        logits = (3 * torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(seed))).to(device, dtype)
        for allowed in ({1: [0, 31, 30, last], 3: [5]}, {0: [7, 8], 1: [last], 2: [6], 3: list(range(last))}, {}):
            want = logits.clone()
            for entry, ids in allowed.items():
                want[entry] = float("-inf")
                want[entry, ids] = logits[entry, ids]
            masks = row_masks(masks_of(allowed, vocab_size + longer), 4, device)
            assert (masks is None) == (not allowed)
            got = logits.clone()
            tokens = draw(got, rows, params, num_outputs, masks)
            assert torch.equal(got, want)
            assert torch.equal(tokens, draw(want, rows, params, num_outputs))
            assert all(int(tokens[entry]) in ids for entry, ids in allowed.items())


def test_the_masks_of_a_part_of_the_rows() -> None:
    allowed = {1: [3], 4: [5], 5: [6, 7], 8: [9]}
    assert masks_within(masks_of(allowed), slice(4, 8)) == masks_of({0: [5], 1: [6, 7]})
    assert masks_within(masks_of(allowed), slice(2, 4)) == masks_of({})


@pytest.mark.parametrize("device", [pytest.param(DEVICE, marks=[pytest.mark.gpu] if NATIVE else [])])
def test_a_room_holds_the_masks_of_the_latest_step(device: torch.device) -> None:
    room = MaskRoom(5, VOCAB, device)
    some, all_rows = {1: [0, 31, 76], 2: [40]}, {entry: [3 * entry] for entry in range(5)}
    # The same rows again, others, more of them, none, in batches of other sizes; masks of a tokenizer with more words.
    for allowed, batch, longer in (
        (some, 4, 0), ({1: [5], 2: [6]}, 4, 0), (some, 3, 64), (all_rows, 5, 0), ({}, 5, 0), ({0: [7]}, 1, 0)
    ):  # fmt: skip
        masks = masks_of(allowed, VOCAB + longer)
        room.take(masks, batch)
        want, got = torch.zeros(2, batch, VOCAB, device=device)
        if (expected := row_masks(masks, batch, device)) is not None:
            sampling.forbid(want, expected)
        sampling.forbid(got, RowMasks(room.masks.bits, room.masks.places[:batch]))
        assert torch.equal(got, want)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_it_does_not_matter_whether_a_mask_or_the_edits_come_first(data: st.DataObject) -> None:
    """The order that vLLM has, the mask first, is by definition the one here."""
    asked = SamplingParams(
        grammar=Grammar("regex", "x"),
        seed=data.draw(st.integers(0, 99)),
        temperature=data.draw(st.sampled_from([0.0, 1.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 0.5, 1.7])),
        frequency_penalty=data.draw(st.sampled_from([0.0, -2.0, 1.5])),
        presence_penalty=data.draw(st.sampled_from([0.0, 0.7])),
        logit_bias=data.draw(st.sampled_from([None, {3: 100.0, 11: -100.0, 70: 50.0}])),
        allowed_token_ids=data.draw(st.sampled_from([None, (3, 5, 11, 12, 70)])),
        bad_words=data.draw(st.sampled_from([(), ((3,), (5, 70))])),
        min_tokens=data.draw(st.sampled_from([0, 5])),
        logprobs=data.draw(st.sampled_from([None, 2])),
    )
    logits = 4 * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    ids = data.draw(st.sets(st.sampled_from([3, 5, 11, 12, 70, 9]), min_size=4))
    masked = logits.clone()
    masked[0, [token for token in range(VOCAB) if token not in ids]] = float("-inf")
    found = []
    for given_logits, masks in ((logits.clone(), masks_of({0: sorted(ids)})), (masked, None)):
        sampler = Sampler(2, VOCAB, CPU, frozenset({9}))
        sampler.start_row(RowStart(1, Request(request_id="0", prompt_token_ids=[3, 5], params=asked), [5]))
        found.append(sampler.sample(given_logits, [1], None, masks))
    assert torch.equal(found[0].token_ids, found[1].token_ids)
    if asked.logprobs is not None and found[0].logprobs is not None:
        assert torch.allclose(found[0].logprobs.logprobs, logits.log_softmax(-1)[0, found[0].token_ids])


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
