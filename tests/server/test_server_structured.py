"""What the output must be, as clients say it: what is refused, and what the built-in model then answers."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from server_fakes import FakeEngine, RunningServer, running_server, tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "name": {"enum": ["Ann", "Bö"]}},
    "required": ["age", "name"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
TAGS = {"structures": [{"begin": "<f=", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
HARD = {"type": "object", "patternProperties": {f"^a{i}_.*b$": {} for i in range(300)}}


@pytest.fixture(scope="module")
def fake() -> Iterator[RunningServer]:
    with running_server(FakeEngine()) as server:
        yield server


@pytest.fixture
def server(real_server: RunningServer) -> RunningServer:
    return real_server


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "json_schema"),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, "response_format.schema", ""),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format.format", ""),
        ({"response_format": {"type": "xml"}}, "response_format.type", ""),
        ({"guided_json": {"not": {}}}, "guided_json", '"not"'),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", '"uniqueItems"'),
        ({"guided_json": {"type": "string", "format": "hostname?"}}, "guided_json", "hostname?"),
        ({"guided_json": {"x-guidance": {"lenient": True}, "contains": {}}}, "guided_json", '"contains"'),
        ({"guided_json": {"$ref": "http://example.com/s"}}, "guided_json", "example.com"),
        ({"guided_json": {"type": "integer", "minimum": 2, "maximum": 1}}, "guided_json", "minimum"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", ""),
        ({"guided_json": "{"}, "guided_json", "JSON"),
        ({"guided_json": HARD}, "guided_json", "300 patternProperties"),
        ({"guided_json": '{"items":' * 5000 + "{}" + "}" * 5000}, "guided_json", ""),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look-ahead"),
        ({"guided_regex": "a" * 300_000}, "guided_regex", "300000 bytes"),
        ({"guided_regex": "(" * 50_000 + ")" * 50_000}, "guided_regex", ""),
        ({"guided_regex": "\ud83d"}, "guided_regex", ""),
        ({"guided_choice": []}, "guided_choice", ""),
        ({"guided_grammar": "hello"}, "guided_grammar", "::="),
        ({"guided_grammar": "start: " + "a? " * 6000 + '\na: "x"'}, "guided_grammar", "bytes"),
        ({"structured_outputs": {}}, "structured_outputs", "json"),
        ({"structured_outputs": {"json": SCHEMA, "backend": "x"}}, "structured_outputs.backend", ""),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice", "Only one"),
        ({"response_format": FORMAT, "guided_regex": "a"}, "guided_regex", "Only one"),
        ({"response_format": {"type": "structural_tag", **TAGS, "triggers": ["<g"]}}, "response_format", "<f="),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", ""),
        ({"grammar": "root ::= [0-9]"}, "grammar", "structured_outputs"),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_named(fake: RunningServer, body: dict[str, Any], param: str, words: str) -> None:
    headers = {"content-type": "application/json"}
    for path, rest in (("completions", {"prompt": "x"}), ("chat/completions", {"messages": [_user("x")]})):
        response = httpx.post(f"{fake.url}/{path}", content=json.dumps({**rest, **body}), headers=headers, timeout=60)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"] == param
        assert words in response.json()["error"]["message"]
        assert len(response.json()["error"]["message"]) < 700


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused() -> None:
    engine = FakeEngine()
    engine.tokenizer = type("Words", (), {"spells_bytes": False, "encode": tokenizer().encode, "longest_token": 9})()
    with running_server(engine) as server:
        response = httpx.post(f"{server.url}/completions", json={"prompt": "x", "guided_regex": "a"}, timeout=60)
    assert response.status_code == 400 and "do not stand for bytes" in response.text


def test_every_way_to_ask_is_followed(server: RunningServer) -> None:
    def holds(text: str) -> bool:
        jsonschema.validate(json.loads(text), SCHEMA)
        return True

    ways: list[tuple[dict[str, Any], Any]] = [
        ({"response_format": FORMAT}, holds),
        ({"response_format": {**FORMAT, "json_schema": {"schema": SCHEMA}}}, holds),
        ({"structured_outputs": {"json": SCHEMA}}, holds),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, holds),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, holds),
        ({"structured_outputs": {"regex": r"^\d{3}-[a-c]{1,5}x$"}, "temperature": 2}, r"\d{3}-[a-c]{1,5}x"),
        ({"guided_regex": "[ab]{4}", "n": 3, "seed": 3, "logprobs": True, "top_logprobs": 2}, "[ab]{4}"),
        ({"guided_choice": ["red", "größer", 'a "b"']}, 'red|größer|a "b"'),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9]{2} "b"'}}, "a[0-9]{2}b"),
        ({"guided_grammar": 'start: "x" /[0-9]{2}/'}, "x[0-9]{2}"),
        ({"guided_regex": "[ab]{1,6}", "min_tokens": 3, "stop_token_ids": [99]}, "[ab]{3,6}"),
        ({"guided_regex": "a{2}", "min_tokens": 9}, "aa"),
        ({"guided_regex": "(ab?){2,3}", "ignore_eos": True}, "(ab?){3}"),
        ({"response_format": {"type": "text"}}, "(?s).*"),
    ]  # fmt: skip

    def ask(way: dict[str, Any], want: Any) -> None:
        body = {"messages": [_user("hi")], "max_tokens": 90, "temperature": 0, **way}
        response = httpx.post(f"{server.url}/chat/completions", json=body, timeout=120)
        assert response.status_code == 200, (way, response.text)
        for choice in response.json()["choices"]:
            text = choice["message"]["content"]
            assert choice["finish_reason"] == "stop", (way, text)
            assert re.fullmatch(want, text) if isinstance(want, str) else want(text), (way, text)
            if way.get("logprobs"):
                entries = choice["logprobs"]["content"]
                assert "".join(bytes(entry["bytes"]).decode() for entry in entries).startswith(text)

    failed: list[BaseException] = []

    def safely(*way: Any) -> None:
        try:
            ask(*way)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=safely, args=way) for way in ways]  # as one batch, by and large
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def test_tags_lengths_stops_and_streams(server: RunningServer) -> None:
    with openai.OpenAI(base_url=server.url, api_key="none") as client:
        chat: Any = client.chat.completions
        ask: dict[str, Any] = {"model": "tiny-qwen3", "messages": [_user("hi")], "temperature": 0, "max_tokens": 60}
        chunks = list(chat.create(**ask, response_format=FORMAT, stream=True))
        whole = chat.create(**ask, response_format=FORMAT)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == "stop"
        cut = chat.create(**{**ask, "max_tokens": 3}, response_format=FORMAT)
        assert cut.choices[0].finish_reason == "length"
        stopped = chat.create(**ask, extra_body={"guided_regex": "a{3}bc"}, stop="b")
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("aaa", "stop")
        free = chat.create(**ask, response_format={"type": "structural_tag", **TAGS}).choices[0].message.content
        assert free == chat.create(**ask).choices[0].message.content and "<f" not in free
        with pytest.raises(openai.BadRequestError, match="bad_words"):  # the client would try a 500 again
            chat.create(**ask, extra_body={"guided_regex": "ab", "bad_words": ["b"]})


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
