"""Grammars that hold a model to its dialect and to its functions' schemas: Lark, as llguidance has it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from miniserve.core import Grammar, InvalidRequest, Reasoning
from miniserve.engine.grammar import JSON_OPTIONS, GrammarError, check_size, lark_literal, rule_up_to
from miniserve.engine.tokenizer import Tokenizer
from miniserve.engine.tool_dialects import ToolDialect, types_of

Schema = Mapping[str, Any]

_NO_MEANING = frozenset({"$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated"})
_ONE_LINE = {**JSON_OPTIONS, "whitespace_pattern": "[ ]?"}  # as calls are written
_OF_OBJECTS = frozenset({"type", "properties", "required", "additionalProperties", "$defs", "definitions"})


def call_grammar(
    dialect: ToolDialect,
    functions: Mapping[str, Schema | None],
    tokenizer: Tokenizer,
    *,
    must_call: bool,
    once: bool,
    reasoning: Reasoning | None = None,
    content: Schema | None = None,
) -> Grammar:
    """The answer is calls of `functions`, whose arguments follow their schemas (None: any object), or `must_call` is
    false and it is text that may end with such calls: where a call begins it is one. `once`: one call at most.
    `content`: the schema of JSON that comes instead of text and calls behind it. The answer follows `reasoning`, where
    there is some. Raises `InvalidRequest` for a schema that the dialect's own form of
    arguments cannot be held to."""
    written = dialect.written
    try:
        check_size([*functions.values(), content])
    except GrammarError as error:
        raise InvalidRequest(f"tools cannot be enforced: {error}.", "tools") from None

    def literal(text: str) -> str:
        return lark_literal(text, tokenizer)

    # What makes a text a call; of the dialect whose calls begin with nothing of their own it is a brace.
    trigger = "{" if dialect.bare else dialect.begins[0]
    lines, first, further = ["%llguidance {}", r"ANY: /(.|\n)*/"], [], []
    for number, (name, schema) in enumerate(functions.items()):
        before, after = (part.replace("NAME", name) for part in (written.before, written.after))
        lines.append(f"arguments_{number}: {_arguments(dialect, name, schema)}")
        rest = f"arguments_{number} {literal(after)}"
        further.append(f"{literal(before)} {rest}")
        first.append(f"{literal((written.first + before).removeprefix(trigger))} {rest}")
    more = "" if once or written.between is None else f"({literal(written.between)} further)*"
    lines += [
        f"further: {' | '.join(further)}",
        f"calls: ({' | '.join(first)}) {more} {literal(written.last)}",
    ]
    if dialect.xml:
        lines.append(r'until_end[lazy]: ANY "\n</parameter>\n"')
    # Without the second part reasoning could pass for text.
    thought = "" if reasoning is None or reasoning.is_open else rf" & ~/{_escaped(reasoning.begin)}(.|\n)*/"
    if must_call:
        lines.append(f"start: {literal(trigger)} calls")
    elif content is not None:
        lines += [f"content: {_json(content, JSON_OPTIONS)}", f"start: content | {literal(trigger)} calls"]
    elif dialect.bare:
        lines += [rf"WORDS: /\s*([^{{\s](.|\n)*)?/{thought}", f"start: WORDS | {literal(trigger)} calls"]
    else:
        lines += [rf"WORDS: /(.|\n)*/{thought}", rule_up_to("called", "WORDS", literal(trigger))]
        lines.append("start: WORDS | called calls")
    return Grammar("calls", "\n".join([*lines, ""]))


def _arguments(dialect: ToolDialect, name: str, schema: Schema | None) -> str:
    if not dialect.xml:
        return _json({**(schema or {}), "type": "object"})
    if schema is None:
        return r'("<parameter=" /[^>\n]+/ ">\n" until_end)*'
    return _xml_parameters(name, schema)


def _json(schema: Schema, options: Schema = _ONE_LINE) -> str:
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _xml_parameters(name: str, schema: Schema) -> str:
    """Parameters in the order of the schema. Strings are free text, or one of an enumeration."""
    if unknown := set(schema) - _NO_MEANING - _OF_OBJECTS:
        raise _not_enforced(name, min(unknown))
    definitions = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    parts = []
    for key in [*properties, *(key for key in required if key not in properties)]:
        if not isinstance(key, str) or ">" in key or "\n" in key:
            raise _not_enforced(name, f"properties.{key}")
        value = _xml_value(f"{name}.{key}", properties.get(key, {}), definitions)
        part = f"{json.dumps(f'<parameter={key}>' + chr(10))} {value}"
        parts.append(part if key in required else f"({part})?")
    return " ".join(parts)


def _xml_value(path: str, schema: object, definitions: Schema) -> str:
    end = r'"\n</parameter>\n"'
    if types_of(schema) != {"string"} or not isinstance(schema, Mapping):
        return f"{_json({**schema, **definitions} if isinstance(schema, Mapping) else {})} {end}"
    rules = set(schema) - _NO_MEANING - {"type"}
    if rules <= {"enum", "const"} and rules:
        texts = [schema["const"]] if "const" in schema else schema["enum"]
        return f"({' | '.join(map(json.dumps, texts))}) {end}"
    if rules:
        raise _not_enforced(path, min(rules))
    return "until_end"


def _not_enforced(path: str, keyword: str) -> InvalidRequest:
    return InvalidRequest(
        f"tools: {keyword!r} of {path[:200]!r} cannot be enforced, as this model writes arguments as tags; leave it "
        "out, or let the model choose: tool_choice auto, without strict.",
        "tools",
    )


def _escaped(text: str) -> str:
    return re.sub(r"([^\w<> ])", r"\\\1", text)
