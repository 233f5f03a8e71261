"""litellm, through its OpenAI, vLLM and Anthropic providers, and its Responses API."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dialect_texts import WRITERS
from pydantic import BaseModel
from server_fakes import running_server
from server_scripted import CALLS, TOOLS, Scripted

with pytest.MonkeyPatch.context() as patch:
    patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it is fetched at import
    litellm = pytest.importorskip("litellm", reason="needs litellm: pip install -e '.[clients]'")

PROVIDERS = ("openai", "hosted_vllm", "anthropic")
ASKED: Any = {"role": "user", "content": "How will the weather be?"}


def ask(scripted: Scripted, provider: str, messages: Any, stream: bool, **options: Any) -> Any:
    """The answer, which litellm itself puts together of a stream."""
    base = scripted.server.root if provider == "anthropic" else scripted.server.url
    options = {"model": f"{provider}/tiny/fake", "max_tokens": 500, "num_retries": 0, **options}
    if stream:
        options["stream_options"] = {"include_usage": True}
    answer = litellm.completion(messages=messages, api_base=base, api_key="any", stream=stream, **options)
    return litellm.stream_chunk_builder(list(answer), messages=messages) if stream else answer


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_calls_and_their_results(each: Scripted, provider: str, stream: bool) -> None:
    each.says(WRITERS[each.dialect](CALLS), "It will be warm.")
    answer = ask(each, provider, [ASKED], stream, tools=TOOLS).choices[0]
    assert answer.finish_reason == "tool_calls"
    calls = answer.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == CALLS
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"17 degrees {i}"} for i, call in enumerate(calls)]
    last = ask(each, provider, [ASKED, answer.message, *results], stream, tools=TOOLS)
    assert last.choices[0].message.content == "It will be warm."
    assert "17 degrees 1" in each.prompt
    assert last.usage.completion_tokens == len(each.server.engine.script)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_call_that_must_come(each: Scripted, provider: str, choice: Any) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]))
    answer = ask(each, provider, [ASKED], False, tools=TOOLS, tool_choice=choice).choices[0]
    assert [json.loads(call.function.arguments) for call in answer.message.tool_calls] == [CALLS[0][1]]
    assert each.fits()
    ask(each, provider, [ASKED], False, tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert each.fits()


class Weather(BaseModel):
    city: str
    days: int


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_structured_output(each: Scripted, provider: str, stream: bool) -> None:
    values = {"city": 'Bad "Ems"', "days": 2}
    # For Anthropic's API it makes a function of the schema, which must be called.
    called = provider == "anthropic"
    each.says(WRITERS[each.dialect]([("json_tool_call", values)]) if called else json.dumps(values))
    forms: Any = (Weather,) if called else (Weather, {"type": "json_object"})
    for form in forms:
        answer = ask(each, provider, [ASKED], stream, response_format=form)
        assert json.loads(answer.choices[0].message.content) == values
        assert each.fits()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_reasoning(qwen: Scripted, provider: str, stream: bool) -> None:
    qwen.says("<think>\nTwo and two.\n</think>\n\nFour.")
    message = ask(qwen, provider, [ASKED], stream).choices[0].message
    assert (message.content, message.reasoning_content) == ("Four.", "Two and two.")
    ask(qwen, provider, [ASKED, message, ASKED], stream)
    assert "<think>\nTwo and two.\n</think>\n\nFour." in qwen.prompt


@pytest.mark.parametrize("provider", PROVIDERS)
def test_errors_are_litellms(qwen: Scripted, provider: str) -> None:
    qwen.says("Hi.")
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(qwen, provider, [{"role": "user", "content": "word " * 5000}], False)
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(qwen, provider, [ASKED], False, temperature=-1)
    with pytest.raises(litellm.NotFoundError):
        ask(qwen, provider, [ASKED], False, model=f"{provider}/other")
    with running_server(api_keys=("secret",)) as server, pytest.raises(litellm.AuthenticationError):
        ask(Scripted("", server, qwen.client), provider, [ASKED], False)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_responses(each: Scripted, stream: bool) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]))
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]
    options = {"model": "openai/tiny/fake", "api_base": each.server.url, "api_key": "any", "tools": tools}
    answer = litellm.responses(input="How will it be?", stream=stream, **options)
    if stream:
        answer = list(answer)[-1].response
    (call,) = answer.output
    assert (call.name, json.loads(call.arguments)) == CALLS[0]
