"""What grammars make of a model that knows nothing: any walk through the tokens that they allow is calls whose
arguments validate, in every dialect; and what they leave free."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from dialect_texts import WRITERS
from engine_fakes import TINY

from miniserve.core import Grammar, InvalidRequest, Matcher, Reasoning, SamplingParams
from miniserve.engine.answer_parser import AnswerParser
from miniserve.engine.call_reader import CallArguments, CallBegin, CallEnd, Content, Thought
from miniserve.engine.grammar import Matchers, Words, check_grammar
from miniserve.engine.tokenizer import Tokenizer
from miniserve.engine.tool_dialects import TOOL_DIALECTS
from miniserve.engine.tool_grammar import call_grammar

EOS = 2047
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Bonn", 'Bad "Ems"']},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "when": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
        "places": {"type": "array", "items": {"$ref": "#/$defs/place"}, "maxItems": 2},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
    "$defs": {"place": {"enum": ["a", "b"]}},
}
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = {"get_weather": WEATHER, "now": NOW}
GOOD = [("get_weather", {"city": 'Bad "Ems"', "days": 2}), ("now", {})]
BAD = [("get_weather", {"days": 2})]
OPEN, PLAIN = Reasoning("<think>", "</think>", True), Reasoning("<think>", "</think>", False)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def matchers(tokenizer: Tokenizer) -> Matchers:
    return Matchers(lambda: Words(tokenizer, 2048, [EOS]))


def grammar_of(
    dialect: str, tokenizer: Tokenizer, *, must_call: bool, once: bool = False, reasoning: Reasoning | None = None
) -> Grammar:
    options = {"must_call": must_call, "once": once, "reasoning": reasoning}
    grammar = call_grammar(TOOL_DIALECTS[dialect], FUNCTIONS, tokenizer, **options)  # type: ignore[arg-type]
    check_grammar(grammar, tokenizer)
    return grammar


def allowed(matchers: Matchers, matcher: Matcher) -> list[int]:
    masks = matchers.masks([(0, matcher)])
    if not masks.entries:
        return []
    bits = np.unpackbits(np.frombuffer(masks.bits, dtype=np.uint8), bitorder="little")
    found: list[int] = np.flatnonzero(bits).tolist()
    return found


def follows(matchers: Matchers, tokenizer: Tokenizer, grammar: Grammar, text: str, reasoning: Reasoning | None) -> bool:
    """Whether `text` may be the whole answer."""
    matcher = matchers.start(SamplingParams(grammar=grammar, reasoning=reasoning)).result()
    for token_id in tokenizer.encode(text, False):
        if token_id not in allowed(matchers, matcher):
            return False
        matcher.accept(token_id)
    return matcher.ended or EOS in allowed(matchers, matcher) or matcher.ended


def test_arguments_are_an_object_whatever_else_their_schema_takes(tokenizer: Tokenizer, matchers: Matchers) -> None:
    kinds = [{"type": "array"}, {"type": "object", "required": ["a"]}]
    for schema in ({"anyOf": kinds}, {"type": ["object", "null"]}, {"$ref": "#/$defs/b", "$defs": {"b": kinds[1]}}):
        grammar = call_grammar(TOOL_DIALECTS["hermes"], {"f": schema}, tokenizer, must_call=True, once=True)
        for arguments in ('{"a": 1}', "[]", "null"):
            text = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
            assert follows(matchers, tokenizer, grammar, text, None) == arguments.startswith("{"), (schema, arguments)


@pytest.mark.parametrize("dialect", WRITERS)
def test_random_walks_are_calls_whose_arguments_validate(
    dialect: str, tokenizer: Tokenizer, matchers: Matchers
) -> None:
    grammar = grammar_of(dialect, tokenizer, must_call=True)
    called = 0
    for seed in range(8):
        draw = random.Random(seed)
        matcher = matchers.start(SamplingParams(grammar=grammar)).result()
        ids: list[int] = []
        while not matcher.ended and len(ids) < 400:
            ids.append(draw.choice(allowed(matchers, matcher) or [EOS]))
            if ids[-1] == EOS:
                break
            matcher.accept(ids[-1])
        parser = AnswerParser(None, TOOL_DIALECTS[dialect], FUNCTIONS)
        events = [*parser.push(tokenizer.decode(ids)), *parser.finish()]
        assert isinstance(events[0], CallBegin)
        assert not any(isinstance(event, Content) for event in events)
        calls = [event for event in events if isinstance(event, CallBegin)]
        for call in calls[: sum(isinstance(event, CallEnd) for event in events)]:
            texts = [e.text for e in events if isinstance(e, CallArguments) and e.index == call.index]
            check_arguments(call.name, json.loads("".join(texts)))
            called += 1
    assert called >= 8


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    if name == "now":
        assert arguments == {}
        return
    assert arguments["city"] in ("Bonn", 'Bad "Ems"')
    assert type(arguments["days"]) is int
    assert 1 <= arguments["days"] <= 9
    assert arguments.get("when") in (True, False, None)
    assert set(arguments.get("places", [])) <= {"a", "b"}
    assert len(arguments.get("places", [])) <= 2
    assert set(arguments) <= set(WEATHER["properties"])  # type: ignore[call-overload]


@pytest.mark.parametrize("dialect", WRITERS)
def test_what_is_free_and_what_is_not(dialect: str, tokenizer: Tokenizer, matchers: Matchers) -> None:
    """Texts and calls as a model of the dialect writes them, also behind reasoning in which anything may be said."""
    call, bad = WRITERS[dialect](GOOD[:1]), WRITERS[dialect](BAD)
    bare = TOOL_DIALECTS[dialect].bare  # whose calls stand alone
    must = {call: True, bad: False, "Hello.": False, f"Hello. {call}": False, "": False}
    may = {call: True, bad: False, "Hello.": True, f"Hello. {call}": True, f"Hello. {bad}": bare, "": True}
    if not bare:
        must[WRITERS[dialect](GOOD)] = may[WRITERS[dialect](GOOD)] = True
    thoughts = [(None, ""), (PLAIN, ""), (PLAIN, f"<think>{bad}</think>"), (OPEN, f"Perhaps {bad}.\n</think>\n\n")]
    for must_call, texts in ((True, must), (False, may)):
        for reasoning, thought in thoughts:
            grammar = grammar_of(dialect, tokenizer, must_call=must_call, reasoning=reasoning)
            for text, good in texts.items():
                assert follows(matchers, tokenizer, grammar, thought + text, reasoning) == good, (thought, text)
        assert not follows(matchers, tokenizer, grammar, call, OPEN)  # which has not ended
    for must_call in (True, False):
        once = grammar_of(dialect, tokenizer, must_call=must_call, once=True)
        assert follows(matchers, tokenizer, once, call, None)
        assert not follows(matchers, tokenizer, once, WRITERS[dialect](GOOD), None)


@pytest.mark.parametrize("dialect", WRITERS)
def test_calls_or_json_by_a_schema(dialect: str, tokenizer: Tokenizer, matchers: Matchers) -> None:
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
    tools, call, said = TOOL_DIALECTS[dialect], WRITERS[dialect](GOOD[:1]), '{\n  "age": 3\n}'
    texts = {call: True, WRITERS[dialect](BAD): False, said: True, '{"age": "3"}': False, "Hello.": False,
             f"{said} {call}": False, f"Hello. {call}": False, "": False}  # fmt: skip
    for reasoning, thought in ((None, ""), (OPEN, "Hm.</think>\n\n")):
        grammar = call_grammar(
            tools, FUNCTIONS, tokenizer, must_call=False, once=False, reasoning=reasoning, content=schema
        )
        check_grammar(grammar, tokenizer)
        for text, good in texts.items():
            assert follows(matchers, tokenizer, grammar, thought + text, reasoning) == good, text


def test_functions_that_are_not_strict_take_any_object(tokenizer: Tokenizer, matchers: Matchers) -> None:
    for dialect in ("hermes", "qwen3_coder"):
        grammar = call_grammar(
            TOOL_DIALECTS[dialect], {"now": None, "get_weather": WEATHER}, tokenizer, must_call=False, once=False
        )
        write = WRITERS[dialect]
        assert follows(matchers, tokenizer, grammar, write([("now", {"a": "b\nc"})]), None)
        assert not follows(matchers, tokenizer, grammar, write(BAD), None)


@pytest.mark.parametrize(
    ("kind", "text", "good", "bad"),
    [
        ("json_schema", '{"type": "integer"}', "12", "x"),
        ("regex", "a+b", "aab", "ba"),
        ("choice", '["yes", "no"]', "no", "maybe"),
        ("grammar", 'start: "a" | "b"', "b", "c"),
    ],
)
def test_every_grammar_counts_behind_the_reasoning(
    kind: Any, text: str, good: str, bad: str, tokenizer: Tokenizer, matchers: Matchers
) -> None:
    grammar = Grammar(kind, text)
    for thought, reasoning in (("Hm.</think>\n\n", OPEN), ("<think>\nHm.\n</think>", PLAIN), ("", PLAIN)):
        assert follows(matchers, tokenizer, grammar, thought + good, reasoning)
        assert not follows(matchers, tokenizer, grammar, thought + bad, reasoning)
    assert not follows(matchers, tokenizer, grammar, good, OPEN)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "b+"}}}, "pattern"),
        ({"properties": {"a": {"type": "string", "maxLength": 3}}}, "maxLength"),
        ({"properties": {"a": {"type": "string"}}, "minProperties": 1}, "minProperties"),
        ({"properties": {"a>": {"type": "string"}}}, "a>"),
    ],
)
def test_what_tags_cannot_be_held_to_is_named(schema: dict[str, Any], keyword: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=keyword):
        call_grammar(TOOL_DIALECTS["qwen3_coder"], {"f": schema}, tokenizer, must_call=True, once=True)


def test_reasoning_is_told_from_an_enforced_call() -> None:
    parser = AnswerParser(OPEN, TOOL_DIALECTS["hermes"], FUNCTIONS)
    kinds = [type(event) for event in parser.push("Hm.</think>\n\n" + WRITERS["hermes"](GOOD[:1]))]
    assert kinds == [Thought, CallBegin, CallArguments, CallEnd]
