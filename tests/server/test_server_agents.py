"""Anthropic's Messages and OpenAI's Responses through their official clients, over the stub engine with scripted
answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from anthropic import Anthropic
from dialect_texts import WRITERS
from test_server_tools import Scripted, scripted

CALLS = [("get_weather", {"city": 'Bad "Ems"\nIII', "days": 2}), ("now", {})]
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
ASKED: Any = {"role": "user", "content": "How will the weather be?"}
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
    assert (thinking.type, thinking.thinking) == ("thinking", "Let me look.")
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
