"""The server over the real engine process and the built-in model."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from typing import Any

import httpx
import pytest
from dialect_texts import TEMPLATES
from server_fakes import REAL, TINY, RunningServer, running_server, tokenizer, wait_until

from miniserve.engine.client import AsyncEngine

PROMPTS = ["Once upon a time", "Tom has 3 apples and buys 4 more.", "The"]


@pytest.fixture
def server(real_server: RunningServer) -> RunningServer:
    return real_server


def complete(server: RunningServer, **body: Any) -> list[dict[str, Any]]:
    response = httpx.post(f"{server.url}/completions", json={"temperature": 0, **body}, timeout=120)
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def test_prompts_together_are_prompts_alone_and_streams_add_up(server: RunningServer) -> None:
    together = complete(server, prompt=PROMPTS, max_tokens=12, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        (alone,) = complete(server, prompt=prompt, max_tokens=12, ignore_eos=True)
        assert together[number]["text"] == alone["text"]
        body = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True, "temperature": 0, "stream": True}
        lines = httpx.post(f"{server.url}/completions", json=body, timeout=120).text.split("\n\n")
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert "".join(event["choices"][0]["text"] for event in events) == alone["text"]


def test_the_steps_tokens_are_those_of_the_prompts_and_of_the_answers(server: RunningServer) -> None:
    def sums() -> list[float]:
        text = httpx.get(f"{server.root}/metrics", timeout=60).text
        names = ("iteration_tokens_total_sum", "prompt_tokens_total", "generation_tokens_total")
        return [float(re.search(rf"^vllm:{name}{{.*}} (.*)$", text, re.MULTILINE)[1]) for name in names]  # type: ignore[index]

    before = sums()
    for number in range(10):
        complete(server, prompt=[[300 + number] * 9], max_tokens=10, ignore_eos=True)
    assert [after - earlier for after, earlier in zip(sums(), before, strict=True)] == [190, 90, 100]


def test_scoring_what_chat_generated_gives_its_logprobs(server: RunningServer) -> None:
    """One request generates, another finds the same tokens in its prompt, as lm_eval asks."""
    messages = [{"role": "user", "content": "Tell me a story."}]
    prompt = httpx.post(f"{server.root}/tokenize", json={"messages": messages}).json()["tokens"]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, "logprobs": True, "ignore_eos": True}
    chat = httpx.post(f"{server.url}/chat/completions", json=body, timeout=120).json()
    entries = chat["choices"][0]["logprobs"]["content"]
    id_of = {tokenizer().token_bytes(token): token for token in range(tokenizer().vocab_size)}
    generated = [id_of[bytes(entry["bytes"])] for entry in entries]
    (scored,) = complete(server, prompt=[prompt + generated], max_tokens=1, logprobs=1, echo=True)
    logprobs = scored["logprobs"]["token_logprobs"][len(prompt) : -1]
    assert logprobs == pytest.approx([entry["logprob"] for entry in entries], abs=1e-4)
    tops = scored["logprobs"]["top_logprobs"][len(prompt) : -1]
    assert all(logprob == max(top.values()) for logprob, top in zip(logprobs, tops, strict=True))  # it was greedy


def test_a_seed_repeats_and_n_differ(server: RunningServer) -> None:
    body = {"prompt": PROMPTS[0], "max_tokens": 12, "temperature": 1.0, "seed": 7, "n": 4, "ignore_eos": True}
    first, second = complete(server, **body), complete(server, **body)
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert len({choice["text"] for choice in first}) > 1


def test_a_long_prompt_is_found_in_the_cache_again(server: RunningServer) -> None:
    prompt = [tokenizer().encode("Once upon a time there was a cat. " * 10)]
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
    first = httpx.post(f"{server.url}/completions", json=body, timeout=120).json()
    second = httpx.post(f"{server.url}/completions", json=body, timeout=120).json()
    assert first["choices"][0]["text"] == second["choices"][0]["text"]
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0
    assert cached % REAL.block_size == 0


def test_leaving_frees_the_blocks(server: RunningServer) -> None:
    body = {"prompt": PROMPTS, "n": 2, "max_tokens": 400, "ignore_eos": True, "stream": True}
    content = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(content) + content
        )
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        wait_until(lambda: server.engine.stats.num_running == 6)
    wait_until(lambda: server.engine.stats.num_running == 0)
    wait_until(lambda: server.engine.stats.kv_cache_usage == 0.0)
    text = httpx.get(f"{server.root}/metrics").text
    assert 'vllm:num_requests_running{engine="0",model_name="tiny-qwen3"} 0.0' in text


def test_a_killed_engine_answers_its_clients_and_ends_the_server() -> None:
    with running_server(AsyncEngine(REAL, TINY, "tiny-qwen3")) as server:
        answers: list[httpx.Response] = []

        def ask() -> None:
            body = {"prompt": "x", "max_tokens": 500, "ignore_eos": True}
            answers.append(httpx.post(f"{server.url}/completions", json=body, timeout=120))

        client = threading.Thread(target=ask)
        client.start()
        wait_until(lambda: server.engine.stats.num_running == 1)
        os.kill(engine_pid(server.engine), signal.SIGKILL)
        client.join(60)
        assert server.join() == 1
    assert answers[0].status_code == 503
    assert "died" in answers[0].json()["error"]["message"]


def engine_pid(engine: AsyncEngine) -> int:
    assert engine._process is not None
    return engine._process.pid


def test_only_allowed_tokens_and_no_bad_words_are_generated(server: RunningServer) -> None:
    asked = {"prompt": PROMPTS, "max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
    plain = complete(server, **asked)
    (word,) = {choice["text"].split()[0] for choice in plain[:1]}
    for choice in complete(server, **asked, bad_words=[word, "e"]):
        tokens = [tokenizer().token_str(token) for token in choice["token_ids"]]
        assert word not in choice["text"].split() and not {"e", " e"} & set(tokens)
    allowed = [plain[0]["token_ids"][0], 300, 301, 302]
    for choice in complete(server, **asked, allowed_token_ids=allowed):
        assert set(choice["token_ids"]) <= set(allowed)
    digits = sorted(set(tokenizer().encode("1 2 3", False)))
    arrays = complete(server, **{**asked, "logprobs": 0}, logprob_token_ids=digits, return_tokens_as_token_ids=True)
    tops = zip(arrays[0]["logprobs"]["tokens"], arrays[0]["logprobs"]["top_logprobs"], strict=True)
    assert all(set(top) == {drawn, *(f"token_id:{i}" for i in digits)} for drawn, top in tops)
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "return_tokens_as_token_ids": True}
    for count in (None, 0, 5):  # which they do not depend on
        asked = {**chat, "logprobs": True, "top_logprobs": count, "logprob_token_ids": [500], "allowed_token_ids": [42]}
        choice = httpx.post(f"{server.url}/chat/completions", json=asked, timeout=120).json()["choices"][0]
        (content,) = choice["logprobs"]["content"]
        assert [top["token"] for top in content["top_logprobs"]] == ["token_id:500", "token_id:42"]


def test_a_salt_keeps_others_out_of_a_cached_prefix(server: RunningServer) -> None:
    def cached(salt: str | None) -> int:
        body = {"prompt": [list(range(40, 140))], "max_tokens": 1, "cache_salt": salt}
        usage = httpx.post(f"{server.url}/completions", json=body, timeout=120).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert [cached(salt) > 0 for salt in (None, "a", "b", "a", None, "c")] == [False, False, False, True, True, False]


@pytest.mark.parametrize("dialect", ["hermes", "qwen3_coder"])
def test_a_model_that_knows_no_tools_calls_one_where_it_must(server: RunningServer, dialect: str) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Bonn", "Bad Ems"], "type": "string"}, "rain": {"type": "boolean"}},
        "required": ["city", "rain"],
        "additionalProperties": False,
    }
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "get_weather", "parameters": schema}}],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
        "chat_template": TEMPLATES[dialect],
        "chat_template_kwargs": {"enable_thinking": False},
        "seed": 1,
    }
    answer = httpx.post(f"{server.url}/chat/completions", json=body, timeout=120).json()
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] == "get_weather"
    assert arguments["city"] in ("Bonn", "Bad Ems")
    assert arguments["rain"] in (True, False)
    assert len(arguments) == 2
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    body |= {"tool_choice": "auto", "response_format": form}
    (choice,) = httpx.post(f"{server.url}/chat/completions", json=body, timeout=120).json()["choices"]
    message = choice["message"]
    texts = [message["content"]] if message["content"] else [c["function"]["arguments"] for c in message["tool_calls"]]
    assert all(set(json.loads(text)) == {"city", "rain"} for text in texts)
