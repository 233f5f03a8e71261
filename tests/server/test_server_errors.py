"""Every refusal is OpenAI's envelope with the right status, and names the field at fault."""

from __future__ import annotations

import gzip
import http.client
import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from server_fakes import FakeEngine, RunningServer, running_server

from miniserve.server.errors import APIError
from miniserve.server.fields import IGNORED, Body
from miniserve.server.protocol import ChatCompletionRequest, CompletionRequest, TokenizeRequest

COMPLETION: dict[str, Any] = {"prompt": "Once", "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TWO_PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
TWO_TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well"}]
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(max_body_bytes=20_000, max_prompts=8) as server:
        yield server


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.root, timeout=30) as client:
        yield client


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    assert len(response.content) < 2000
    error: dict[str, Any] = body["error"]
    return error


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{", "application/json"),
        (b"", "application/json"),
        (b"[1]", "application/json"),
        (b'"x"', "application/json"),
        (b"null", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 10_000, "application/json"),
        (b'{"n": ' + b"9" * 5000 + b"}", "application/json"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "text/plain"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "application/x-www-form-urlencoded"),
        (b'{"prompt": "a"}', ""),
    ],
)
def test_a_body_that_is_no_json_object_is_a_400(
    web: httpx.Client, path: str, content: bytes, content_type: str
) -> None:
    error = error_of(web.post(path, content=content, headers={"content-type": content_type}), 400)
    assert error["type"] == "BadRequestError"
    assert error["param"] is None
    assert "JSON" in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [""]),
        ("prompt", [[]]),
        ("prompt", ["a", ""]),
        ("prompt", ["a", 5, {}]),
        ("prompt", [1.5]),
        ("prompt", [True]),
        ("prompt", [-1]),
        ("prompt", [2048]),
        ("prompt", [[5], [99999999999999999999]]),
        ("prompt", {"a": 1}),
        ("prompt", "\ud800"),
        ("prompt", ["fine", "\udfff"]),
        ("temperature", -0.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("top_k", -2),
        ("top_k", 10**30),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-40),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("n", 0),
        ("n", 129),
        ("n", -1),
        ("max_tokens", -1),
        ("max_tokens", 0),
        ("max_tokens", "many"),
        ("min_tokens", 17),
        ("seed", 2**63),
        ("seed", "x"),
        ("logprobs", 21),
        ("logprobs", -1),
        ("logprobs", True),
        ("best_of", 0),
        ("best_of", 129),
        ("allowed_token_ids", []),
        ("allowed_token_ids", [2048]),
        ("bad_words", [""]),
        ("bad_words", ["a" * 129]),
        ("bad_words", [str(number) for number in range(257)]),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
        ("logprob_token_ids", [5]),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("truncate_prompt_tokens", 257),
        ("truncation_side", "left"),
        ("truncation_side", "middle"),
        ("priority", 2**63),
        ("priority", "high"),
        ("cache_salt", ""),
        ("cache_salt", "a" * 257),
        ("stop", [""]),
        ("stop", 5),
        ("stop", [str(number) for number in range(257)]),
        ("stop_token_ids", [4000]),
        ("stop_token_ids", [-1]),
        ("logit_bias", {"5": 200}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"5000": 1}),
        ("logit_bias", {"5": float("nan")}),
        ("logit_bias", [1]),
        ("stream_options", {"include_usage": True}),
        ("stream", "perhaps"),
        ("suffix", "end"),
        ("suffix", ""),
        ("do_sample", False),
    ],
)
def test_a_completion_field_out_of_range_is_named(web: httpx.Client, field: str, value: object) -> None:
    content = json.dumps({"prompt": "Once", field: value})
    error = error_of(web.post("/v1/completions", content=content, headers={"content-type": "application/json"}), 400)
    assert error["param"] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]}, "messages[0].content[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["Hi"]}]}, "messages[0].content[0]"),
        ({"documents": [{"title": "T", "text": "x"}]}, "documents"),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"messages": [*TWO_TURNS[:1], {**TWO_TURNS[1], "prefix": True}]}, "messages[1].prefix"),
        ({"messages": [*TWO_TURNS[:1], {**TWO_TURNS[1], "partial": True}]}, "messages[1].partial"),
        ({"best_of": 2}, "best_of"),
        ({"echo": True}, "echo"),
        ({"echo": True, "continue_final_message": True, "messages": TWO_PARTS}, "echo"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"logprobs": True, "logprob_token_ids": [5, 5]}, "logprob_token_ids"),
        ({"logit_bias": {"bad1": 1, "5": 1, "bad2": 1}}, "logit_bias"),
        ({"allowed_token_ids": [5, 2047], "min_tokens": 1, "stop_token_ids": [5]}, "allowed_token_ids"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_a_chat_field_that_cannot_be_served_is_named(web: httpx.Client, change: dict[str, Any], param: str) -> None:
    content = json.dumps({**CHAT, **change})
    headers = {"content-type": "application/json"}
    error = error_of(web.post("/v1/chat/completions", content=content, headers=headers), 400)
    assert error["param"] == param
    assert param.split("[")[0] in error["message"]


def other_value(neutral: tuple[object, ...]) -> object:
    return True if neutral == (False,) else False if neutral == (True,) else {"type": "something"}


@pytest.mark.parametrize(
    ("path", "model"), [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatCompletionRequest)]
)
def test_unsupported_fields_are_refused_unless_they_ask_for_nothing(
    web: httpx.Client, path: str, model: type[Body]
) -> None:
    for name, (neutral, *_) in model.refused.items():
        if path == "/v1/chat/completions" and name == "best_of":
            continue  # an integer there
        error = error_of(web.post(path, json={**BODIES[path], name: other_value(neutral)}), 400)
        assert error["param"] == name
        for value in (None, *neutral):
            assert web.post(path, json={**BODIES[path], name: value}).status_code == 200, (name, value)


@pytest.mark.parametrize(
    ("path", "model"), [("/v1/completions", CompletionRequest), ("/v1/chat/completions", ChatCompletionRequest)]
)
def test_null_is_the_same_as_leaving_a_field_out(web: httpx.Client, path: str, model: type) -> None:
    optional = [name for name, field in model.model_fields.items() if not field.is_required()]  # type: ignore[attr-defined]
    assert len(optional) > 20
    plain = web.post(path, json=BODIES[path]).json()["choices"]
    for name in optional:
        if name == "max_tokens":
            continue  # its default is another one than that of BODIES
        response = web.post(path, json={**BODIES[path], name: None})
        assert response.status_code == 200, (name, response.text)
        assert response.json()["choices"] == plain
    assert web.post(path, json={**dict.fromkeys(optional), **BODIES[path]}).json()["choices"] == plain
    assert web.post(path, json={**BODIES[path], "max_tokens": None}).status_code == 200


def test_true_is_not_the_number_one(web: httpx.Client) -> None:
    for name, value in (("num_beams", True), ("length_penalty", True), ("use_beam_search", 0)):
        assert error_of(web.post("/v1/completions", json={**COMPLETION, name: value}), 400)["param"] == name
    assert web.post("/v1/completions", json={**COMPLETION, "length_penalty": 1.0}).is_success


def test_null_options_of_a_stream_and_of_tokenize(web: httpx.Client) -> None:
    options = {"include_usage": None, "continuous_usage_stats": None}
    for value in (None, {}, options):
        assert web.post("/v1/completions", json={**COMPLETION, "stream": True, "stream_options": value}).is_success
    fields = {name: None for name in TokenizeRequest.model_fields if name != "prompt"}
    assert web.post("/tokenize", json={"prompt": "a", **fields}).is_success


def test_fields_without_effect_are_accepted_and_unknown_ones_warned_about_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    silent = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "prediction": {}, "seed": 1}
    unknown = {"made_up_field": 1, "another": 9}
    with running_server() as server, caplog.at_level(logging.WARNING, "miniserve"):
        for _ in range(3):
            body = {**COMPLETION, **silent, **unknown}
            assert httpx.post(f"{server.url}/completions", json=body).is_success
        for name in ("x" * 5000, "two\nlines"):
            assert httpx.post(f"{server.url}/completions", json={**COMPLETION, name: 1}).is_success
        for _ in range(2):
            unused = CHAT | {"chat_template_kwargs": {"made_up": 1}}
            assert httpx.post(f"{server.url}/chat/completions", json=unused).is_success
    messages = [record.getMessage() for record in caplog.records if record.name == "miniserve.server.fields"]
    assert len(messages) == 5
    assert "made_up_field" in messages[0]
    assert "chat_template_kwargs.made_up" in messages[-1]
    assert all(len(message) < 300 and "\n" not in message for message in messages)


# What OpenAI's, and others', clients send by default; the answer is the same without.
CLIENT_FIELDS = frozenset({
    "audio", "background", "chat_id", "conversation", "conversation_id", "deployment_id", "details", "extra_headers",
    "fallbacks", "format", "frequency_penalty", "function_call", "functions", "include", "instructions",
    "instruction_template", "keep_alive", "logit_bias", "logprobs", "max_completion_tokens", "max_tool_calls",
    "metadata", "modalities", "mode", "model", "moderation", "n", "num_ctx", "parallel_tool_calls", "prediction",
    "preset", "previous_response_id", "presence_penalty", "prompt_cache_key", "prompt_cache_retention", "provider",
    "raw", "reasoning", "response_format", "rid", "route", "safety_identifier", "seed", "service_tier", "session",
    "speed", "step", "stop", "store", "stream", "stream_options", "suffix", "system", "tags", "temperature", "text",
    "timeout", "tool_choice", "tools", "top_logprobs", "top_p", "transforms", "user", "user_id", "verbosity",
    "web_search_options",
})  # fmt: skip


def test_no_field_of_ordinary_clients_is_taken_for_a_misspelt_one(web: httpx.Client) -> None:
    for path, body in BODIES.items():
        for name in CLIENT_FIELDS | IGNORED:
            assert web.post(path, json={**body, name: None}).is_success, name


def test_a_name_that_passed_elsewhere_is_still_misspelt_here(web: httpx.Client) -> None:
    assert web.post("/tokenize", json={"prompt": "a", "max_token": 1}).is_success
    assert web.post("/v1/completions", json={**COMPLETION, "max_token": 1}).status_code == 400


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("separate_reasoning", False, "include_reasoning"),
        ("n_predict", 1, "max_tokens"),
        ("max_new_tokens", 1, "max_tokens"),
        ("max_output_tokens", 1, "max_tokens"),
        ("options", {"num_predict": 5}, "max_tokens"),
        ("sampling_params", {"max_new_tokens": 5}, "max_tokens"),
        ("repeat_penalty", 1.1, "repetition_penalty"),
        ("repeat_last_n", 64, "repetition_penalty"),
        ("samplers", ["top_k"], "top_k"),
        ("dynatemp_range", 0.5, "leave it out"),
        ("lora", [{"id": 0, "scale": 1}], "leave it out"),
        ("n_probs", 5, "logprobs"),
        ("random_seed", 5, "use seed"),
        ("sampling_seed", 5, "use seed"),
        ("max_tokens_to_sample", 1, "use max_tokens"),
        ("system", "Be brief.", "role is system"),
        ("format", "json", "leave it out"),
        ("reasoning", {"effort": "low"}, "chat_template_kwargs"),
        ("guidance_scale", 2, "leave it out"),
        ("return_tokens", True, "return_token_ids"),
        ("stop_regex", "a+", "stop"),
        ("no_stop_trim", True, "include_stop_str_in_output"),
        ("input_ids", [1], "prompt"),
        ("return_hidden_states", True, "leave it out"),
        ("return_prompt_token_ids", True, "return_token_ids"),
        ("custom_params", {"a": 1}, "leave it out"),
        ("watermark", True, "leave it out"),
        ("watermarking", {"a": 1}, "leave it out"),
        ("return_token_offsets", True, "leave it out"),
        ("enable_thinking", False, "chat_template_kwargs"),
        ("spaces_between_special_tokens", False, "leave it out"),
        ("extra_body", {"top_k": 1}, "fields of the request itself"),
        ("max_token", 5, "max_tokens"),
        ("maxTokens", 5, "max_tokens"),
        ("minTokens", 1, "min_tokens"),
        ("temprature", 0.5, "temperature"),
        ("tempreture", 0.5, "temperature"),
        ("tempareture", 0.5, "temperature"),
        ("tsream", True, "stream"),
        ("strean", True, "stream"),
        ("presense_penalti", 0.5, "presence_penalty"),
        ("top-p", 0.5, "top_p"),
        ("reponse_format", {"type": "json_object"}, "response_format"),
        ("maxNewTokens", 5, "use max_tokens"),
        ("max_gen_toks", 1, "use max_tokens"),
        ("truncate", 5, "truncate_prompt_tokens"),
        ("request_id", "a", "X-Request-Id"),
        ("return_full_text", True, "echo"),
        ("details", True, "logprobs"),
        ("n_keep", 4, "truncate_prompt_tokens"),
        ("adapter_id", "a", "leave it out"),
        ("verbosity", "low", "in a message"),
        ("previous_response_id", "r", "conversation"),
    ],
)
def test_another_servers_name_or_a_misspelt_one_is_answered_with_ours(
    web: httpx.Client, path: str, name: str, value: object, remedy: str
) -> None:
    error = error_of(web.post(path, json={**BODIES[path], name: value}), 400)
    assert error["param"] == name
    assert remedy in error["message"].replace(name, "", 1)


@pytest.mark.parametrize("path", BODIES)
def test_what_lm_eval_leaves_beside_max_tokens_is_taken_where_it_stops_nothing_sooner(
    web: httpx.Client, path: str
) -> None:
    for left in ({"max_gen_toks": 2}, {"max_new_tokens": 256, "num_beams": 1, "do_sample": False, "temperature": 0}):
        assert web.post(path, json={**BODIES[path], **left}).is_success
    for wrong in (True, "2", 1.5, 1):
        assert error_of(web.post(path, json={**BODIES[path], "max_gen_toks": wrong}), 400)["param"] == "max_gen_toks"


def test_settings_that_contradict_each_other_are_refused(web: httpx.Client) -> None:
    usage = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    error = error_of(web.post("/v1/completions", json=COMPLETION | usage), 400)
    assert error["param"] == "stream_options.continuous_usage_stats"
    for draw, temperature in ((True, 0), (False, 1)):
        asked = {"do_sample": draw, "temperature": temperature}
        assert error_of(web.post("/v1/completions", json=COMPLETION | asked), 400)["param"] == "do_sample"
        assert web.post("/v1/completions", json=COMPLETION | asked | {"temperature": 1 - temperature}).is_success


def test_a_field_name_that_is_no_text_is_said_to_be_none(web: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for content, param in (
        (b'{"prompt": "a", "\\ud800": 1}', None),
        (b'{"prompt": "a", "stream": true, "stream_options": {"\\udfff": 1}}', "stream_options"),
    ):
        error = error_of(web.post("/v1/completions", content=content, headers=headers), 400)
        assert error["param"] == param
        assert "name of a field holds half of a surrogate pair" in error["message"]


def test_a_strict_server_takes_no_unknown_field() -> None:
    with running_server(strict_fields=True) as server:
        for path, body in BODIES.items():
            for _ in range(2):
                error = error_of(httpx.post(server.root + path, json={**body, "made_up_id": 9}), 400)
                assert error["param"] == "made_up_id"
            assert httpx.post(server.root + path, json={**body, "user": "me", "suffix": None}).is_success
        unused = CHAT | {"chat_template_kwargs": {"made_up": 1}}
        error = error_of(httpx.post(f"{server.url}/chat/completions", json=unused), 400)
        assert error["param"] == "chat_template_kwargs.made_up"


def test_misspelt_fields_of_other_bodies_are_named(web: httpx.Client) -> None:
    streaming = {**COMPLETION, "stream": True, "stream_options": {"include_usge": True}}
    assert error_of(web.post("/v1/completions", json=streaming), 400)["param"] == "include_usge"
    assert error_of(web.post("/tokenize", json={"prompt": "a", "add_special_token": False}), 400)["param"]
    assert error_of(web.post("/detokenize", json={"tokens": [1], "modle": "other"}), 400)["param"] == "modle"


def test_what_would_change_tokens_or_text_is_not_passed_over(web: httpx.Client) -> None:
    of_conversations = {"tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"a": 1}}
    for name, value in {"truncate_prompt_tokens": 2, "continue_final_message": True, **of_conversations}.items():
        assert error_of(web.post("/tokenize", json={"prompt": "a", name: value}), 400)["param"] == name
    body = {"tokens": [1], "skip_special_tokens": True}
    assert error_of(web.post("/detokenize", json=body), 400)["param"] == "skip_special_tokens"


def test_too_many_unknown_fields_are_refused(web: httpx.Client) -> None:
    error = error_of(web.post("/v1/completions", json=COMPLETION | {f"field {i}": 1 for i in range(65)}), 400)
    assert "65 unknown fields" in error["message"]


def test_an_unknown_model_is_a_404_and_no_model_is_fine(web: httpx.Client) -> None:
    for path, body in BODIES.items():
        error = error_of(web.post(path, json={**body, "model": "other"}), 404)
        assert (error["type"], error["param"], error["code"]) == ("NotFoundError", "model", "model_not_found")
        assert "`other` does not exist" in error["message"]
        assert web.post(path, json=body).json()["model"] == "tiny/fake"
    error_of(web.post("/v1/completions", json={**COMPLETION, "model": "x" * 5000}), 404)


def test_a_prompt_may_fill_the_context_but_for_one_token(web: httpx.Client) -> None:
    def post(length: int, **more: object) -> httpx.Response:
        return web.post("/v1/completions", json={"prompt": [[7] * length], **more})

    assert post(255, max_tokens=1).json()["usage"]["completion_tokens"] == 1
    assert post(200, max_tokens=56).json()["usage"]["completion_tokens"] == 56
    assert post(250).json()["usage"]["completion_tokens"] == 6, "the default is no wish"
    assert post(256, echo=True, max_tokens=0).is_success
    for response in (post(256), post(257, echo=True, max_tokens=0)):
        error = error_of(response, 400)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "input_tokens"
    assert "256 tokens" in error["message"]
    assert "257 input tokens" in error["message"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_more_output_than_the_context_holds_is_refused_with_the_numbers(web: httpx.Client, name: str) -> None:
    chat = {key: value for key, value in CHAT.items() if key != "max_tokens"}
    bodies = {"/v1/chat/completions": chat} | ({"/v1/completions": COMPLETION} if name == "max_tokens" else {})
    for path, body in bodies.items():
        prompt_len = web.post(path, json={**body, name: 2}).json()["usage"]["prompt_tokens"]
        room = 256 - prompt_len
        assert web.post(path, json={**body, name: room}).json()["usage"]["completion_tokens"] == room
        for asked in (room + 1, 100_000):
            error = error_of(web.post(path, json={**body, name: asked}), 400)
            assert (error["param"], error["code"]) == (name, "context_length_exceeded")
            for number in (256, prompt_len, asked, room):
                assert str(number) in error["message"]


def test_a_text_of_more_characters_than_the_context_could_hold_is_not_tokenized(
    web: httpx.Client, server: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest = server.engine.tokenizer.longest_token
    most = 256 * longest
    assert 3 < longest < 50
    encoded: list[int] = []
    encode = server.engine.tokenizer.encode

    def counted(text: str, add_special_tokens: bool = True) -> list[int]:
        encoded.append(len(text))
        return encode(text, add_special_tokens)

    monkeypatch.setattr(server.engine.tokenizer, "encode", counted)
    long_message = {"messages": [{"role": "user", "content": "a" * (most + 1)}]}
    for path, body in (
        ("/v1/completions", {"prompt": "a" * (most + 1)}),
        ("/v1/completions", {"prompt": ["a", "a" * (most + 1)]}),
        ("/v1/chat/completions", long_message),
    ):
        error = error_of(web.post(path, json=body), 400)
        assert (error["param"], error["code"]) == ("input_tokens", "context_length_exceeded")
        assert "maximum context length is 256 tokens" in error["message"]
    assert encoded == []
    error_of(web.post("/v1/completions", json={"prompt": "a" * most}), 400)
    assert encoded == [most]
    for text in ({"prompt": "a" * (most + 1)}, long_message):
        assert web.post("/tokenize", json=text).json()["count"] > 256


def test_the_tokenizers_own_limits() -> None:
    with running_server() as server:
        url = server.root
        error = error_of(httpx.post(f"{url}/tokenize", json={"prompt": "a" * 1_048_577}, timeout=60), 400)
        assert error["param"] == "prompt"
        error = error_of(httpx.post(f"{url}/detokenize", json={"tokens": [65] * 262_145}, timeout=60), 400)
        assert error["param"] == "tokens"
        body = {"prompt": "\U0001f9ff" * 100_000, "return_token_strs": True}
        error = error_of(httpx.post(f"{url}/tokenize", json=body, timeout=60), 400)
        assert error["param"] == "return_token_strs"
        ids = httpx.post(f"{url}/tokenize", json={"prompt": "some text " * 4000}, timeout=60).json()["tokens"]
        assert len(ids) > 4096
        assert httpx.post(f"{url}/detokenize", json={"tokens": ids}, timeout=60).json()["prompt"] == "some text " * 4000


def test_the_number_of_sequences_is_limited(web: httpx.Client) -> None:
    assert web.post("/v1/completions", json={"prompt": ["a"] * 4, "n": 2, "max_tokens": 1}).is_success
    assert error_of(web.post("/v1/completions", json={"prompt": ["a"] * 9}), 400)["param"] == "prompt"
    assert error_of(web.post("/v1/completions", json={"prompt": ["a"] * 3, "n": 3}), 400)["param"] == "n"


def test_a_large_body_is_refused_by_its_declared_length(web: httpx.Client, server: RunningServer) -> None:
    before = len(server.engine.seen)
    error_of(web.post("/v1/completions", json={"prompt": "a" * 20_000}), 413)
    error_of(web.post("/nowhere", content=b"a" * 30_000), 413)
    assert web.post("/v1/completions", json={"prompt": "a" * 10, "user": "b" * 19_000, "max_tokens": 1}).is_success
    assert len(server.engine.seen) == before + 1


def test_a_large_body_without_a_length_is_refused_while_it_is_read(server: RunningServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 400_000_000:
            sent += 65_536
            yield b" " * 65_536

    try:
        connection.request(
            "POST", "/v1/completions", chunks(), {"Content-Type": "application/json"}, encode_chunked=True
        )
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["type"] == "RequestEntityTooLargeError"
    finally:
        connection.close()


def test_unknown_paths_and_methods_are_envelopes(web: httpx.Client) -> None:
    assert error_of(web.get("/v2/nothing"), 404)["type"] == "NotFoundError"
    assert error_of(web.get("/v1/models/a/b/c"), 404)["param"] == "model"
    error_of(web.get("/tokenizer_info"), 404)
    response = web.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_head_is_answered_as_get_without_a_body(web: httpx.Client) -> None:
    for path in ("/", "/health", "/ping", "/ready", "/version", "/metrics", "/v1/models", "/v1/models/tiny/fake"):
        head, get = web.head(path), web.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
    assert web.head("/nowhere").status_code == 404
    assert web.head("/v1/completions").status_code == 405


def test_a_slash_at_the_end_means_nothing(web: httpx.Client) -> None:
    assert web.get("/v1/models/").json() == web.get("/v1/models").json()
    assert web.get("/v1/models/tiny/fake/").json()["id"] == "tiny/fake"
    assert web.post("/v1/chat/completions/", json=CHAT).is_success


def test_a_compressed_body_is_a_415(web: httpx.Client) -> None:
    content = gzip.compress(json.dumps(COMPLETION).encode())
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert "gzip" in error_of(web.post("/v1/completions", content=content, headers=headers), 415)["message"]
    headers["content-encoding"] = "identity"
    assert web.post("/v1/completions", content=json.dumps(COMPLETION), headers=headers).is_success


def test_numbers_and_keys_are_named_as_they_are(web: httpx.Client) -> None:
    def message(**change: object) -> str:
        return str(error_of(web.post("/v1/completions", json={**COMPLETION, **change}), 400)["message"])

    assert "9223372036854775807" in message(seed=2**63)
    assert web.post("/v1/completions", json={**COMPLETION, "seed": 2**63 - 1}).is_success
    assert "'five'" in message(logit_bias={"7": 1, "five": 1})
    assert "'7'" in message(logit_bias={"7": True})
    assert "7 to 101" in message(logit_bias={"7": 101})
    assert "1024" in message(logit_bias={str(key): 1 for key in range(1025)})
    assert "same token id" in message(logit_bias={"7": 1, "07": -1})


def test_a_bug_is_a_500_envelope_that_tells_nothing_inside(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    with running_server(engine) as server, caplog.at_level(logging.CRITICAL):
        engine.generate = lambda *_: 1 / 0  # type: ignore[method-assign,assignment]
        for path, body in BODIES.items():
            error = error_of(httpx.post(server.root + path, json=body), 500)
            assert error["type"] == "InternalServerError"
            assert "division" not in error["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Basic k1"}, 401),
        ({"Authorization": "k1"}, 401),
        ({"x-api-key": "k1k2"}, 401),
        ({"Authorization": "Bearer k1"}, 200),
        ({"Authorization": "bearer k2"}, 200),
        ({"x-api-key": "k2"}, 200),
        ({"Authorization": "Bearer wrong", "x-api-key": "k1"}, 200),
        ({"Authorization": "Bearer schlüssel"}, 401),
    ],
)
def test_keys(keyed: RunningServer, headers: dict[str, str], status: int) -> None:
    raw = {name: value.encode() for name, value in headers.items()}
    for response in (
        httpx.get(f"{keyed.url}/models", headers=raw),
        httpx.post(f"{keyed.url}/completions", json=COMPLETION, headers=raw),
        httpx.get(f"{keyed.root}/v1/nowhere", headers=raw),
    ):
        if status == 401:
            error = error_of(response, 401)
            assert error["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        else:
            assert response.status_code != 401


@pytest.fixture(scope="module")
def keyed() -> Iterator[RunningServer]:
    with running_server(api_keys=("k1", "k2")) as server:
        yield server


def test_what_stays_open_beside_a_key(keyed: RunningServer) -> None:
    for path in ("/", "/health", "/ping", "/ready", "/version", "/metrics", "/openapi.json"):
        assert httpx.get(keyed.root + path).status_code == 200, path
    for path, body in (
        ("/tokenize", {"prompt": "a"}),
        ("/tokenize/", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        assert httpx.post(keyed.root + path, json=body).status_code == 401, path
        assert httpx.post(keyed.root + path, json=body, headers={"x-api-key": "k1"}).is_success
    assert httpx.options(f"{keyed.url}/completions").status_code == 405
    for path in ("/v1", "/v1/", "/%76%31/models"):
        assert httpx.get(keyed.root + path).status_code == 401, path


def test_without_a_key_any_key_is_fine(web: httpx.Client) -> None:
    for value in ("Bearer anything", "nonsense"):
        assert web.get("/v1/models", headers={"Authorization": value}).status_code == 200


def test_the_empty_key_of_lm_eval(server: RunningServer, keyed: RunningServer) -> None:
    for target, status in ((server, 200), (keyed, 401)):
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=30)
        connection.request("GET", "/v1/models", headers={"Authorization": "Bearer "})
        assert connection.getresponse().status == status
        connection.close()


def test_browsers_of_other_origins_are_let_in_only_by_name() -> None:
    asking = {"Origin": "http://app.example", "Access-Control-Request-Method": "POST"}
    with running_server(api_keys=("k",)) as server:
        response = httpx.get(f"{server.root}/health", headers=asking)
        assert "access-control-allow-origin" not in response.headers
    with running_server(api_keys=("k",), allowed_origins=("http://app.example",)) as server:
        response = httpx.options(f"{server.url}/completions", headers=asking)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "http://app.example"
        refused = httpx.get(f"{server.url}/models", headers=asking)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "http://app.example"
        stranger = httpx.get(f"{server.root}/health", headers={"Origin": "http://other.example"})
        assert "access-control-allow-origin" not in stranger.headers


def test_an_error_never_sends_a_long_or_broken_text_back() -> None:
    body = APIError(400, "\ud800" + "x" * 100_000, param="prompt").response({"path": "/v1/completions"}).body
    assert len(body) < 1200
    assert json.loads(body)["error"]["message"].startswith("?xxx")
