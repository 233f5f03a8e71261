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
    structural_tag: TagsOrText | None = None


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
    found = []
    if body.response_format is not None and (grammar := _response_format(body.response_format)) is not None:
        found.append(("response_format", grammar))
    if (outputs := body.structured_outputs) is not None:
        kinds = {info.alias or name: getattr(outputs, name) for name, info in StructuredOutputs.model_fields.items()}
        said = [(f"structured_outputs.{kind}", _grammar(kind, value)) for kind, value in kinds.items() if _says(value)]
        if not said:
            raise InvalidRequest(
                "structured_outputs says nothing; leave it out or give it one of json, regex, choice, "
                "grammar, json_object, structural_tag.",
                "structured_outputs",
            )
        found += said
    for field in StructuredFields.model_fields:
        if field.startswith("guided_") and _says(value := getattr(body, field)):
            found.append((field, _grammar(field.removeprefix("guided_"), value)))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise InvalidRequest(f"Only one field may say what the output must be, not {names}.", found[1][0])
    return found[0] if found else None


def _says(value: object) -> bool:
    return value is not None and value is not False


def _response_format(asked: ResponseFormat) -> Grammar | None:
    tags = asked.structures is not None or asked.triggers is not None
    if (asked.json_schema is not None) != (asked.type == "json_schema") or tags != (asked.type == "structural_tag"):
        raise InvalidRequest(
            "response_format: json_schema goes with the type json_schema, and structures and triggers with "
            f"structural_tag; the type is {asked.type}.",
            "response_format",
        )
    if asked.json_schema is not None:
        return _grammar("json", asked.json_schema.json_schema)
    return None if asked.type == "text" else _grammar(asked.type, asked)


def _grammar(kind: str, value: Any) -> Grammar:
    """`kind`: a field of `StructuredOutputs`, by its name in requests."""
    match kind:
        case "json":
            return Grammar("json_schema", json.dumps(value))
        case "json_object":
            return Grammar("json_schema", '{"type": "object"}')
        case "choice":
            return Grammar("choice", json.dumps(value))
        case "structural_tag":
            tags = [tag.model_dump(by_alias=True) for tag in value.structures or ()]
            return Grammar("structural_tag", json.dumps({"tags": tags, "triggers": value.triggers or []}))
        case "regex":
            return Grammar("regex", value)
    return Grammar("grammar", value)
