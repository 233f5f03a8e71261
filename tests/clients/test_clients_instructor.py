"""instructor, in the modes that it has for OpenAI's APIs and Anthropic's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from anthropic import Anthropic
from dialect_texts import WRITERS
from openai import OpenAI
from pydantic import BaseModel, field_validator
from server_scripted import Scripted

instructor = pytest.importorskip("instructor", reason="needs instructor: pip install -e '.[clients]'")
Mode = instructor.Mode


class Weather(BaseModel):
    """How the weather is."""

    city: str
    days: int
    notes: list[str] | None = None

    @field_validator("days")
    @classmethod
    def _few(cls, value: int) -> int:
        if value > 20:
            raise ValueError("at most twenty days")
        return value


VALUES = {"city": 'Bad "Ems"', "days": 2, "notes": ["wet"]}
MESSAGES: Any = [{"role": "user", "content": "How will the weather be?"}]
OPENAI = (Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON, Mode.JSON_SCHEMA, Mode.MD_JSON, Mode.RESPONSES_TOOLS)
ANTHROPIC = (Mode.ANTHROPIC_TOOLS, Mode.ANTHROPIC_JSON)


def patched(model: Scripted, mode: Any) -> Any:
    if mode in ANTHROPIC:
        client = Anthropic(base_url=model.server.root, api_key="any", max_retries=0)
        return instructor.from_anthropic(client, mode=mode)
    return instructor.from_openai(OpenAI(base_url=model.server.url, api_key="any", max_retries=0), mode=mode)


def written(model: Scripted, mode: Any, values: Any, name: str = "Weather") -> str:
    if "TOOLS" in mode.name:
        return WRITERS[model.dialect]([(name, values)])
    text = json.dumps(values)
    return f"```json\n{text}\n```" if mode is Mode.MD_JSON else text


def options(mode: Any) -> Any:
    return {"model": "tiny/fake", "messages": MESSAGES, **({"max_tokens": 500} if mode in ANTHROPIC else {})}


@pytest.mark.parametrize("mode", [*OPENAI, *ANTHROPIC], ids=lambda mode: mode.name)
def test_a_model_of_each_mode(each: Scripted, mode: Any) -> None:
    each.says(written(each, mode, VALUES))
    found = patched(each, mode).create(response_model=Weather, **options(mode))
    assert found.model_dump() == VALUES
    if mode not in (Mode.MD_JSON, Mode.ANTHROPIC_JSON):
        assert each.fits()


@pytest.mark.parametrize("mode", [*OPENAI, *ANTHROPIC], ids=lambda mode: mode.name)
def test_a_second_try(each: Scripted, mode: Any) -> None:
    """The answer that does not validate is in the next request, with what is wrong with it."""
    each.says(written(each, mode, VALUES | {"days": 99}), written(each, mode, VALUES))
    found = patched(each, mode).create(response_model=Weather, max_retries=2, **options(mode))
    assert found.model_dump() == VALUES
    assert "at most twenty days" in each.prompt


@pytest.mark.parametrize("mode", [*OPENAI, *ANTHROPIC], ids=lambda mode: mode.name)
def test_parts_while_they_come(each: Scripted, mode: Any) -> None:
    each.says(written(each, mode, VALUES, "PartialWeather"))
    found = list(patched(each, mode).create_partial(response_model=Weather, **options(mode)))
    assert found[-1].model_dump() == VALUES
    assert len(found) > 3


@pytest.mark.parametrize("mode", [*OPENAI, *ANTHROPIC], ids=lambda mode: mode.name)
def test_several_one_after_the_other(each: Scripted, mode: Any) -> None:
    each.says(written(each, mode, {"tasks": [VALUES, VALUES]}, "IterableWeather"))
    found = list(patched(each, mode).create_iterable(response_model=Weather, **options(mode)))
    assert [one.model_dump() for one in found] == [VALUES, VALUES]


class Now(BaseModel):
    """The time."""

    zone: str


@pytest.mark.parametrize("mode", [Mode.PARALLEL_TOOLS, Mode.ANTHROPIC_PARALLEL_TOOLS], ids=lambda mode: mode.name)
def test_parallel_calls(each: Scripted, mode: Any) -> None:
    each.says(WRITERS[each.dialect]([("Weather", VALUES), ("Now", {"zone": "UTC"})]))
    client = (
        patched(each, Mode.PARALLEL_TOOLS)
        if mode is Mode.PARALLEL_TOOLS
        else instructor.from_anthropic(Anthropic(base_url=each.server.root, api_key="any", max_retries=0), mode=mode)
    )
    found = list(client.create(response_model=Iterable[Weather | Now], **options(mode), max_tokens=500))
    assert [one.model_dump() for one in found] == [VALUES, {"zone": "UTC"}]
