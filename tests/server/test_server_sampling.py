"""From a request's fields to what the engine is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fakes import MAX_MODEL_LEN, TINY, FakeEngine, RunningServer, running_server, tokenizer
from tokenizers import processors

from miniserve.core import SamplingParams
from miniserve.engine.tokenizer import Tokenizer

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
MODEL_DEFAULTS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 7}


@pytest.fixture(scope="module")
def plain() -> Iterator[RunningServer]:
    with running_server(trust_request_chat_template=True) as server:
        yield server


@pytest.fixture(scope="module")
def tuned() -> Iterator[RunningServer]:
    with running_server(FakeEngine(sampling=dict(MODEL_DEFAULTS))) as server:
        yield server


def asked(server: RunningServer, path: str, body: dict[str, Any]) -> tuple[list[int], SamplingParams]:
    response = httpx.post(server.url + path, json=body, timeout=30)
    assert response.status_code == 200, response.text
    return server.engine.seen[-1]


def completion(server: RunningServer, **body: Any) -> SamplingParams:
    return asked(server, "/completions", {"prompt": "x", **body})[1]


def test_openais_defaults(plain: RunningServer) -> None:
    assert completion(plain) == SamplingParams(max_tokens=16)
    prompt, params = asked(plain, "/chat/completions", CHAT)
    assert params == SamplingParams(max_tokens=MAX_MODEL_LEN - len(prompt))


def test_the_models_defaults_come_before_openais_and_after_the_requests(tuned: RunningServer) -> None:
    assert completion(tuned) == SamplingParams(temperature=0.6, top_p=0.95, top_k=20, max_tokens=16)
    params = completion(tuned, temperature=0, top_p=None, top_k=0, min_p=0.1)
    assert params == SamplingParams(temperature=0, top_p=0.95, top_k=0, min_p=0.1, max_tokens=16)


def test_the_models_max_new_tokens_is_the_default_of_chat(tuned: RunningServer) -> None:
    assert asked(tuned, "/chat/completions", CHAT)[1].max_tokens == 7
    assert asked(tuned, "/chat/completions", {**CHAT, "max_tokens": 9})[1].max_tokens == 9


def test_every_field_arrives(plain: RunningServer) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5, "top_k": 3, "top_p": 0.5, "min_p": 0.25, "repetition_penalty": 1.5, "n": 2,
        "presence_penalty": -1, "frequency_penalty": 0.5, "seed": -5, "stop_token_ids": [7, 8], "ignore_eos": True,
        "include_stop_str_in_output": True, "min_tokens": 2, "max_tokens": 3, "skip_special_tokens": False,
    }  # fmt: skip
    expected = SamplingParams(**{**fields, "stop_token_ids": (7, 8)}, stop=("a", "b"), logit_bias={5: 1.5, 6: -100.0})
    more = {"stop": ["a", "b"], "logit_bias": {"5": 1.5, "6": -100}}
    assert completion(plain, **fields, **more) == expected
    assert asked(plain, "/chat/completions", {**CHAT, **fields, **more})[1] == expected


def test_a_seed_of_minus_one_is_none(plain: RunningServer) -> None:
    assert completion(plain, seed=-1).seed is None and completion(plain, seed=-2).seed == -2
    assert asked(plain, "/chat/completions", {**CHAT, "seed": -1})[1].seed is None


def test_shapes_of_stop(plain: RunningServer) -> None:
    assert completion(plain, stop="a").stop == ("a",)
    assert completion(plain, stop=[]).stop == ()
    assert completion(plain, stop=None).stop == ()
    assert completion(plain, stop=list("abcdefgh")).stop == tuple("abcdefgh")


def test_top_k_beyond_the_vocabulary_is_off_without_being_a_large_number(plain: RunningServer) -> None:
    assert completion(plain, top_k=2**40).top_k == 2048
    assert completion(plain, top_k=-1).top_k == -1


def test_logprobs(plain: RunningServer) -> None:
    assert (completion(plain).logprobs, completion(plain).prompt_logprobs) == (None, None)
    params = completion(plain, logprobs=3)
    assert (params.logprobs, params.prompt_logprobs) == (3, None)
    params = completion(plain, logprobs=3, echo=True)
    assert (params.logprobs, params.prompt_logprobs) == (3, 3)
    assert completion(plain, echo=True).prompt_logprobs is None
    chat = asked(plain, "/chat/completions", {**CHAT, "max_tokens": 1, "logprobs": True})[1]
    assert chat.logprobs == 0
    chat = asked(plain, "/chat/completions", {**CHAT, "max_tokens": 1, "logprobs": True, "top_logprobs": 4})[1]
    assert chat.logprobs == 4
    chat = asked(plain, "/chat/completions", {**CHAT, "max_tokens": 1, "logprobs": False, "top_logprobs": 0})[1]
    assert chat.logprobs is None


def test_the_newer_name_of_max_tokens_wins(plain: RunningServer) -> None:
    body = {**CHAT, "max_tokens": 3, "max_completion_tokens": 5}
    assert asked(plain, "/chat/completions", body)[1].max_tokens == 5


def test_best_of_and_greedy_under_their_other_names(plain: RunningServer) -> None:
    assert completion(plain, best_of=1, n=2).n == 2
    assert completion(plain, best_of=2, n=2).n == 2
    assert completion(plain, do_sample=False, temperature=0).greedy


def prompt_text(server: RunningServer, messages: list[dict[str, Any]], **body: Any) -> str:
    ids, _ = asked(server, "/chat/completions", {"messages": messages, "max_tokens": 1, **body})
    return tokenizer().decode(ids, False)


def test_roles_and_parts_as_templates_know_them(plain: RunningServer) -> None:
    text = prompt_text(
        plain,
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": None},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]},
            {"role": "critic", "content": "", "name": "x"},
        ],
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nonetwo<|im_end|>\n"
        "<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>assistant\nI cannot.<|im_end|>\n<|im_start|>critic\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_last_message_may_be_continued_or_left_open(plain: RunningServer) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Once"}]
    start = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOnce"
    assert prompt_text(plain, messages, continue_final_message=True) == start
    assert prompt_text(plain, messages, continue_final_message=True, add_generation_prompt=False) == start
    assert prompt_text(plain, messages, add_generation_prompt=False) == start + "<|im_end|>\n"


def test_a_requests_own_template_and_variables_where_the_server_trusts_it(plain: RunningServer) -> None:
    template = "{{ messages[0].content }}-{{ tone }}-{{ documents[0].title }}"
    text = prompt_text(
        plain,
        [{"role": "user", "content": "Hi"}],
        chat_template=template,
        chat_template_kwargs={"tone": "dry"},
        documents=[{"title": "T"}],
    )
    assert text == "Hi-dry-T"


def test_a_template_that_refuses_is_a_400(plain: RunningServer) -> None:
    for template in (
        "{{ raise_exception('roles must alternate') }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ messages[0].x.y }}",
        "only ever this",
    ):
        response = httpx.post(f"{plain.url}/chat/completions", json={**CHAT, "chat_template": template})
        assert response.status_code == 400, template
        assert response.json()["error"]["param"] == "messages"


def test_a_template_that_runs_for_ever_is_a_400_and_stops_nobody(plain: RunningServer) -> None:
    numbers = "range(99999)"
    template = "".join(f"{{% for {name} in {numbers} %}}" for name in "abc") + "{% endfor %}" * 3

    async def ask() -> tuple[httpx.Response, list[httpx.Response]]:
        async with httpx.AsyncClient(base_url=plain.url, timeout=60) as client:
            bad = asyncio.create_task(client.post("/chat/completions", json={**CHAT, "chat_template": template}))
            others = []
            while not bad.done():
                others.append(await client.post("/chat/completions", json={**CHAT, "max_tokens": 1}))
            return await bad, others

    refused, others = asyncio.run(ask())
    assert refused.status_code == 400
    assert "more time or memory" in refused.json()["error"]["message"]
    assert len(others) > 1 and all(response.status_code == 200 for response in others)


def test_special_tokens_may_be_added_to_a_chat() -> None:
    """Most templates write the BOS themselves; some leave it to the tokenizer."""
    engine = FakeEngine()
    engine.tokenizer = Tokenizer(TINY)
    engine.tokenizer._backend.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 2045)]
    )

    def ids(path: str, **body: Any) -> list[int]:
        response = httpx.post(server.root + path, json={**CHAT, **body})
        assert response.status_code == 200, response.text
        return list(response.json()["tokens"] if path == "/tokenize" else engine.seen[-1][0])

    with running_server(engine) as server:
        for path in ("/tokenize", "/v1/chat/completions"):
            without = ids(path, add_special_tokens=False)
            assert ids(path, add_special_tokens=True) == [2045, *without]
            assert ids(path) == without
