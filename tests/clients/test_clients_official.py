"""The official clients of OpenAI and Anthropic, where they make and read schemas and run functions by themselves."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from anthropic import Anthropic, beta_tool
from dialect_texts import WRITERS
from pydantic import BaseModel
from server_scripted import ASKED, CALLS, Scripted


class Weather(BaseModel):
    """How the weather is."""

    city: str
    days: int
    notes: list[str] | None


VALUES = {"city": 'Bad "Ems"', "days": 2, "notes": None}
WEATHER = Weather(**VALUES)


def claude(model: Scripted) -> Anthropic:
    return Anthropic(base_url=model.server.root, api_key="any", max_retries=0)


def test_openais_models_of_answers(each: Scripted) -> None:
    each.says(json.dumps(VALUES))
    asked: Any = {"model": "tiny/fake", "messages": [ASKED], "response_format": Weather}
    chats = each.client.chat.completions
    assert chats.parse(**asked).choices[0].message.parsed == WEATHER
    with chats.stream(**asked) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == WEATHER
    assert each.fits()
    asked = {"model": "tiny/fake", "input": "How will it be?", "text_format": Weather}
    assert each.client.responses.parse(**asked).output_parsed == WEATHER
    with each.client.responses.stream(**asked) as events:
        assert events.get_final_response().output_parsed == WEATHER
    assert each.fits()


def test_openais_models_of_calls(each: Scripted) -> None:
    each.says(WRITERS[each.dialect]([("Weather", VALUES)]))
    asked: Any = {"model": "tiny/fake", "messages": [ASKED], "tools": [openai.pydantic_function_tool(Weather)]}
    for choice in ("auto", "required"):
        (call,) = each.client.chat.completions.parse(**asked, tool_choice=choice).choices[0].message.tool_calls or ()
        assert call.function.parsed_arguments == WEATHER
        assert each.fits()


def test_anthropics_models_of_answers(each: Scripted) -> None:
    each.says(json.dumps(VALUES))
    asked: Any = {"model": "tiny/fake", "max_tokens": 500, "messages": [ASKED], "output_format": Weather}
    with claude(each) as client:
        assert client.messages.parse(**asked).parsed_output == WEATHER
        with client.messages.stream(**asked) as stream:
            assert stream.get_final_message().parsed_output == WEATHER
    assert each.fits()


@beta_tool
def get_weather(city: str, days: int) -> str:
    """How the weather is.

    Args:
        city: Where.
        days: How long.
    """
    return f"17 degrees in {city} for {days} days"


@pytest.mark.parametrize("stream", [False, True])
def test_anthropics_runner_of_functions(each: Scripted, stream: bool) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]), "It will be warm.")
    asked: Any = {"model": "tiny/fake", "max_tokens": 500, "messages": [ASKED], "tools": [get_weather]}
    with claude(each) as client:
        runner = client.beta.messages.tool_runner(**asked, stream=stream)
        answers = [answer.get_final_message() if stream else answer for answer in runner]  # type: ignore[union-attr]
    assert [answer.stop_reason for answer in answers] == ["tool_use", "end_turn"]
    assert answers[1].content[0].text == "It will be warm."
    assert "Where." in each.prompt
    assert "17 degrees in Bad" in each.prompt


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_their_results_in_responses(each: Scripted, stream: bool) -> None:
    each.says(WRITERS[each.dialect](CALLS[:1]), "It will be warm.")
    tool = {"type": "function", "name": "get_weather", "parameters": {"type": "object"}, "strict": False}
    turns: list[Any] = [ASKED]
    for _ in range(2):
        asked: Any = {"model": "tiny/fake", "input": turns, "tools": [tool]}
        if stream:
            with each.client.responses.stream(**asked) as events:
                answer: Any = events.get_final_response()
        else:
            answer = each.client.responses.create(**asked)
        turns += answer.output
        turns += [
            {"type": "function_call_output", "call_id": call.call_id, "output": "17 degrees"}
            for call in answer.output
            if call.type == "function_call"
        ]
    assert answer.output_text == "It will be warm."
    assert "17 degrees" in each.prompt
