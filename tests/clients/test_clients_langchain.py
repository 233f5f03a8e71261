"""langchain's ChatOpenAI."""

from __future__ import annotations

from typing import Any

import pytest
from dialect_texts import WRITERS
from pydantic import BaseModel, Field
from server_fakes import running_server
from server_scripted import CALLS, TOOLS, Scripted

pytest.importorskip("langchain_openai", reason="needs langchain-openai: pip install -e '.[clients]'")

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI


def chat(model: Scripted, **options: Any) -> ChatOpenAI:
    options = {"model": "tiny/fake", "max_retries": 0, "stream_usage": True, **options}
    return ChatOpenAI(base_url=model.server.url, api_key="any", **options)


class Weather(BaseModel):
    """How the weather is."""

    city: str
    days: int = Field(description="How many.")
    notes: list[str] | None = None


ANSWER = '{"city": "Bad \\"Ems\\"", "days": 2, "notes": ["wet"]}'
WEATHER = Weather(city='Bad "Ems"', days=2, notes=["wet"])
ASKED = "How will the weather be?"


def whole(llm: Any, messages: Any, **options: Any) -> Any:
    return llm.invoke(messages, **options)


def streamed(llm: Any, messages: Any, **options: Any) -> Any:
    """The chunks' sum, as langchain adds them up."""
    first, *rest = llm.stream(messages, **options)
    for chunk in rest:
        first += chunk
    return first


@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
@pytest.mark.parametrize("ask", [whole, streamed])
def test_calls_and_their_results(each: Scripted, ask: Any, responses: bool) -> None:
    llm = chat(each, use_responses_api=responses).bind_tools(TOOLS)
    each.says(WRITERS[each.dialect](CALLS), "It will be warm.")
    question = HumanMessage(ASKED)
    answer = ask(llm, [question])
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == CALLS
    assert not answer.invalid_tool_calls
    if not responses:
        assert answer.response_metadata["finish_reason"] == "tool_calls"
    results = [ToolMessage(f"17 degrees {i}", tool_call_id=call["id"]) for i, call in enumerate(answer.tool_calls)]
    last = ask(llm, [question, answer, *results])
    assert (last.text, last.tool_calls) == ("It will be warm.", [])
    assert "17 degrees 1" in each.prompt
    assert last.usage_metadata["output_tokens"] == len(each.server.engine.script)


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_call_that_must_come(each: Scripted, choice: str) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]))
    answer = chat(each).bind_tools(TOOLS, tool_choice=choice).invoke(ASKED)
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == CALLS[:1]
    assert each.fits()


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize("method", ["function_calling", "json_mode", "json_schema"])
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_structured_output(each: Scripted, method: Any, strict: bool | None, responses: bool) -> None:
    if method == "json_mode" and strict:
        pytest.skip("langchain has no strict json_mode")
    llm = chat(each, use_responses_api=responses)
    written = WRITERS[each.dialect]([("Weather", WEATHER.model_dump())])
    each.says(written if method == "function_calling" else ANSWER)
    options = {} if strict is None else {"strict": strict}
    for ask in (whole, streamed):
        for schema in (Weather, Weather.model_json_schema()):
            bound = llm.with_structured_output(schema, method=method, include_raw=True, **options)
            found = ask(bound, ASKED + " Answer in JSON.")
            assert found["parsing_error"] is None
            assert found["parsed"] == (WEATHER if schema is Weather else WEATHER.model_dump()), found
            assert each.fits()


def test_reasoning(qwen: Scripted) -> None:
    qwen.says("<think>\nTwo and two.\n</think>\n\nFour.")
    for ask in (whole, streamed):
        answer = ask(chat(qwen), ASKED)
        assert answer.text == "Four."
        assert answer.usage_metadata["output_token_details"]["reasoning"] > 2
        answer = ask(chat(qwen, use_responses_api=True), ASKED)
        assert answer.text == "Four."
        print(answer)


def test_logprobs_and_settings(qwen: Scripted) -> None:
    qwen.says("Four.")
    llm = chat(qwen, temperature=0.5, top_p=0.9, max_tokens=9, seed=1, logprobs=True, top_logprobs=2, stop=["x"],
               presence_penalty=0.1, frequency_penalty=0.1, n=1, logit_bias={5: -100})  # fmt: skip
    for ask in (whole, streamed):
        answer = ask(llm, ASKED)
        assert len(answer.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


def test_errors_are_openais(qwen: Scripted) -> None:
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        chat(qwen, max_tokens=10**6).invoke(ASKED)
    with pytest.raises(openai.NotFoundError):
        ChatOpenAI(base_url=qwen.server.url, api_key="any", model="other", max_retries=0).invoke(ASKED)
    with running_server(api_keys=("secret",)) as server, pytest.raises(openai.AuthenticationError):
        ChatOpenAI(base_url=server.url, api_key="wrong", model="tiny/fake", max_retries=0).invoke(ASKED)
    with pytest.raises(Exception) as caught:
        chat(qwen).invoke("word " * 5000)
    print(type(caught.value), caught.value)
