"""Anthropic's Messages and OpenAI's Responses through their official clients, over the stub engine with scripted
answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from dialect_texts import WRITERS
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from server_fakes import running_server
from server_scripted import ASKED, CALLS, TOOLS, Scripted, scripted

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
}
NOTHING = {"type": "object", "properties": {}}
MESSAGES_TOOLS: Any = [
    {"name": "get_weather", "description": "How the weather is.", "input_schema": SCHEMA},
    {"name": "now", "input_schema": NOTHING, "cache_control": {"type": "ephemeral"}},
]
RESPONSES_TOOLS: Any = [
    {
        "type": "function",
        "name": "get_weather",
        "description": "How the weather is.",
        "parameters": SCHEMA,
        "strict": False,
    },
    {"type": "function", "name": "now", "parameters": NOTHING, "strict": None},
]
TEXTS = ("content", "reasoning", "reasoning_content", "arguments", "delta", "text", "thinking", "partial_json")
THOUGHT = "<think>\nLet me look.\n</think>\n\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    yield from scripted("hermes", tmp_path_factory.mktemp("agents") / "model")


@pytest.fixture(scope="module")
def claude(model: Scripted) -> Iterator[Anthropic]:
    with Anthropic(base_url=model.server.root, api_key="any", max_retries=0) as client:
        yield client


def message(client: Anthropic, stream: bool, *messages: Any, **options: Any) -> Any:
    """Whole, or put together from a stream by the client."""
    asked: Any = {"model": "tiny/fake", "max_tokens": 500, "messages": messages or [ASKED], **options}
    if not stream:
        return client.messages.create(**asked)
    with client.messages.stream(**asked) as events:
        return events.get_final_message()


def response(model: Scripted, stream: bool, asked: Any = "How will the weather be?", **options: Any) -> Any:
    if not stream:
        return model.client.responses.create(model="tiny/fake", input=asked, **options)
    with model.client.responses.stream(model="tiny/fake", input=asked, **options) as events:
        return events.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
def test_messages_round_trip(model: Scripted, claude: Anthropic, stream: bool) -> None:
    """Reasoning, a text and two calls, their results in the next prompt, and the answer."""
    model.says(THOUGHT + "I look. " + WRITERS["hermes"](CALLS))
    system: Any = [{"type": "text", "text": "Be kind.", "cache_control": {"type": "ephemeral"}}]
    first = message(claude, stream, system=system, tools=MESSAGES_TOOLS)
    assert "Be kind." in model.prompt
    assert "How the weather is." in model.prompt
    assert (first.type, first.role, first.model) == ("message", "assistant", "tiny/fake")
    assert (first.stop_reason, first.stop_sequence) == ("tool_use", None)
    thinking, text, *calls = first.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "Let me look.", "miniserve")
    assert (text.type, text.text) == ("text", "I look.")
    assert [(call.type, call.name, call.input) for call in calls] == [("tool_use", *call) for call in CALLS]
    assert len({call.id for call in calls}) == 2
    prompt_tokens = len(model.server.engine.seen[-1][0])
    usage = first.usage
    assert usage.input_tokens + usage.cache_read_input_tokens + usage.cache_creation_input_tokens == prompt_tokens
    assert usage.cache_read_input_tokens == 16
    assert usage.output_tokens == len(model.server.engine.script)
    results: Any = [
        {"type": "tool_result", "tool_use_id": calls[0].id, "content": [{"type": "text", "text": "17 degrees"}]},
        {"type": "tool_result", "tool_use_id": calls[1].id, "content": "no clock", "is_error": True},
        {"type": "text", "text": "And now?"},
    ]
    model.says("It will be warm.")
    answered = [ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
    last = message(claude, stream, *answered, tools=MESSAGES_TOOLS)
    assert [block.text for block in last.content] == ["It will be warm."]
    assert last.stop_reason == "end_turn"
    expected = ["I look.", json.dumps(CALLS[0][1])[1:-1], "17 degrees", "Error: no clock", "And now?"]
    places = [model.prompt.index(text) for text in expected]
    assert places == sorted(places)
    count = claude.messages.count_tokens(model="tiny/fake", messages=answered, tools=MESSAGES_TOOLS)
    assert count.input_tokens == len(model.server.engine.seen[-1][0])


@pytest.mark.parametrize("stream", [False, True])
def test_responses_round_trip(model: Scripted, stream: bool) -> None:
    model.says(THOUGHT + "I look. " + WRITERS["hermes"](CALLS))
    options: Any = {"instructions": "Be kind.", "tools": RESPONSES_TOOLS, "store": True, "metadata": {"a": "b"}}
    first = response(model, stream, **options)
    assert "Be kind." in model.prompt
    assert "How the weather is." in model.prompt
    assert (first.object, first.status, first.model, first.store) == ("response", "completed", "tiny/fake", False)
    assert first.metadata == {"a": "b"}
    thought, said, *calls = first.output
    assert (thought.type, thought.summary) == ("reasoning", [])
    assert [content.text for content in thought.content] == ["Let me look."]
    assert (said.type, said.role, first.output_text) == ("message", "assistant", "I look.")
    assert [(call.type, call.name, json.loads(call.arguments)) for call in calls] == [
        ("function_call", *call) for call in CALLS
    ]
    assert {item.status for item in first.output} == {"completed"}
    assert len({call.call_id for call in calls}) == 2
    assert first.usage.input_tokens == len(model.server.engine.seen[-1][0])
    assert first.usage.input_tokens_details.cached_tokens == 16
    assert first.usage.output_tokens == len(model.server.engine.script)
    assert 0 < first.usage.output_tokens_details.reasoning_tokens < first.usage.output_tokens
    outputs = [
        {"type": "function_call_output", "call_id": call.call_id, "output": f"17 degrees {i}"}
        for i, call in enumerate(calls)
    ]
    model.says("It will be warm.")
    items = [ASKED, *[item.to_dict() for item in first.output], *outputs]
    last = response(model, stream, items, tools=RESPONSES_TOOLS)
    assert last.output_text == "It will be warm."
    expected = ["I look.", json.dumps(CALLS[0][1])[1:-1], "17 degrees 0", "17 degrees 1"]
    places = [model.prompt.index(text) for text in expected]
    assert places == sorted(places)
    assert model.prompt.count("<|im_start|>assistant") == 2  # one turn, and the one that begins


def events_of(model: Scripted, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """As they are on the wire: each has a line with its type."""
    text = httpx.post(f"{model.server.url}/{path}", json=body | {"stream": True}).text
    events = []
    for lines in text.removesuffix("\n\n").split("\n\n"):
        name, data = lines.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


MESSAGE_BODY: dict[str, Any] = {"messages": [ASKED], "max_tokens": 500, "tools": MESSAGES_TOOLS}
RESPONSE_BODY: dict[str, Any] = {"input": [ASKED], "tools": RESPONSES_TOOLS}


def sorted_out(events: list[dict[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """The events of any of the APIs without what is of one answer alone, and deltas of one kind that follow one another
    as one."""
    found: list[tuple[str, dict[str, str]]] = []
    for event in events:
        is_delta = event.get("object") == "chat.completion.chunk" or str(event.get("type")).endswith("delta")
        texts: dict[str, str] = {}

        def strip(value: Any, path: str = "", texts: dict[str, str] = texts, is_delta: bool = is_delta) -> Any:
            name = path.rpartition(".")[2]
            if isinstance(value, dict):
                ids = ("id", "item_id", "call_id", "created", "created_at", "completed_at", "sequence_number")
                return {key: strip(each, f"{path}.{key}") for key, each in value.items() if key not in ids}
            if path == ".message.usage.output_tokens":  # with the first event
                return 0
            if isinstance(value, list):
                return [strip(each, f"{path}.{number}") for number, each in enumerate(value)]
            if is_delta and isinstance(value, str) and name in TEXTS:
                texts[path] = value
                return ""
            return value

        kind = json.dumps(strip(event))
        if is_delta and found and found[-1][0] == kind:
            for path, text in texts.items():
                found[-1][1][path] += text
        else:
            found.append((kind, texts))
    return found


@pytest.mark.parametrize(
    ("path", "stop"),
    [
        ("/v1/chat/completions", False), ("/v1/chat/completions", True),
        ("/v1/messages", False), ("/v1/messages", True),
        ("/v1/responses", False),
    ],
)  # fmt: skip
def test_joined_outputs_say_what_single_ones_do(model: Scripted, path: str, stop: bool) -> None:
    """Reasoning, text and calls of a stream whose server is behind its engine."""
    model.says(THOUGHT + "I look. " + WRITERS["hermes"](CALLS))
    chat = {"messages": [ASKED], "max_tokens": 500}
    body = {
        "/v1/chat/completions": {**chat, "tools": TOOLS, "stream_options": {"include_usage": True}},
        "/v1/messages": {**chat, "tools": MESSAGES_TOOLS},
        "/v1/responses": {"input": "How will the weather be?", "tools": RESPONSES_TOOLS},
    }[path]
    if stop:  # within the arguments of the first call
        body["stop_sequences" if path == "/v1/messages" else "stop"] = ["III"]

    def streamed() -> list[tuple[str, dict[str, str]]]:
        lines = httpx.post(model.server.root + path, json=body | {"stream": True}).text.splitlines()
        return sorted_out([json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")])

    single = streamed()
    try:
        for model.server.engine.joined in (2, 3, 7, 1000):
            assert streamed() == single
    finally:
        model.server.engine.joined = 1
    text = json.dumps(single)
    assert "Let me look." in text and "get_weather" in text and ("now" in text) != stop


def test_events_of_messages_are_anthropics(model: Scripted) -> None:
    model.says(THOUGHT + "I look. " + WRITERS["hermes"](CALLS))
    events = events_of(model, "messages", MESSAGE_BODY)
    kind = TypeAdapter[Any](RawMessageStreamEvent)
    for event in events:
        kind.validate_python(event, extra="forbid")
    assert [events[0]["type"], events[-2]["type"], events[-1]["type"]] == [
        "message_start", "message_delta", "message_stop",
    ]  # fmt: skip
    Message.model_validate(events[0]["message"], extra="forbid")
    assert (events[0]["message"]["content"], events[0]["message"]["stop_reason"]) == ([], None)
    assert events[0]["message"]["usage"]["output_tokens"] == 1
    assert events[-2]["usage"]["output_tokens"] == len(model.server.engine.script)
    kinds = [{"thinking_delta", "signature_delta"}, {"text_delta"}, {"input_json_delta"}, {"input_json_delta"}]
    for index, delta_types in enumerate(kinds):
        first, *deltas, last = [event for event in events if event.get("index") == index]
        assert (first["type"], last["type"]) == ("content_block_start", "content_block_stop")
        assert {delta["delta"]["type"] for delta in deltas} == delta_types
    indexes = [event["index"] for event in events if "index" in event]
    assert indexes == sorted(indexes)


def test_events_of_responses_are_openais(model: Scripted) -> None:
    model.says(THOUGHT + "I look. " + WRITERS["hermes"](CALLS))
    events = events_of(model, "responses", RESPONSE_BODY)
    kind = TypeAdapter[Any](ResponseStreamEvent)
    for number, event in enumerate(events):
        kind.validate_python(event)
        assert event["sequence_number"] == number
    kinds = [event["type"].removeprefix("response.") for event in events]
    text = ["content_part.added", "output_text.delta", "output_text.done", "content_part.done"]
    call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    assert [kind for kind, before in zip(kinds, ["", *kinds], strict=False) if kind != before] == [
        "created", "in_progress",
        "output_item.added", *[kind.replace("output_text", "reasoning_text") for kind in text], "output_item.done",
        "output_item.added", *text, "output_item.done",
        *call, *call,
        "completed",
    ]  # fmt: skip
    final = events[-1]["response"]
    Response.model_validate(final)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert final["output"] == done
    for index, item in enumerate(done):
        deltas = "".join(event["delta"] for event in events if "delta" in event and event["output_index"] == index)
        assert deltas == (item["arguments"] if "arguments" in item else item["content"][0]["text"])


def test_logprobs_of_responses_are_those_of_the_text(model: Scripted) -> None:
    model.says(THOUGHT + "Two and two is four.")
    options: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = response(model, False, **options)
    assert whole.top_logprobs == 2
    thought, said = whole.output
    assert "logprobs" not in thought.content[0].to_dict()
    entries = said.content[0].logprobs
    assert "".join(entry.token for entry in entries).lstrip("\n") == said.content[0].text == "Two and two is four."
    assert {len(entry.top_logprobs) for entry in entries} == {2}
    events = events_of(model, "responses", {"input": "Hi", **options})
    pieces = [entry for event in events if event["type"].endswith("output_text.delta") for entry in event["logprobs"]]
    (done,) = [event["logprobs"] for event in events if event["type"].endswith("output_text.done")]
    assert pieces == done == [entry.to_dict() for entry in entries]
    assert response(model, False).output[1].content[0].logprobs == []


def test_an_answer_says_why_it_ended(model: Scripted, claude: Anthropic) -> None:
    written = WRITERS["hermes"](CALLS[:1])
    model.says(written)
    cut = len(model.server.engine.tokenizer.encode(written[: written.index("Ems")], False))
    for stream in (False, True):
        answer = message(claude, stream, tools=MESSAGES_TOOLS, max_tokens=cut)
        assert answer.stop_reason == "max_tokens"
        # The client completes what it has of a stream; a whole answer does not pass a part off as the arguments.
        assert answer.content[0].input == {} or list(answer.content[0].input) == ["city" if stream else "INVALID_JSON"]
    answer = response(model, False, tools=RESPONSES_TOOLS, max_output_tokens=cut)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert answer.output[0].status == "incomplete"
    assert answer.output[0].arguments.startswith('{"city": "Bad ')
    events = events_of(model, "responses", RESPONSE_BODY | {"max_output_tokens": cut})
    assert events[-1]["type"] == "response.incomplete"
    model.says("One, two, three.")
    for stream in (False, True):
        answer = message(claude, stream, stop_sequences=["two", "four"])
        assert (answer.content[0].text, answer.stop_reason, answer.stop_sequence) == ("One, ", "stop_sequence", "two")


def test_a_choice_of_tools_and_a_format_are_enforced(model: Scripted, claude: Anthropic) -> None:
    """The stub engine follows no grammar; `test_server_real_engine.py` has one that does."""

    def grammar() -> Any:
        return model.server.engine.seen[-1][1].grammar

    model.says(WRITERS["hermes"](CALLS[:1]))
    for choice, calls in (({"type": "any"}, 1), ({"type": "tool", "name": "now"}, 1), ({"type": "auto"}, 0)):
        message(claude, False, tools=MESSAGES_TOOLS, tool_choice=choice)
        assert (grammar() is not None) == bool(calls)
    message(claude, False, tools=MESSAGES_TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert grammar() is not None
    message(claude, False, tools=MESSAGES_TOOLS, tool_choice={"type": "none"})
    assert "get_weather" not in model.prompt
    for choice in ("required", {"type": "function", "name": "now"}):
        response(model, False, tools=RESPONSES_TOOLS, tool_choice=choice)
        assert grammar() is not None
    model.says('{"city": "Bonn"}')
    output: Any = {"format": {"type": "json_schema", "schema": SCHEMA}}
    message(claude, False, output_config=output)
    assert json.loads(grammar().text) == SCHEMA
    text: Any = {"format": {"type": "json_schema", "name": "weather", "schema": SCHEMA, "strict": True}}
    answer = response(model, False, text=text)
    assert json.loads(grammar().text) == SCHEMA
    assert answer.text.format.to_dict() == text["format"]
    response(model, False, text={"format": {"type": "json_object"}})
    assert json.loads(grammar().text) == {"type": "object"}


def test_reasoning_is_switched_by_the_template(model: Scripted, claude: Anthropic) -> None:
    model.says("Four.")
    off = "<think>\n\n</think>\n\n"
    for thinking, is_off in (({"type": "disabled"}, True), ({"type": "enabled", "budget_tokens": 1024}, False),
                             ({"type": "adaptive"}, False)):  # fmt: skip
        message(claude, False, thinking=thinking)
        assert model.prompt.endswith(off) == is_off
    response(model, False, reasoning={"effort": "none", "summary": "auto"})
    assert model.prompt.endswith(off)
    model.says(THOUGHT + "Four.")
    (block,) = message(claude, False, thinking={"type": "adaptive", "display": "omitted"}).content
    assert block.text == "Four."


def test_what_claude_code_sends(model: Scripted) -> None:
    """Version 2.1.197, shortened: a system message among the others, and fields that ask for what is so anyway."""
    body = {
        "model": "tiny/fake",
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hello.", "cache_control": {"type": "ephemeral"}}]},
            {"role": "system", "content": "Skills: review"},
            {
                "role": "assistant",
                "content": [{"type": "thinking", "thinking": "I should look.", "signature": ""}, USE],
            },
            {
                "role": "user",
                "content": [{**RESULT, "is_error": False, "cache_control": {"type": "ephemeral"}}],
            },
        ],
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1.197.f03; cc_entrypoint=sdk-cli;"},
            {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
        ],
        "tools": [
            {
                "name": "now",
                "description": "The time.",
                "input_schema": {
                    "$schema": "https://json-schema.org/draft/2020-12/schema",
                    "type": "object",
                    "properties": {"zone": {"description": "Where.", "type": "string"}},
                    "additionalProperties": False,
                },
            }
        ],
        "metadata": {"user_id": '{"device_id":"e","account_uuid":"","session_id":"2"}'},
        "max_tokens": 100,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }
    model.says(THOUGHT + WRITERS["hermes"]([("now", {"zone": "UTC"})]))
    answer = httpx.post(f"{model.server.url}/messages?beta=true", json=body)
    assert answer.status_code == 200
    assert "event: message_stop" in answer.text
    places = [model.prompt.index(text) for text in ("You are an agent.", "The time.", "Hello.", "Skills: review",
                                                    "<think>\nI should look.\n</think>")]  # fmt: skip
    assert places[2:] == sorted(places[2:])


def test_a_length_is_refused_in_anthropics_words(model: Scripted, claude: Anthropic) -> None:
    """Claude Code 2.1.197 looks for both sentences, and asks again for as much output as the first leaves."""
    limit = model.server.engine.info.max_model_len
    room = limit - claude.messages.count_tokens(model="tiny/fake", messages=[ASKED]).input_tokens
    model.says("Hi.")
    assert message(claude, False, max_tokens=room).content[0].text == "Hi."
    words = (
        rf"\'message\': 'input length and `max_tokens` exceed context limit: {limit - room} \+ {room + 1} > {limit},"
    )
    with pytest.raises(anthropic.BadRequestError, match=words):
        message(claude, False, max_tokens=room + 1)
    long = {"role": "user", "content": "word " * limit}
    num_tokens = claude.messages.count_tokens(model="tiny/fake", messages=[long]).input_tokens
    words = rf"\'message\': 'prompt is too long: {num_tokens} tokens > {limit - 1} maximum'"
    with pytest.raises(anthropic.BadRequestError, match=words):
        message(claude, False, long)
    with pytest.raises(anthropic.BadRequestError, match=r"\'message\': .prompt is too long: This model's maximum"):
        message(claude, False, {"role": "user", "content": "word " * limit * 20})


def test_a_conversation_that_would_have_to_be_kept_is_refused_by_its_code(model: Scripted) -> None:
    """What runs functions in anthropic-python 2.14 sends only what is new, unless this says that it cannot."""
    model.says("Hi.")
    for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
        answer = httpx.post(f"{model.server.url}/messages?beta=true", json=MESSAGE_BODY | {"thread": thread})
        error = answer.json()["error"]
        assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
        assert error["details"] == {"error_code": "thread_unsupported_request"}
    httpx.post(f"{model.server.url}/messages", json=MESSAGE_BODY | {"thread": None}).raise_for_status()


def test_blocks_have_no_fields_that_strict_clients_refuse(model: Scripted) -> None:
    """The AI SDK (@ai-sdk/anthropic 3.0.140) takes no null as a text's citations."""
    model.says("Hi.")
    assert httpx.post(f"{model.server.url}/messages", json=MESSAGE_BODY).json()["content"] == [
        {"type": "text", "text": "Hi."}
    ]
    (begun,) = [event for event in events_of(model, "messages", MESSAGE_BODY) if event["type"].endswith("block_start")]
    assert begun["content_block"] == {"type": "text", "text": ""}


def test_functions_in_a_namespace(model: Scripted) -> None:
    """As Codex (0.171.0) sends those of its agents and of MCP servers."""
    spawn = {"type": "function", "name": "spawn", "description": "A new one.", "strict": False, "parameters": SCHEMA}
    close = {"type": "function", "name": "close", "strict": False, "parameters": NOTHING}
    tools = [{"type": "namespace", "name": "agents", "description": "Of agents.", "tools": [spawn, close]}, close]
    body = RESPONSE_BODY | {"tools": tools}
    model.says(WRITERS["hermes"]([("agents__spawn", CALLS[0][1]), ("agents__close", {}), ("close", {})]))
    answer = httpx.post(f"{model.server.url}/responses", json=body).json()
    assert "Of agents.\\nA new one." in model.prompt
    found = [(call["type"], call.get("namespace"), call["name"]) for call in answer["output"]]
    assert found == [("function_call", *each) for each in (("agents", "spawn"), ("agents", "close"), (None, "close"))]
    assert answer["tools"] == [
        {**tools[0], "tools": [spawn, close | {"description": None}]}, close | {"description": None}
    ]  # fmt: skip
    events = events_of(model, "responses", body)
    items = [event["item"] for event in events if event["type"].endswith("output_item.done")]
    assert [(item.get("namespace"), item["name"]) for item in items] == [each[1:] for each in found]
    results = [{"type": "function_call_output", "call_id": call["call_id"], "output": "done"} for call in items]
    httpx.post(f"{model.server.url}/responses", json=body | {"input": [ASKED, *items, *results]}).raise_for_status()
    places = [model.prompt.rindex(f'"name": "{name}"') for name in ("agents__spawn", "agents__close", "close")]
    assert places == sorted(places)
    nothing = {"tools": [{"type": "namespace", "name": "agents", "tools": []}], "tool_choice": "auto"}
    httpx.post(f"{model.server.url}/responses", json=body | nothing).raise_for_status()


def test_reasoning_comes_back_also_sealed(model: Scripted) -> None:
    """The AI SDK sends back `encrypted_content` alone."""
    model.says(THOUGHT + "I look.")
    asked: Any = {"include": ["reasoning.encrypted_content"], "store": False}
    thought = response(model, False, **asked).output[0].to_dict()
    assert thought["content"][0]["text"] == "Let me look."
    sealed = {name: thought[name] for name in ("type", "id", "summary", "encrypted_content")}
    response(model, False, [ASKED, sealed, {"role": "assistant", "content": "I look."}, ASKED], **asked)
    assert model.prompt.count("<think>\nLet me look.\n</think>\n\nI look.") == 1
    last = response(model, True, **asked)
    assert last.output[0].to_dict()["encrypted_content"] == thought["encrypted_content"]
    assert "encrypted_content" not in response(model, False).output[0].to_dict()


def test_what_agents_send_to_every_model_is_taken(model: Scripted, claude: Anthropic) -> None:
    model.says("Four.")
    thinking: Any = {"type": "adaptive", "display": "omitted"}
    effort: Any = {"effort": "high"}
    message(claude, False, thinking=thinking, output_config=effort)  # as Claude Code does
    message(claude, False, thinking={"type": "disabled"}, output_config=effort)
    assert model.prompt.endswith("</think>\n\n")
    note: Any = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1;"}
    kind: Any = {"type": "text", "text": "Be kind."}
    secret: Any = {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}, kind]}
    message(claude, False, ASKED, secret, ASKED, system=[note, kind])
    assert model.prompt.count("Be kind.") == 2
    assert "billing" not in model.prompt
    counted = {"max_tokens": 5, "stream": True, "temperature": 1, "stop_sequences": ["x"], "metadata": {"user_id": "u"}}
    for body in ({}, counted):
        answer = httpx.post(f"{model.server.url}/messages/count_tokens", json={"messages": [ASKED], **body})
        assert set(answer.json()) == {"input_tokens"}
    response(model, False, tools=[], tool_choice="auto")


def test_an_effort_without_effect_is_warned_about_or_refused(
    model: Scripted, claude: Anthropic, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model.says("Four.")
    low: Any = {"effort": "low"}
    message(claude, False, output_config=low)
    assert "output_config.effort" in caplog.text
    for strict in scripted("hermes", tmp_path / "model", strict_fields=True):
        strict.says("Four.")
        for effort, status in (("high", 200), ("low", 400)):
            body = MESSAGE_BODY | {"output_config": {"effort": effort}}
            answer = httpx.post(f"{strict.server.url}/messages", json=body)
            assert answer.status_code == status
        assert "output_config.effort" in answer.text


def test_how_to_sample_is_said_as_in_chat(model: Scripted, claude: Anthropic) -> None:
    model.says("Four.")
    how: Any = {"top_k": 7, "min_p": 0.1, "seed": 5, "stop": ["END"], "ignore_eos": True, "logit_bias": {"9": 1.0},
                "repetition_penalty": 1.5, "cache_salt": "mine", "priority": 3}  # fmt: skip
    response(model, False, max_output_tokens=5, extra_body=how)
    params = model.server.engine.seen[-1][1]
    assert (params.top_k, params.min_p, params.seed, params.stop) == (7, 0.1, 5, ("END",))
    assert (params.ignore_eos, params.logit_bias, params.repetition_penalty) == (True, {9: 1.0}, 1.5)
    for regex in ({"structured_outputs": {"regex": "Fo.*"}}, {}):
        response(model, False, extra_body={**regex, "chat_template_kwargs": {"enable_thinking": False}})
        assert model.prompt.endswith("</think>\n\n")
        assert (model.server.engine.seen[-1][1].grammar is not None) == bool(regex)
    message(claude, False, extra_body={"chat_template_kwargs": {"enable_thinking": False}, "cache_salt": "mine"})
    assert model.prompt.endswith("</think>\n\n")
    model.says(THOUGHT + "Four.")
    assert [item.type for item in response(model, False, extra_body={"include_reasoning": False}).output] == ["message"]


def test_a_last_message_of_the_assistant_goes_on(model: Scripted, claude: Anthropic) -> None:
    model.says(" is four.")
    answer = message(claude, False, ASKED, {"role": "assistant", "content": "Two and two"})
    assert model.prompt.endswith("Two and two")
    assert answer.content[0].text == " is four."
    model.says(THOUGHT + "Two and two is four.")
    cut = response(model, False, max_output_tokens=20)
    assert (cut.status, cut.output[-1].status) == ("incomplete", "incomplete")
    model.says(" is four.")
    items = [ASKED, *[item.to_dict() for item in cut.output]]
    assert response(model, False, items).output_text == " is four."
    assert model.prompt.endswith(cut.output_text)
    response(model, False, [*items, ASKED])
    assert model.prompt.endswith("<|im_start|>assistant\n")


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aaaa"}}
USE = {"type": "tool_use", "id": "1", "name": "now", "input": {}}

RESULT = {"type": "tool_result", "tool_use_id": "1", "content": "x"}


def said(*blocks: Any, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 9999}, "max_tokens"),
        ({"messages": []}, "messages"),
        (said({"type": "text"}), "messages[0].content[0].text"),
        (said(IMAGE), "messages[0].content[0].type"),
        (said(RESULT | {"content": [IMAGE]}), "messages[0].content[0].content[0].type"),
        (said(RESULT | {"tool_use_id": None}), "messages[0].content[0].tool_use_id"),
        (said(USE), "messages[0].content[0].type"),
        (said({**USE, "name": ""}, role="assistant"), "messages[0].content[0].name"),
        (said({**USE, "input": None}, role="assistant"), "messages[0].content[0].input"),
        (said(USE, role="assistant"), "messages"),
        (said({"type": "redacted_thinking", "data": "x"}), "messages[0].content[0].type"),
        (said(role="tool"), "messages[0].role"),
        ({"system": [IMAGE]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"name": "now"}]}, "tools[0].input_schema"),
        ({"tools": [{"name": "no way", "input_schema": {}}]}, "tools[0].name"),
        ({"tools": [*MESSAGES_TOOLS, MESSAGES_TOOLS[0]]}, "tools"),
        ({"tool_choice": {"type": "tool", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"tool_choice": {"type": "any"}, "tools": []}, "tool_choice"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"tools": [{"name": "now", "input_schema": {"type": "array"}}]}, "tools[0].input_schema"),
        ({"context_management": {"edits": [{"type": "clear_thinking_20251015"}]}}, "context_management"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "output_config.format"),
        ({"stop_sequences": [""]}, "stop_sequences"),
        ({"temperature": -1}, "temperature"),
        ({"seed": 1}, "seed"),
        ({"stop": ["x"]}, "stop"),
        ({"do_sample": False}, "do_sample"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"compaction": {"type": "enabled"}}, "compaction"),
        ({"max_token": 1}, "max_token"),
        ({"cache_contrl": {}}, "cache_contrl"),
    ],
)
def test_what_messages_cannot_do_is_named(model: Scripted, change: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{model.server.url}/messages", json=MESSAGE_BODY | change)
    assert answer.status_code == 400
    error = answer.json()
    assert set(error) == {"type", "error", "request_id"}
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert error["request_id"] == answer.headers["x-request-id"]
    assert param in error["error"]["message"]


CALL = {"type": "function_call", "call_id": "1", "name": "now", "arguments": "{}"}


FUNCTIONS = [{"type": "function", "name": f"f{number}"} for number in range(513)]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [ASKED, CALL | {"arguments": "[1]"}]}, "input[1].arguments"),
        ({"input": [ASKED, CALL | {"name": ""}]}, "input[1].name"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [{"type": "namespace", "name": "n"}]}, "tools[0].tools"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [{"type": "custom"}]}]}, "tools[0].tools[0].type"),
        ({"tools": [RESPONSES_TOOLS[0] | {"tools": []}]}, "tools[0].tools"),
        ({"tools": [{"type": "namespace", "name": f"n{i}", "tools": FUNCTIONS} for i in range(2)]}, "tools"),
        (
            {"tools": [{"type": "namespace", "name": "n" * 99, "tools": [{"type": "function", "name": "f" * 99}]}]},
            "tools[0].tools[0].name",
        ),
        ({"input": [{"type": "reasoning", "encrypted_content": "miniserve:?"}]}, "input[0].encrypted_content"),
        ({"tools": [*RESPONSES_TOOLS, RESPONSES_TOOLS[0]]}, "tools"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"reasoning": {"effort": "extreme"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "concise"}}, "reasoning.summary"),
        ({"text": {"format": {"type": "json_schema"}}, "tools": []}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 9999}, "max_output_tokens"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"include": ["file_search_call.results"]}, "include[0]"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"n": 2}, "n"),
        (
            {"structured_outputs": {"regex": "a"}, "text": {"format": {"type": "json_object"}}, "tools": []},
            "structured_outputs.regex",
        ),
        ({"enable_response_messages": True}, "enable_response_messages"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream_options": {"include_usage": True}, "stream": True}, "stream_options.include_usage"),
        ({"instruction": "x"}, "instruction"),
    ],
)
def test_what_responses_cannot_do_is_named(model: Scripted, change: dict[str, Any], param: str) -> None:
    answer = httpx.post(f"{model.server.url}/responses", json=RESPONSE_BODY | change)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "providerOptions: {openai: {store: false}}"),
        ({"tools": [{"type": "web_search", "external_web_access": True}]}, 'web_search = "disabled"'),
        ({"tools": [{"type": "image_generation"}]}, "leave it out."),
    ],
)
def test_who_sends_by_default_what_is_refused_reads_the_setting(
    model: Scripted, change: dict[str, Any], remedy: str
) -> None:
    answer = httpx.post(f"{model.server.url}/responses", json=RESPONSE_BODY | change)
    assert answer.status_code == 400 and remedy in answer.json()["error"]["message"]


def test_errors_are_the_clients_own(model: Scripted, claude: Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error"):
        claude.messages.create(model="claude", max_tokens=5, messages=[ASKED])
    with pytest.raises(openai.NotFoundError):
        model.client.responses.create(model="gpt", input="x")
    body = httpx.post(f"{model.server.url}/messages", content=b"{", headers={"content-type": "application/json"}).json()
    assert body["error"]["type"] == "invalid_request_error"
    model.says("One, two, three.")
    model.server.engine.fail_after = 2
    try:
        with pytest.raises(anthropic.APIStatusError, match="The fake device broke"):
            message(claude, True)
        with pytest.raises(anthropic.InternalServerError, match="The fake device broke"):
            message(claude, False)
        with pytest.raises(openai.InternalServerError, match="The fake device broke"):
            response(model, False)
        with pytest.raises(openai.APIError, match="The fake device broke"):
            response(model, True)
        error, last = events_of(model, "responses", RESPONSE_BODY)[-2:]
        assert (error["type"], error["message"]) == ("error", "The fake device broke.")
        assert (last["type"], last["response"]["status"]) == ("response.failed", "failed")
        assert last["response"]["error"] == {"code": "server_error", "message": "The fake device broke."}
    finally:
        model.server.engine.fail_after = None
    with running_server(api_keys=("secret",)) as server:
        with pytest.raises(anthropic.AuthenticationError, match="authentication_error"):
            Anthropic(base_url=server.root, api_key="wrong", max_retries=0).messages.create(**MESSAGE_BODY, model="x")
        client = Anthropic(base_url=server.root, api_key="secret", max_retries=0)
        with pytest.raises(anthropic.NotFoundError):
            client.messages.create(**MESSAGE_BODY, model="x")
        # The built-in model's template takes no calls. The place is that in the request, not in the chat made of it.
        turns = [ASKED, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}]
        with pytest.raises(anthropic.BadRequestError, match=r"calls of messages\[1\]"):
            message(client, False, *turns, system="Be kind.")


def test_a_silent_stream_of_messages_has_pings(
    model: Scripted, claude: Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("miniserve.server.reply.KEEP_ALIVE", 0.02)
    model.says("Hi.")
    model.server.engine.hold_at = 0
    try:
        with httpx.stream("POST", f"{model.server.url}/messages", json=MESSAGE_BODY | {"stream": True}) as answer:
            lines = answer.iter_lines()
            assert [next(lines) for _ in range(3)] == ["event: ping", 'data: {"type": "ping"}', ""]
            model.server.call(model.server.engine.gate.set)
            assert "event: message_stop" in list(lines)
    finally:
        model.server.engine.hold_at = None
    assert message(claude, True).content[0].text == "Hi."


def test_what_is_no_unicode_is_not_sent_back(model: Scripted) -> None:
    for field in ('"metadata": {"\\ud800": ""}', '"metadata": {"a": "\\ud800"}', '"instructions": "\\ud800"',
                  '"tools": [{"type": "function", "name": "f", "parameters": {"\\udc00": 1}}]',
                  '"text": {"format": {"type": "json_schema", "schema": {"title": "\\ud800"}}}'):  # fmt: skip
        body = '{"input": "x", "stream": true, ' + field + "}"
        headers = {"content-type": "application/json"}
        assert httpx.post(f"{model.server.url}/responses", content=body, headers=headers).status_code == 400


def test_ids_of_calls_are_those_that_the_template_takes(tmp_path: Path) -> None:
    """Mistral's raises an error for any but 9 characters."""
    for model in scripted("mistral", tmp_path / "model"):
        with Anthropic(base_url=model.server.root, api_key="any", max_retries=0) as client:
            model.says(WRITERS["mistral"](CALLS[1:]))
            (call,) = message(client, False, tools=MESSAGES_TOOLS).content
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "noon"}
            turns = [ASKED, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
            message(client, False, *turns, tools=MESSAGES_TOOLS)
            assert "noon" in model.prompt
            (item,) = response(model, False, tools=RESPONSES_TOOLS).output
            output = {"type": "function_call_output", "call_id": item.call_id, "output": "noon"}
            response(model, False, [ASKED, item.to_dict(), output], tools=RESPONSES_TOOLS)
            assert "noon" in model.prompt
