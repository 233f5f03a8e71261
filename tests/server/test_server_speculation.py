"""Speculation behind the HTTP API, with the real engine process and the built-in model: the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import REAL, TINY, RunningServer, running_server

from miniserve.engine.client import AsyncEngine

QUESTION = "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:"
PROMPT = f"{QUESTION} He starts with 3 apples. 3 + 4 = 7 apples.\n#### 7\n\n{QUESTION}"
BODIES: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 60, "ignore_eos": True},
    {"temperature": 0.9, "seed": 3, "max_tokens": 40, "n": 2, "logprobs": 2},
    {"temperature": 0, "max_tokens": 60, "stop": ["4 = 7"]},
    {"temperature": 0, "max_tokens": 60, "stop": ["7 app"], "include_stop_str_in_output": True},
    {"temperature": 0, "max_tokens": 30, "frequency_penalty": 0.5, "min_tokens": 30},
    {"temperature": 0, "max_tokens": 10, "echo": True, "logprobs": 0},
    {"temperature": 0, "max_tokens": 30, "guided_regex": "(apple, ){2,5}[0-9]+", "logprobs": 1},
]


@pytest.fixture(scope="module")
def servers(real_server: RunningServer) -> Iterator[tuple[RunningServer, RunningServer]]:
    with running_server(AsyncEngine(replace(REAL, speculative="ngram:4"), TINY, "tiny-qwen3")) as guessing:
        yield real_server, guessing


def complete(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/completions", json={"prompt": PROMPT, **body}, timeout=120)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    for choice in answer["choices"]:
        if choice["logprobs"]:  # batches differ, so their last digits do
            choice["logprobs"]["token_logprobs"] = choice["logprobs"]["top_logprobs"] = None
    return {"choices": answer["choices"], "usage": answer["usage"]}


@pytest.mark.parametrize("body", BODIES)
def test_an_answer_is_the_same(servers: tuple[RunningServer, RunningServer], body: dict[str, Any]) -> None:
    plain, guessing = servers
    assert complete(guessing, body) == complete(plain, body)


def test_a_stream_is_the_same_and_guesses_are_counted(servers: tuple[RunningServer, RunningServer]) -> None:
    plain, guessing = servers
    body = {"prompt": PROMPT, **BODIES[0]}
    lines = httpx.post(f"{guessing.url}/completions", json={**body, "stream": True}, timeout=120).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == complete(plain, body)["choices"][0]["text"]

    def counts(server: RunningServer) -> list[float]:
        families = text_string_to_metric_families(httpx.get(f"{server.root}/metrics").text)
        values = {sample.name: sample.value for family in families for sample in family.samples}
        names = [f"vllm:spec_decode_num_{what}_total" for what in ("drafts", "accepted_tokens", "draft_tokens")]
        return [values[name] for name in names if name in values]

    drafts, accepted, tokens = counts(guessing)
    assert 0 < drafts < tokens and 0 < accepted < tokens
    assert counts(plain) == []
