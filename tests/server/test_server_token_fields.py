"""Fields that show a request's tokens, choose among them, or say which request comes first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import httpx
import pytest
from server_fakes import MAX_MODEL_LEN, VOCAB_SIZE, RunningServer, entry, greedy, running_server, tokenizer

PROMPT = [11, 12, 13]
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi there"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


def post(server: RunningServer, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(server.url + path, json=body, timeout=30)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def events(server: RunningServer, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    text = httpx.post(server.url + path, json={**body, "stream": True}, timeout=30).text
    return [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]


def test_token_ids_of_completions_come_with_their_choices(server: RunningServer) -> None:
    body = {"prompt": [PROMPT, [7, 8]], "n": 2, "max_tokens": 5, "return_token_ids": True}
    choices = post(server, "/completions", body)["choices"]
    expected = [greedy(prompt, 5, rank) for prompt in (PROMPT, [7, 8]) for rank in (0, 1)]
    assert [choice["token_ids"] for choice in choices] == expected
    assert [choice["prompt_token_ids"] for choice in choices] == [PROMPT, PROMPT, [7, 8], [7, 8]]
    streamed: dict[int, list[int]] = {}
    for event in events(server, "/completions", body):
        (choice,) = event["choices"]
        assert ("prompt_token_ids" in choice) == (choice["index"] not in streamed)
        streamed.setdefault(choice["index"], []).extend(choice["token_ids"])
    assert [streamed[index] for index in range(4)] == expected
    plain = post(server, "/completions", {**body, "return_token_ids": False})["choices"][0]
    assert not {"token_ids", "prompt_token_ids", "prompt_logprobs"} & set(plain)


def test_token_ids_of_chat_come_with_the_choices_and_the_prompts_beside_them(server: RunningServer) -> None:
    body = {**CHAT, "n": 2, "return_token_ids": True}
    answer = post(server, "/chat/completions", body)
    prompt = answer["prompt_token_ids"]
    assert "Hi there" in tokenizer().decode(prompt, False)
    assert [choice["token_ids"] for choice in answer["choices"]] == [greedy(prompt, 4, rank) for rank in (0, 1)]
    first, *others = events(server, "/chat/completions", body)
    assert first["prompt_token_ids"] == prompt
    assert not any("prompt_token_ids" in event for event in others)
    for rank in (0, 1):
        pieces = [event["choices"][0] for event in others if event["choices"][0]["index"] == rank]
        assert [token for piece in pieces for token in piece.get("token_ids", [])] == greedy(prompt, 4, rank)


@pytest.mark.parametrize("k", [0, 2])
def test_prompt_logprobs_are_keyed_by_token_id(server: RunningServer, k: int) -> None:
    def expected(prompt: list[int]) -> list[Any]:
        found: list[Any] = [None]
        for previous, token in pairwise(prompt):
            each = entry(previous, token, k)
            ranks = {each.token_id: each.rank} | {top: rank for rank, top in enumerate(each.top_ids, 1)}
            values = {each.token_id: each.logprob} | dict(zip(each.top_ids, each.top_logprobs, strict=True))
            found.append(
                {
                    str(i): {"logprob": values[i], "rank": ranks[i], "decoded_token": tokenizer().token_str(i)}
                    for i in values
                }
            )
        return found

    body = {"prompt": [PROMPT, [7, 8]], "prompt_logprobs": k, "n": 2, "max_tokens": 1}
    choices = post(server, "/completions", body)["choices"]
    assert [choice["prompt_logprobs"] for choice in choices] == [*[expected(PROMPT)] * 2, *[expected([7, 8])] * 2]
    assert all(choice["logprobs"] is None for choice in choices)
    alone = post(server, "/completions", {"prompt": [PROMPT], "prompt_logprobs": k, "max_tokens": 0})["choices"][0]
    assert (alone["prompt_logprobs"], alone["text"]) == (expected(PROMPT), "")
    echoed = {"prompt": [PROMPT], "prompt_logprobs": k, "echo": True, "max_tokens": 1, "logprobs": k}
    assert len(post(server, "/completions", echoed)["choices"][0]["logprobs"]["tokens"]) == 4
    without = {key: value for key, value in echoed.items() if key != "logprobs"}
    assert post(server, "/completions", without)["choices"][0]["logprobs"] is None
    answer = post(server, "/chat/completions", {**CHAT, "prompt_logprobs": k, "return_token_ids": True})
    assert answer["prompt_logprobs"] == expected(answer["prompt_token_ids"])
    refused = httpx.post(f"{server.url}/completions", json={**echoed, "logprobs": 1 + k, "max_tokens": 1})
    assert refused.json()["error"]["param"] == "prompt_logprobs"


def test_tokens_go_by_their_ids_on_demand(server: RunningServer) -> None:
    body = {"prompt": [PROMPT], "max_tokens": 3, "echo": True, "logprobs": 2, "return_tokens_as_token_ids": True}
    arrays = post(server, "/completions", body)["choices"][0]["logprobs"]
    assert arrays["tokens"] == [f"token_id:{token}" for token in PROMPT + greedy(PROMPT, 3)]
    assert set(arrays["top_logprobs"][1]) >= {f"token_id:{token}" for token in entry(11, 12, 2).top_ids}
    chat = {**CHAT, "logprobs": True, "top_logprobs": 2, "return_tokens_as_token_ids": True, "return_token_ids": True}
    answer = post(server, "/chat/completions", chat)["choices"][0]
    content = answer["logprobs"]["content"]
    assert [each["token"] for each in content] == [f"token_id:{token}" for token in answer["token_ids"]]
    assert bytes(content[0]["bytes"]) == tokenizer().token_bytes(answer["token_ids"][0])
    assert all(top["token"].startswith("token_id:") for each in content for top in each["top_logprobs"])


def test_a_prompt_is_cut_to_the_tokens_that_it_may_have(server: RunningServer) -> None:
    ids = tokenizer().encode("Once upon a time there was a cat") * 40

    def cut(**body: Any) -> list[int]:
        post(server, "/completions", {"prompt": ids, "max_tokens": 6, **body})
        seen: list[int] = server.engine.seen[-1][0]
        return seen

    assert cut(truncate_prompt_tokens=5) == ids[-5:]
    assert cut(truncate_prompt_tokens=5, truncation_side="right") == ids[:5]
    assert cut(truncate_prompt_tokens=-1) == ids[-(MAX_MODEL_LEN - 6) :]
    assert cut(truncate_prompt_tokens=-1, max_tokens=None) == ids[-(MAX_MODEL_LEN - 1) :]
    assert cut(truncate_prompt_tokens=100, prompt=ids[:7]) == ids[:7]
    text = {"prompt": "word " * 20_000, "truncate_prompt_tokens": 4, "max_tokens": 2, "echo": True}
    answer = post(server, "/completions", text)
    assert answer["usage"]["prompt_tokens"] == 4
    assert answer["choices"][0]["text"].startswith(tokenizer().decode(tokenizer().encode("word " * 20_000)[-4:], False))
    long = {"messages": [{"role": "user", "content": "word " * 2000}], "max_tokens": 2, "truncate_prompt_tokens": -1}
    assert post(server, "/chat/completions", long)["usage"]["prompt_tokens"] == MAX_MODEL_LEN - 2


def test_echo_in_chat_begins_with_the_message_that_is_continued(server: RunningServer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, "}]
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 3}
    plain = post(server, "/chat/completions", body)["choices"][0]["message"]["content"]
    assert (
        post(server, "/chat/completions", {**body, "echo": True})["choices"][0]["message"]["content"]
        == "Hello, " + plain
    )
    deltas = [event["choices"][0]["delta"] for event in events(server, "/chat/completions", {**body, "echo": True})]
    assert "".join(delta.get("content", "") for delta in deltas) == "Hello, " + plain


def test_the_best_of_several_are_those_of_the_largest_sum_of_logprobs(server: RunningServer) -> None:
    body = {"prompt": [PROMPT, [7, 8]], "max_tokens": 4, "best_of": 4, "n": 2, "return_token_ids": True}
    answer = post(server, "/completions", body)
    expected = []
    for prompt in (PROMPT, [7, 8]):
        candidates = [greedy(prompt, 4, rank) for rank in range(4)]

        def total(tokens: list[int], prompt: list[int] = prompt) -> float:
            return sum(entry(a, b, 0).logprob for a, b in zip((prompt + tokens)[-5:], tokens, strict=False))

        expected += sorted(candidates, key=total, reverse=True)[:2]
    assert [choice["token_ids"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == 2 * 4 * 4
    arrays = post(server, "/completions", {**body, "logprobs": 1})["choices"][0]["logprobs"]
    assert len(arrays["tokens"]) == 4
    for wrong in ({"stream": True}, {"n": 5}):
        assert httpx.post(f"{server.url}/completions", json=body | wrong).json()["error"]["param"] == "best_of"


def test_what_the_engine_is_asked_for(server: RunningServer) -> None:
    fields = {"allowed_token_ids": [3, 5], "logprob_token_ids": [9, 4], "bad_words": ["cat", " dog"]}
    words = [tokenizer().encode(text, False) for text in ("cat", " cat", " dog")]
    for path, body in (
        ("/completions", {"prompt": "a", "logprobs": 0}),
        ("/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    ):
        post(server, path, {**body, **fields})
        params = server.engine.seen[-1][1]
        assert params.allowed_token_ids == (3, 5)
        assert params.logprob_token_ids == (9, 4)
        assert params.bad_words == tuple(map(tuple, words))
    assert max(map(max, words)) < VOCAB_SIZE
