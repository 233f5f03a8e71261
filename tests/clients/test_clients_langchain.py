"""langchain's ChatOpenAI, over both of OpenAI's APIs, and its ChatAnthropic."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import openai
import pytest
from dialect_texts import WRITERS
from pydantic import BaseModel, Field
from server_fakes import running_server
from server_scripted import CALLS, NOW, WEATHER, Scripted

WHY = "needs langchain: pip install -e '.[clients]'"
messages = pytest.importorskip("langchain_core.messages", reason=WHY)
exceptions = pytest.importorskip("langchain_core.exceptions", reason=WHY)
langchain_openai = pytest.importorskip("langchain_openai", reason=WHY)
langchain_anthropic = pytest.importorskip("langchain_anthropic", reason=WHY)

TOOLS = [WEATHER, {"type": "function", "function": {**NOW["function"], "parameters": {"type": "object"}}}]
APIS = ("chat", "responses", "messages")
ASKED = "How will the weather be? Answer in JSON."


def chat(scripted: Scripted, api: str, **options: Any) -> Any:
    options = {"model": "tiny/fake", "api_key": "any", "max_retries": 0, "stream_usage": True, **options}
    if api == "messages":
        options = {"max_tokens": 500, **options}
        return langchain_anthropic.ChatAnthropic(base_url=scripted.server.root, **options)
    return langchain_openai.ChatOpenAI(base_url=scripted.server.url, use_responses_api=api == "responses", **options)


def whole(llm: Any, asked: Any) -> Any:
    return llm.invoke(asked)


def streamed(llm: Any, asked: Any) -> Any:
    """The chunks' sum, as langchain adds them up."""
    first, *rest = llm.stream(asked)
    for chunk in rest:
        first += chunk
    return first


class Weather(BaseModel):
    """How the weather is."""

    city: str
    days: int = Field(description="How many.")
    notes: list[str] | None = None


VALUES = Weather(city='Bad "Ems"', days=2, notes=["wet"])


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("api", APIS)
def test_calls_and_their_results(each: Scripted, ask: Any, api: str) -> None:
    llm = chat(each, api).bind_tools(TOOLS)
    each.says(WRITERS[each.dialect](CALLS), "It will be warm.")
    question = messages.HumanMessage(ASKED)
    answer = ask(llm, [question])
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == CALLS
    assert not answer.invalid_tool_calls
    results = [
        messages.ToolMessage(f"17 degrees {i}", tool_call_id=call["id"]) for i, call in enumerate(answer.tool_calls)
    ]
    last = ask(llm, [question, answer, *results])
    assert (last.text, last.tool_calls) == ("It will be warm.", [])
    assert "17 degrees 1" in each.prompt
    assert last.usage_metadata["output_tokens"] == len(each.server.engine.script)


@pytest.mark.parametrize("choice", ["any", "get_weather"])
@pytest.mark.parametrize("api", APIS)
def test_a_call_that_must_come(each: Scripted, api: str, choice: str) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]))
    answer = chat(each, api).bind_tools(TOOLS, tool_choice=choice).invoke(ASKED)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == CALLS[:1]
    assert each.fits()


METHODS = [
    *((api, method) for api in APIS[:2] for method in ("function_calling", "json_mode", "json_schema")),
    *(("messages", method) for method in ("function_calling", "json_schema")),
]


@pytest.mark.parametrize(("api", "method"), METHODS)
def test_structured_output(each: Scripted, api: str, method: str) -> None:
    values = VALUES.model_dump()
    called = method == "function_calling"
    each.says(WRITERS[each.dialect]([("Weather", values)]) if called else json.dumps(values))
    for strict in (None, True):
        if strict and (method == "json_mode" or api == "messages"):
            continue  # which langchain does not take
        options = {} if strict is None else {"strict": strict}
        for schema in (Weather, Weather.model_json_schema()):
            llm = chat(each, api).with_structured_output(schema, method=method, include_raw=True, **options)
            for ask in (whole, streamed):
                found = ask(llm, ASKED)
                assert found["parsing_error"] is None
                assert found["parsed"] == (VALUES if schema is Weather else values)
                assert each.fits()


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("api", APIS)
def test_reasoning(qwen: Scripted, ask: Any, api: str) -> None:
    """Of chats langchain reads none, and of the events of /v1/responses only summaries."""
    qwen.says("<think>\nI look.\n</think>\n\n" + WRITERS["hermes"](CALLS[:1]), "<think>\nWarm.\n</think>\n\nFour.")
    llm, question = chat(qwen, api).bind_tools(TOOLS), messages.HumanMessage(ASKED)
    answer = ask(llm, [question])
    result = messages.ToolMessage("17 degrees", tool_call_id=answer.tool_calls[0]["id"])
    last = ask(llm, [question, answer, result])
    assert last.text == "Four."
    kept = api == "messages" or (api == "responses" and ask is whole)
    assert ("<think>\nI look.\n</think>" in qwen.prompt) == kept
    if api != "messages":
        assert last.usage_metadata["output_token_details"]["reasoning"] > 2


@pytest.mark.parametrize("ask", [whole, streamed])
def test_logprobs_and_settings(qwen: Scripted, ask: Any) -> None:
    qwen.says("Four.")
    settings = {
        "temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "seed": 1, "stop": ["x"], "presence_penalty": 0.1,
        "frequency_penalty": 0.1, "n": 1, "logit_bias": {5: -100}, "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    answer = ask(chat(qwen, "chat", **settings), ASKED)
    assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


@pytest.mark.parametrize("ask", [whole, streamed])
@pytest.mark.parametrize("api", APIS)
def test_errors_are_the_clients_own(qwen: Scripted, ask: Any, api: str) -> None:
    client: Any = anthropic if api == "messages" else openai
    with pytest.raises(client.BadRequestError, match="temperature"):
        ask(chat(qwen, api, temperature=-1), ASKED)
    with pytest.raises(client.NotFoundError):
        ask(chat(qwen, api, model="other"), ASKED)
    with pytest.raises(exceptions.ContextOverflowError):
        ask(chat(qwen, api), "word " * 5000)
    with running_server(api_keys=("secret",)) as server, pytest.raises(client.AuthenticationError):
        ask(chat(Scripted("", server, qwen.client), api), ASKED)
    qwen.says("One, two, three.")
    qwen.server.engine.fail_after = 2
    try:
        with pytest.raises(client.APIError, match="The fake device broke"):
            ask(chat(qwen, api), ASKED)
    finally:
        qwen.server.engine.fail_after = None
