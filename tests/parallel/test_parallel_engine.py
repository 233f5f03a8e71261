"""Whole engines whose ranks are threads: each request gets the tokens of one process, with every feature, whatever the
number of ranks; and all ranks say the same."""

from __future__ import annotations

import re
from concurrent.futures import wait
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from engine_real import BACKENDS, KERNELS, Setup, generate, make_engine, read_model, tokens, write_model
from models_support import CLASSES
from thread_ranks import run_ranks

from miniserve.core import Grammar, Request, RequestOutput, SamplingParams
from miniserve.models.config import load_model_config
from miniserve.parallel.group import Alone, Group

torch.set_num_threads(1)

# Two KV heads and six query heads, 101 words, widths and experts: nothing that 2, 3 and 4 ranks all divide.
UNEVEN = {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48, "intermediate_size": 97}
STEM = [3, 9, 4, 17, 5, 3, 9, 4, 17, 6, 3, 9, 4, 17, 5, 3, 9, 4, 17, 6]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
GREEDY_REQUESTS = [([*STEM, n], GREEDY) for n in range(3)]
DRAWN = {"max_tokens": 12, "ignore_eos": True, "seed": 3}
REQUESTS = [
    ([*STEM, 1], GREEDY),
    ([*STEM, 2], SamplingParams(temperature=1.0, **DRAWN)),
    ([5, 6], SamplingParams(temperature=0.8, top_k=7, top_p=0.9, min_p=0.02, logprobs=3, **DRAWN)),
    (STEM[:9], SamplingParams(temperature=0.0, max_tokens=10, logprobs=0, prompt_logprobs=2, ignore_eos=True)),
    (STEM[:5], SamplingParams(temperature=0.9, repetition_penalty=1.3, presence_penalty=0.4, **DRAWN)),
    (STEM[:7], SamplingParams(temperature=0.0, frequency_penalty=0.6, max_tokens=14, ignore_eos=True)),
    # A step of these alone draws for all ranks' rows by masks; beside others, for some.
    (STEM[:6], SamplingParams(temperature=0.0, max_tokens=12, logprobs=2, grammar=Grammar("regex", "[A-Z]{9,}"))),
    (STEM[:4], SamplingParams(temperature=1.0, grammar=Grammar("choice", '["ABRACADABRA", "ABBA"]'), **DRAWN)),
    ([8], SamplingParams(temperature=0.7, logit_bias={3: 4.0, 100: 3.0}, min_tokens=9, stop_token_ids=(3,), **DRAWN)),
]
# Prompts in chunks, a pool so small that requests are preempted, more requests than rows.
TIGHT = Setup(block_size=8, num_blocks=8, max_num_seqs=4, max_num_batched_tokens=13)
OVERLAPPED = replace(TIGHT, overlap=True)
GUESSING = Setup(backend=BACKENDS[0], layout="shuffled", max_num_seqs=12, num_draft_tokens=4)
CASES = [
    (2, False, TIGHT),
    (2, True, GUESSING),
    (3, True, OVERLAPPED),
    (3, False, GUESSING),
    (4, False, TIGHT),
    (4, True, GUESSING),
]

Outputs = list[list[RequestOutput]]


@cache
def checkpoint(architecture: str) -> Path:
    path = Path(mkdtemp())
    changed: dict[str, Any] = dict(UNEVEN)
    if architecture == "Qwen3MoeForCausalLM":
        changed |= {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 33, "mlp_only_layers": []}
    if architecture.startswith("Deepseek"):
        changed |= {"num_key_value_heads": 6, "n_routed_experts": 6}
    write_model(path, architecture, 5, **changed)
    return path


def outputs(path: Path, setup: Setup, expert_parallel: bool, group: Group) -> Outputs:
    native = KERNELS if setup.backend == "CPU_ATTN" else None
    model = read_model(path, native=native, group=group, expert_parallel=expert_parallel)
    engine, scheduler, _ = make_engine(model, setup, [7])
    add = engine.add

    def add_with_its_matcher(request: Request) -> None:
        """Matchers are made in a thread: on each rank a request would join another step."""
        add(request)
        wait([future for _, future in engine._matched.values()])

    engine.add = add_with_its_matcher  # type: ignore[method-assign]
    found = [*generate(engine, GREEDY_REQUESTS), *generate(engine, REQUESTS)]
    stats = scheduler.stats()
    # What the comparison would be hollow without.
    assert stats.num_accepted_tokens if setup.num_draft_tokens else stats.num_preemptions
    assert stats.prefix_cache_hits
    letters, word = (bytes(tokens(each)).rstrip(b"\x07").decode() for each in found[-3:-1])
    assert re.fullmatch("[A-Z]{9,}", letters) and word in ("ABRACADABRA", "ABBA")
    return found


@cache
def one_process(architecture: str, setup: Setup) -> Outputs:
    return outputs(checkpoint(architecture), setup, False, Alone())


def entries(found: Outputs) -> list[Any]:
    return [
        (entry.token_id, entry.rank, entry.logprob, entry.top_ids, entry.top_logprobs)
        for each in found
        for output in each
        for entry in [*(output.prompt_logprobs or []), *(output.logprobs or [])]
        if entry is not None
    ]


@pytest.mark.parametrize("architecture", CLASSES)
def test_ranks_give_the_tokens_of_one_process(architecture: str) -> None:
    path = checkpoint(architecture)
    dense = load_model_config(path).moe is None
    for size, expert_parallel, setup in CASES:
        # Experts change nothing in a dense model, and dense models are alike: one of them has all sizes.
        if dense and (expert_parallel or size == 4) and (size < 4 or architecture != "Qwen3ForCausalLM"):
            continue
        want = one_process(architecture, setup)
        ranks = run_ranks(size, partial(outputs, path, setup, expert_parallel))
        for found in ranks:
            assert [tokens(each) for each in found] == [tokens(each) for each in want], (size, setup)
            assert entries(found) == entries(ranks[0])
        for got, known in zip(entries(ranks[0]), entries(want), strict=True):
            assert got[:2] == known[:2]
            assert got[2] == pytest.approx(known[2], abs=1e-3)
            assert got[4] == pytest.approx(known[4], abs=1e-3)
