"""What a request says its output must be, in OpenAI's words or vLLM's, as one `Grammar`."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from miniserve.core import Grammar, InvalidRequest
from miniserve.server.fields import Exact


def _object(value: object) -> object:
    """vLLM takes the text of an object, too."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is a text, but none of JSON") from None


Schema = Annotated[dict[str, Any], BeforeValidator(_object, json_schema_input_type=dict[str, Any] | str)]
Choices = Annotated[list[str], Field(min_length=1)]


class JSONSchemaFormat(Exact):
    name: str | None = None
    description: str | None = None
    # Enforced either way, so `strict` is not looked at.
    strict: bool | None = None
    json_schema: dict[str, Any] = Field(alias="schema")


class TagFormat(Exact):
    begin: str
    json_schema: dict[str, Any] = Field(alias="schema")
    end: str


class StructuralTagFormat(Exact):
    type: Literal["structural_tag"] = "structural_tag"
    structures: Annotated[list[TagFormat], Field(min_length=1)]
    triggers: Annotated[list[str], Field(min_length=1)]


TagsOrText = Annotated[StructuralTagFormat, BeforeValidator(_object, json_schema_input_type=StructuralTagFormat | str)]


class ResponseFormat(Exact):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JSONSchemaFormat | None = None
    structures: list[TagFormat] | None = None
    triggers: list[str] | None = None


class StructuredOutputs(Exact):
    """One of them."""

    json_schema: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: (
        Annotated[StructuralTagFormat, BeforeValidator(_object, json_schema_input_type=StructuralTagFormat | str)]
        | None
    ) = None


class StructuredFields(BaseModel):
    """The fields of a request that say what its output must be: one of them at most."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None


def find_grammar(body: StructuredFields) -> tuple[str, Grammar] | None:
    """The field and what it says. Raises `InvalidRequest` where several say something."""
    found = [*_response_format(body.response_format), *_structured_outputs(body.structured_outputs)]
    guided = StructuredOutputs(
        json=body.guided_json,
        regex=body.guided_regex,
        choice=body.guided_choice,
        grammar=body.guided_grammar,
        json_object=body.guided_json_object,
    )
    found += [(f"guided_{name}", grammar) for name, grammar in _each(guided)]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise InvalidRequest(f"Only one field may say what the output must be, not {names}.", found[1][0])
    return found[0] if found else None


def _response_format(asked: ResponseFormat | None) -> list[tuple[str, Grammar]]:
    if asked is None:
        return []
    param = "response_format"
    tags = asked.structures is not None or asked.triggers is not None
    if (asked.json_schema is not None) != (asked.type == "json_schema") or tags != (asked.type == "structural_tag"):
        raise InvalidRequest(
            f"{param}: json_schema goes with the type json_schema, and structures and triggers with structural_tag; "
            f"the type is {asked.type}.",
            param,
        )
    if asked.json_schema is not None:
        return [(param, Grammar("json_schema", json.dumps(asked.json_schema.json_schema)))]
    if tags:
        return [(param, _structural(asked.structures or [], asked.triggers or []))]
    return [] if asked.type == "text" else [(param, _ANY_OBJECT)]


def _structured_outputs(asked: StructuredOutputs | None) -> list[tuple[str, Grammar]]:
    if asked is None:
        return []
    found = [(f"structured_outputs.{name}", grammar) for name, grammar in _each(asked)]
    if not found:
        raise InvalidRequest(
            "structured_outputs says nothing; leave it out or give it one of json, regex, choice, "
            "grammar, json_object, structural_tag.",
            "structured_outputs",
        )
    return found


_ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')


def _each(asked: StructuredOutputs) -> list[tuple[str, Grammar]]:
    found = []
    if asked.json_schema is not None:
        found.append(("json", Grammar("json_schema", json.dumps(asked.json_schema))))
    if asked.regex is not None:
        found.append(("regex", Grammar("regex", asked.regex)))
    if asked.choice is not None:
        found.append(("choice", Grammar("choice", json.dumps(asked.choice))))
    if asked.grammar is not None:
        found.append(("grammar", Grammar("grammar", asked.grammar)))
    if asked.json_object:
        found.append(("json_object", _ANY_OBJECT))
    if asked.structural_tag is not None:
        found.append(("structural_tag", _structural(asked.structural_tag.structures, asked.structural_tag.triggers)))
    return found


def _structural(structures: list[TagFormat], triggers: list[str]) -> Grammar:
    tags = [{"begin": tag.begin, "schema": tag.json_schema, "end": tag.end} for tag in structures]
    return Grammar("structural_tag", json.dumps({"tags": tags, "triggers": triggers}))
