"""A request's tokens depend on the request alone: not on the batch, the chunking, the cache, preemption, the layout,
the loop or speculation. Each drawn workload runs once as drawn, and each of its requests once alone on a plain engine.
"""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import pytest
import torch
from engine_real import BACKENDS, Setup, generate, make_engine, small_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from models_support import VOCAB
from scheduler_integrity import check_integrity

from miniserve.core import FinishReason, Grammar, SamplingParams
from miniserve.models.decoder import CausalLM

torch.set_num_threads(1)
EOS = 7


MODELS = {
    "dense": ("Qwen3ForCausalLM", 4, False),
    "dense, native": ("Qwen3ForCausalLM", 4, True),
    "latent, routed": ("DeepseekV3ForCausalLM", 3, True),
}


@cache
def the_model(name: str) -> CausalLM:
    return small_model(Path(mkdtemp()), *MODELS[name])


@cache
def _alone(model: str, prompt: tuple[int, ...], params: bytes) -> list[int]:
    engine, _, _ = make_engine(the_model(model), Setup(), [EOS])
    return tokens(generate(engine, [(list(prompt), msgspec.json.decode(params, type=SamplingParams))])[0])


def alone(model: str, prompt: list[int], params: SamplingParams) -> list[int]:
    return _alone(model, tuple(prompt), msgspec.json.encode(params))


GRAMMARS = [
    Grammar("regex", r"[0-9]{2,5}(ab|c)*"),
    Grammar("choice", '["a", "ab", "abc", "Z9"]'),
    Grammar("json_schema", '{"type": "array", "items": {"type": "integer"}, "minItems": 1}'),
    Grammar("structural_tag", '{"tags": [{"begin": "A", "schema": {"type": "integer"}, "end": "B"}]}'),
]
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    seed=st.integers(0, 5),
    top_k=st.sampled_from([0, 0, 5]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.sampled_from([None, {3: 2.0}]),
    stop_token_ids=st.sampled_from([(), (11,)]),
    ignore_eos=st.booleans(),
    min_tokens=st.sampled_from([0, 0, 1]),
    max_tokens=st.integers(1, 24),
    prompt_logprobs=st.sampled_from([None, None, None, 0]),
    grammar=st.sampled_from([None, None, None, None, *GRAMMARS]),
)


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Setup, str, list[tuple[list[int], SamplingParams]], list[int]]:
    stem = [(5 * i + draw(st.integers(0, 1))) % VOCAB for i in range(48)]
    requests, arrivals = [], []
    for _ in range(draw(st.integers(1, 6))):
        shared = draw(st.sampled_from([0, 8, 16, 24, 32, 48]))
        tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=0 if shared else 1, max_size=12))
        requests.append((stem[:shared] + tail, draw(PARAMS)))
        arrivals.append(draw(st.integers(0, 12)))
    block_size = draw(st.sampled_from([8, 16]))
    longest = max(len(prompt) + (params.max_tokens or 0) for prompt, params in requests)
    needed = -(-longest // block_size)
    num_draft_tokens = draw(st.sampled_from([0, 0, 1, 4, 7]))
    setup = Setup(
        backend=draw(st.sampled_from(BACKENDS)),
        layout=draw(st.sampled_from(["linear", "shuffled"])),
        block_size=block_size,
        num_blocks=needed + draw(st.sampled_from([0, 1, 3, 30])),
        max_num_seqs=draw(st.integers(1, 6)),
        max_num_batched_tokens=draw(st.sampled_from([1, 3, 8, 17, 64, 512])),
        prefix_caching=draw(st.booleans()),
        overlap=not num_draft_tokens and draw(st.booleans()),
        num_draft_tokens=num_draft_tokens,
    )
    return setup, draw(st.sampled_from(list(MODELS))), requests, arrivals


@settings(max_examples=100, deadline=None, derandomize=True)
@given(workloads())
def test_every_request_gets_the_tokens_it_gets_alone(
    workload: tuple[Setup, str, list[tuple[list[int], SamplingParams]], list[int]],
) -> None:
    setup, model, requests, arrivals = workload
    engine, scheduler, _ = make_engine(the_model(model), setup, [EOS])
    outputs = generate(engine, requests, arrivals)
    for (prompt, params), found in zip(requests, outputs, strict=True):
        assert found[-1].finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        assert tokens(found) == alone(model, prompt, params)
        if params.grammar is GRAMMARS[0] and found[-1].finish_reason is FinishReason.STOP:
            assert re.fullmatch(params.grammar.text, bytes(tokens(found)).rstrip(bytes([EOS])).decode())
        entries = [entry for output in found for entry in (output.prompt_logprobs or [])]
        assert len(entries) == (0 if params.prompt_logprobs is None else len(prompt))
    check_integrity(scheduler)
    assert scheduler.stats().kv_cache_usage == 0.0


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("layout", ["linear", "shuffled"])
def test_guesses_right_and_wrong_change_no_token(name: str, layout: str) -> None:
    stem = [3, 9, 4, 17, 5, 3, 9, 4, 17, 6, 3, 9, 4]
    params = [
        SamplingParams(temperature=temperature, seed=n, max_tokens=60, ignore_eos=True, logprobs=2, logit_bias=bias)
        for n, (temperature, bias) in enumerate([(0.0, None), (0.8, {3: 9.0, 9: 9.0}), (0.0, {4: 3.0}), (1.0, None)])
    ]
    requests = [([*stem, n], params) for n, params in enumerate(params)]
    plain, _, _ = make_engine(the_model(name), Setup(), [EOS])
    guessing, scheduler, _ = make_engine(
        the_model(name), Setup(layout=layout, num_draft_tokens=4, max_num_seqs=12), [EOS]
    )
    for want, got in zip(generate(plain, requests), generate(guessing, requests), strict=True):
        assert tokens(got) == tokens(want)
        entries = [[entry for output in outputs for entry in output.logprobs or []] for outputs in (want, got)]
        assert [entry.token_id for entry in entries[1]] == tokens(got)
        for one, other in zip(*entries, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-3) and one.rank == other.rank
    stats = scheduler.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens


@pytest.mark.parametrize("overlap", [False, True])
def test_the_drawn_workloads_do_reach_preemption_and_the_prefix_cache(overlap: bool) -> None:
    """What the invariance above would be hollow without."""
    model = the_model("dense")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    requests = [([5 * i % VOCAB for i in range(32)] + [n], params) for n in range(4)]
    tight = Setup(num_blocks=7, overlap=overlap)
    roomy = dataclasses.replace(tight, num_blocks=64)
    for setup in (tight, roomy):
        engine, scheduler, _ = make_engine(model, setup, [EOS])
        outputs = generate(engine, requests, [0, 1, 1, 1])
        for (prompt, _), found in zip(requests, outputs, strict=True):
            assert tokens(found) == alone("dense", prompt, params)
        stats = scheduler.stats()
        assert stats.prefix_cache_hits > 0
        assert (stats.num_preemptions > 0) == (setup is tight)
