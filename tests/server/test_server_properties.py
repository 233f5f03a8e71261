"""Whatever a sensible client draws together is served, and streamed or whole it is the same answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_fakes import FakeEngine, running_server, tokenizer

SCRIPT = tokenizer().encode("The word ends here: Zoë paid 3 € for 😀.\nQuestion: no<|im_end|>")
QUICK = settings(derandomize=True, max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

ids = st.lists(st.integers(0, 2047), min_size=1, max_size=20)
prompts = st.one_of(st.text(min_size=1), ids, st.lists(st.text(min_size=1), min_size=1, max_size=3),
                    st.lists(ids, min_size=1, max_size=3))  # fmt: skip
words = st.sampled_from(["e", "ends", "\n", "€ f", "Question:", "no such word", "😀"])
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny/fake", "", None]),
    "n": st.integers(1, 3),
    "temperature": st.one_of(st.floats(0, 2), st.integers(0, 2)),
    "top_p": st.floats(0, 1, exclude_min=True),
    "top_k": st.integers(-1, 5000),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(0.1, 2),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 2047).map(str), st.floats(-100, 100), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.one_of(words, st.lists(words, max_size=5)),
    "stop_token_ids": st.lists(st.sampled_from(SCRIPT), max_size=1),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "min_tokens": st.integers(0, 2),
    "max_tokens": st.integers(2, 60),
    "skip_special_tokens": st.booleans(),
    "allowed_token_ids": st.lists(st.integers(0, 2044), min_size=1, max_size=3),
    "bad_words": st.lists(st.text(min_size=1, max_size=5), max_size=2),
    "return_token_ids": st.booleans(),
    "return_tokens_as_token_ids": st.booleans(),
    "truncate_prompt_tokens": st.one_of(st.just(-1), st.integers(1, 30)),
    "priority": st.integers(-3, 3),
    "cache_salt": st.text(min_size=1, max_size=9),
    "user": st.text(),
}
COMPLETION = {
    **COMMON,
    "echo": st.booleans(),
    "logprobs": st.integers(0, 20),
    "best_of": st.just(1),
    "add_special_tokens": st.booleans(),
}
parts = st.one_of(st.text(), st.lists(st.builds(lambda text: {"type": "text", "text": text}, st.text()), max_size=3))
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "other"]), "content": parts},
        optional={"name": st.text()},
    ),
    min_size=1,
    max_size=4,
)
CHAT = {
    **COMMON,
    "max_completion_tokens": st.integers(2, 60),
    "logprobs": st.just(True),
    "add_generation_prompt": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["enable_thinking", "tone"]), st.booleans()),
}


def with_nulls(fields: dict[str, st.SearchStrategy[Any]]) -> dict[str, st.SearchStrategy[Any]]:
    return {name: st.one_of(st.none(), values) for name, values in fields.items()}


@pytest.fixture(scope="module")
def web() -> Iterator[httpx.Client]:
    engine = FakeEngine(script=SCRIPT, max_model_len=2048, num_blocks=256)
    with running_server(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def both_ways(web: httpx.Client, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the choices of all events of the same request as a stream."""
    whole = web.post(path, json=body)
    assert whole.status_code == 200, whole.text
    stream = web.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert stream.status_code == 200
    *lines, done = stream.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert events[-1]["usage"] == whole.json()["usage"]
    return whole.json(), [choice for event in events for choice in event["choices"]]


def assert_token_ids(body: dict[str, Any], choice: dict[str, Any], pieces: list[dict[str, Any]]) -> None:
    if body.get("return_token_ids"):
        assert [token for piece in pieces for token in piece.get("token_ids", [])] == choice["token_ids"] != []
    else:
        assert not any("token_ids" in piece for piece in [choice, *pieces])


@given(st.fixed_dictionaries({"prompt": prompts}, optional=with_nulls(COMPLETION)))
@QUICK
def test_completions(web: httpx.Client, body: dict[str, Any]) -> None:
    whole, pieces = both_ways(web, "/completions", body)
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        assert [piece["finish_reason"] for piece in mine if piece["finish_reason"]] == [choice["finish_reason"]]
        assert mine[-1]["stop_reason"] == choice["stop_reason"]
        assert_token_ids(body, choice, mine)
        assert mine[0].get("prompt_token_ids") == choice.get("prompt_token_ids")
        arrays = [piece["logprobs"] for piece in mine if piece["logprobs"]]
        assert (choice["logprobs"] is None) == (body.get("logprobs") is None)
        for name, values in (choice["logprobs"] or {}).items():
            assert [value for array in arrays for value in array[name]] == values
    assert [choice["index"] for choice in whole["choices"]] == list(range(len(whole["choices"])))


@given(st.fixed_dictionaries({"messages": messages}, optional=with_nulls(CHAT)))
@QUICK
def test_chat(web: httpx.Client, body: dict[str, Any]) -> None:
    whole, pieces = both_ways(web, "/chat/completions", body)
    for choice in whole["choices"]:
        mine = [piece for piece in pieces if piece["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(piece["delta"].get("content", "") for piece in mine) == choice["message"]["content"]
        assert [piece["finish_reason"] for piece in mine if piece["finish_reason"]] == [choice["finish_reason"]]
        assert_token_ids(body, choice, mine)
        entries = [entry for piece in mine if piece["logprobs"] for entry in piece["logprobs"]["content"]]
        assert entries == (choice["logprobs"]["content"] if choice["logprobs"] else [])
        assert (choice["logprobs"] is None) == (not body.get("logprobs"))
