"""The sampler as the runner uses it: rows, batches, edits of the logits, seeds, preemption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.core import Request, RowStart, SamplingParams
from miniserve.runner.logprobs import gather_logprobs, to_token_logprobs
from miniserve.runner.sampler import Sampler

torch.set_num_threads(1)

EOS = 2


def make_sampler(vocab_size, max_num_seqs=8, seed=0, eos=(EOS,)):
    return Sampler(max_num_seqs, vocab_size, torch.device("cpu"), eos, seed)


def row_start(row, params, request_id=None, prompt=(1, 2, 3), outputs=()):
    request = Request(request_id=request_id or f"request {row}", prompt_token_ids=list(prompt), params=params)
    return RowStart(row, request, list(outputs))


def logits_for(request_id, position, vocab_size, scale=2.0):
    """Logits that depend on the sequence alone, as a model's do."""
    seed = sum(map(ord, request_id)) * 1000 + position
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def generate(sampler, row, start, num_tokens, vocab_size):
    """The request alone in the sampler, from `start` on."""
    sampler.start_row(start)
    tokens = list(start.output_token_ids)
    while len(tokens) < num_tokens:
        logits = logits_for(start.request.request_id, len(tokens), vocab_size)[None]
        tokens.append(sampler.sample(logits, [row]).token_ids.item())
    sampler.stop_row(row)
    return tokens


def test_greedy_takes_the_lowest_of_equal_tokens_in_every_batch():
    logits = torch.zeros(3, 600)
    logits[0, [5, 300, 599]] = 1.0
    logits[1, [127, 128]] = 4.0
    sampler = make_sampler(600)
    for row in (0, 1):
        sampler.start_row(row_start(row, SamplingParams(temperature=0.0)))
    assert sampler.sample(logits[:2].clone(), [0, 1]).token_ids.tolist() == [5, 127]
    sampler.start_row(row_start(4, SamplingParams(temperature=1.3, logprobs=2, frequency_penalty=0.3)))
    mixed = sampler.sample(logits.clone(), [0, 1, 4]).token_ids
    assert mixed[:2].tolist() == [5, 127]
    assert mixed.dtype == torch.int64
    assert sampler.last_tokens[[0, 1, 4]].tolist() == mixed.tolist()
    assert sampler.num_outputs[[0, 1, 4]].tolist() == [2, 2, 1]


def test_top_k_of_one_and_next_to_no_temperature_are_greedy():
    sampler = make_sampler(600)
    sampler.start_row(row_start(0, SamplingParams(top_k=1)))
    sampler.start_row(row_start(1, SamplingParams(temperature=1e-6)))
    sampler.start_row(row_start(2, SamplingParams(temperature=0.0)))
    logits = torch.randn(1, 600).round().repeat(3, 1)  # full of equal tokens
    tokens = sampler.sample(logits.clone(), [0, 1, 2]).token_ids.tolist()
    assert tokens == [np.argmax(logits[0].numpy())] * 3


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, -1, 1, 5, 150, 10**6]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, -0.4]),
    logit_bias=st.sampled_from([None, {3: 4.0, 0: -100.0}]),
    allowed_token_ids=st.sampled_from([None, (4, 0, 1, 3, 3)]),
    bad_words=st.sampled_from([(), ((4,), (1, 3), (0, 3), (3, 3, 0))]),
    min_tokens=st.sampled_from([0, 3]),
    max_tokens=st.just(16),
    seed=st.sampled_from([None, 0, -5, 2**63 - 1]),
    logprobs=st.sampled_from([None, 0, 3]),
)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data(), vocab_size=st.sampled_from([5, 128, 300, 700]))
def test_a_request_gets_the_same_tokens_alone_and_in_any_company(data, vocab_size):
    """Other rows, another order, other steps, and a preemption in between; logprobs and penalties among them."""
    params = data.draw(st.lists(PARAMS, min_size=2, max_size=5))
    ids = [f"request {i}" for i in range(len(params))]
    alone = [
        generate(make_sampler(vocab_size), 0, row_start(0, p, request_id), 6, vocab_size)
        for p, request_id in zip(params, ids, strict=True)
    ]
    sampler = make_sampler(vocab_size)
    outputs = [[] for _ in params]
    row_of = dict(enumerate(data.draw(st.permutations(range(8)))))
    for i, p in enumerate(params):
        sampler.start_row(row_start(row_of[i], p, ids[i]))
    while any(len(tokens) < 6 for tokens in outputs):
        unfinished = [i for i, tokens in enumerate(outputs) if len(tokens) < 6]
        chosen = data.draw(st.permutations(unfinished))[: data.draw(st.integers(1, len(unfinished)))]
        logits = torch.stack([logits_for(ids[i], len(outputs[i]), vocab_size) for i in chosen])
        raw = logits.clone()
        found = sampler.sample(logits, [row_of[i] for i in chosen])
        tokens = found.token_ids.tolist()
        for i, token in zip(chosen, tokens, strict=True):
            outputs[i].append(token)
        check_logprobs(raw, tokens, found, [params[i].logprobs for i in chosen])
        if data.draw(st.integers(0, 3)) == 0:
            i = data.draw(st.sampled_from(chosen))
            sampler.stop_row(row_of[i])
            row_of[i] = data.draw(st.sampled_from([r for r in range(8) if r not in row_of.values() or r == row_of[i]]))
            sampler.start_row(row_start(row_of[i], params[i], ids[i], outputs=outputs[i]))
    assert outputs == alone
    for p, tokens in zip(params, outputs, strict=True):
        assert p.allowed_token_ids is None or set(tokens) <= set(p.allowed_token_ids)
        for word in p.bad_words:
            assert list(word) not in [tokens[i : i + len(word)] for i in range(len(tokens))]


def test_bad_words_forbid_nothing_but_what_completes_one_of_them():
    """Most likely are 5, 6, 7 in this order; what else is drawn follows from the words alone."""
    words = ((5, 6, 7), (6, 6), (7, 7), (5, 5, 5, 5))
    sampler = make_sampler(10)
    sampler.start_row(row_start(3, SamplingParams(temperature=0.0, bad_words=words), outputs=(9, 5)))
    sampler.start_row(row_start(1, SamplingParams(temperature=0.0)))
    logits = torch.zeros(2, 10)
    logits[:, [5, 6, 7]] = torch.tensor([3.0, 2.0, 1.0])
    drawn = [sampler.sample(logits.clone(), [1, 3]).token_ids.tolist() for _ in range(7)]
    assert [tokens[0] for tokens in drawn] == [5] * 7
    assert [tokens[1] for tokens in drawn] == [5, 5, 6, 5, 5, 5, 6]


def test_logprobs_of_the_ids_asked_for_beside_those_of_the_best():
    sampler = make_sampler(600)
    sampler.start_row(row_start(0, SamplingParams(logprobs=2)))
    sampler.start_row(row_start(1, SamplingParams(logprobs=0, logprob_token_ids=(500, 7, 3), logit_bias={9: 5.0})))
    sampler.start_row(row_start(2, SamplingParams()))
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(0))
    found = sampler.sample(logits.clone(), [0, 1, 2])
    best, asked, none = to_token_logprobs(found.token_ids.tolist(), found.logprobs, found.num_logprobs)
    exact = logits.double().log_softmax(-1)
    assert none is None
    assert best.top_ids == logits[0].topk(2).indices.tolist()
    assert asked.top_ids == [500, 7, 3]
    assert asked.top_logprobs == pytest.approx(exact[1, [500, 7, 3]].tolist(), abs=1e-6)
    assert asked.rank == 1 + int((logits[1] > logits[1, asked.token_id]).sum())


def check_logprobs(raw, tokens, found, num_logprobs):
    assert found.num_logprobs == tuple(num_logprobs)
    if not any(count is not None for count in num_logprobs):
        assert found.logprobs is None
        return
    entries = to_token_logprobs(tokens, found.logprobs, found.num_logprobs)
    for row, (entry, count) in enumerate(zip(entries, num_logprobs, strict=True)):
        if count is None:
            assert entry is None
            continue
        exact = gather_logprobs(raw[row : row + 1], torch.tensor([tokens[row]]), count)
        assert entry == to_token_logprobs([tokens[row]], exact, [count])[0]


def test_seed_decides_the_tokens_and_without_one_the_engine_and_the_request_do():
    def run(params, request_id="a", engine_seed=0, row=0):
        sampler = make_sampler(500, seed=engine_seed)
        sampler.start_row(row_start(row, params, request_id))
        return [sampler.sample(torch.zeros(1, 500), [row]).token_ids.item() for _ in range(8)]

    seeded = SamplingParams(seed=11)
    assert run(seeded) == run(seeded, "b", 5, 3)
    assert run(seeded) != run(SamplingParams(seed=12))
    free = SamplingParams()
    assert run(free) == run(free, row=2)
    assert len({tuple(run(free)), tuple(run(free, "b")), tuple(run(free, engine_seed=1)), tuple(run(seeded))}) == 4
    assert len(set(run(seeded))) > 4  # the positions of a sequence have numbers of their own


def reference_edit(logits, params, prompt, outputs):
    """One row's logits after bias, min_tokens and penalties, token by token in Python."""
    edited = logits.double().clone()
    for token, bias in (params.logit_bias or {}).items():
        edited[token] += bias
    if len(outputs) < params.min_tokens:
        for token in {EOS, *params.stop_token_ids}:
            edited[token] = float("-inf")
    for token in set(prompt) | set(outputs):
        edited[token] *= 1 / params.repetition_penalty if edited[token] > 0 else params.repetition_penalty
    for token in set(outputs):
        edited[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    return edited


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    data=st.data(),
    vocab_size=st.sampled_from([10, 130, 400]),
    seed=st.integers(0, 2**31),
    resumed=st.integers(0, 5),
)
def test_greedy_follows_the_reference_of_bias_min_tokens_and_penalties(data, vocab_size, seed, resumed):
    generator = np.random.default_rng(seed)
    params, prompts, outputs = [], [], []
    for _ in range(3):
        params.append(
            SamplingParams(
                temperature=0.0,
                repetition_penalty=data.draw(st.sampled_from([1.0, 0.8, 1.5])),
                presence_penalty=data.draw(st.sampled_from([0.0, 1.1, -0.6])),
                frequency_penalty=data.draw(st.sampled_from([0.0, 0.9, -0.3])),
                logit_bias=data.draw(st.sampled_from([None, {1: 2.5, 7: -3.0, 9: 0.25}])),
                min_tokens=data.draw(st.sampled_from([0, 4, 12])),
                stop_token_ids=data.draw(st.sampled_from([(), (5, 6)])),
                ignore_eos=data.draw(st.booleans()),
            )
        )
        prompts.append(generator.integers(0, 9, generator.integers(0, 150)).tolist())
        outputs.append(generator.integers(0, 9, resumed).tolist())
    sampler = make_sampler(vocab_size, max_num_seqs=3)
    for row in range(3):
        sampler.start_row(row_start(row, params[row], prompt=prompts[row], outputs=outputs[row]))
    for _ in range(15):
        logits = torch.from_numpy(generator.normal(size=(3, vocab_size))).float() * 1.5
        edited = [reference_edit(logits[row], params[row], prompts[row], outputs[row]) for row in range(3)]
        tokens = sampler.sample(logits, [0, 1, 2]).token_ids.tolist()
        for row in range(3):
            assert tokens[row] == edited[row].argmax()
            outputs[row].append(tokens[row])


def test_penalties_grow_with_a_long_output():
    sampler = make_sampler(1000)
    sampler.start_row(row_start(1, SamplingParams(temperature=0.0, presence_penalty=2.0), prompt=range(100)))
    sampler.start_row(row_start(0, SamplingParams(temperature=0.0)))
    logits = torch.linspace(1.0, 0.0, 1000).repeat(2, 1)
    for step in range(300):  # each token once: what was sampled lies 2 below the rest
        assert sampler.sample(logits.clone(), [0, 1]).token_ids.tolist() == [0, step]


def test_min_tokens_masks_stop_tokens_until_there_are_enough():
    sampler = make_sampler(50, eos=(2, 3, 10**6))
    params = SamplingParams(temperature=1.0, min_tokens=4, stop_token_ids=(7, 10**6), ignore_eos=True)
    sampler.start_row(row_start(0, params, outputs=[1]))
    sampler.start_row(row_start(1, SamplingParams(temperature=0.0)))
    logits = torch.full((2, 50), -50.0)
    logits[:, [2, 3, 7]] = 50.0
    drawn = [sampler.sample(logits.clone(), [1, 0]).token_ids.tolist() for _ in range(5)]
    assert [own in (2, 3, 7) for _, own in drawn] == [False, False, False, True, True]
    assert all(other == 2 for other, _ in drawn)


def test_a_row_starts_afresh_after_another_request():
    sampler = make_sampler(40)
    everything = SamplingParams(
        repetition_penalty=5.0, logit_bias={3: 100.0}, min_tokens=5, logprobs=1, presence_penalty=2.0
    )
    sampler.start_row(row_start(0, everything))
    assert not sampler.takes_argmax([0])
    sampler.sample(torch.zeros(1, 40), [0])
    sampler.stop_row(0)
    sampler.start_row(row_start(0, SamplingParams(temperature=0.0)))
    assert sampler.takes_argmax([0])
    logits = torch.zeros(1, 40)
    logits[0, EOS] = 1.0
    found = sampler.sample(logits, [0])
    assert found.token_ids.tolist() == [EOS]
    assert found.logprobs is None
    assert sampler.num_outputs[0] == 1


def test_counts_of_an_earlier_request_are_forgotten():
    sampler = make_sampler(40)
    greedy = {"temperature": 0.0, "frequency_penalty": 1.0}
    sampler.start_row(row_start(0, SamplingParams(**greedy), prompt=[0], outputs=[5, 6, 7] * 9))
    sampler.stop_row(0)
    sampler.start_row(row_start(0, SamplingParams(**greedy), prompt=[0]))
    logits = torch.zeros(1, 40)
    logits[0, 30] = 1.5
    assert [sampler.sample(logits.clone(), [0]).token_ids.item() for _ in range(3)] == [30, 30, 0]


def test_misuse_is_refused():
    sampler = make_sampler(40)
    sampler.start_row(row_start(0, SamplingParams()))
    with pytest.raises(ValueError, match="row 0 is taken"):
        sampler.start_row(row_start(0, SamplingParams()))
    with pytest.raises(ValueError, match="row 1 holds no request"):
        sampler.sample(torch.zeros(2, 40), [0, 1])
    with pytest.raises(ValueError, match="row 1 holds no request"):
        sampler.stop_row(1)
    sampler.sample(torch.zeros(1, 40), [0])
    sampler.stop_row(0)
    with pytest.raises(ValueError, match="row 0 holds no request"):
        sampler.sample(torch.zeros(1, 40), [0])


def test_an_empty_batch():
    assert make_sampler(40).sample(torch.zeros(0, 40), []).token_ids.tolist() == []


def test_a_changed_list_of_rows_is_noticed():
    sampler = make_sampler(300)
    sampler.start_row(row_start(0, SamplingParams(temperature=0.0, logit_bias={5: 50.0})))
    sampler.start_row(row_start(1, SamplingParams(temperature=0.0)))
    rows = [0, 1]
    assert sampler.sample(torch.zeros(2, 300), rows).token_ids.tolist() == [5, 0]
    rows.reverse()
    assert sampler.sample(torch.zeros(2, 300), rows).token_ids.tolist() == [0, 5]
    assert sampler.sample(torch.zeros(1, 300), [1]).token_ids.tolist() == [0]


def test_a_real_vocabulary_in_chunks():
    """More rows than one chunk holds, of all kinds, equal to each row alone."""
    vocab_size, num_rows = 151936, 31
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(min_p=0.1, logprobs=2),
    ]
    logits = torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    for some in ([0, 1, 2, 3], [2], [3, 2]):
        params = [kinds[some[row % len(some)]] for row in range(num_rows)]
        sampler = make_sampler(vocab_size, max_num_seqs=num_rows)
        for row in range(num_rows):
            sampler.start_row(row_start(row, params[row]))
        together = sampler.sample(logits.clone(), list(range(num_rows))).token_ids
        sampler = make_sampler(vocab_size, max_num_seqs=num_rows)
        for row in range(0, num_rows, 3):
            sampler.start_row(row_start(row, params[row]))
            assert sampler.sample(logits[row : row + 1].clone(), [row]).token_ids[0] == together[row]
