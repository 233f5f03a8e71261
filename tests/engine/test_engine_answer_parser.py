"""What is read out of a model's text, however it is cut: calls in every dialect, reasoning, and what only looks like
them."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from dialect_texts import WRITERS
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.core import Reasoning
from miniserve.engine.answer_parser import AnswerParser
from miniserve.engine.call_reader import CallArguments, CallBegin, CallEnd, Content, Event, Thought
from miniserve.engine.reasoning import REASONING_DIALECTS
from miniserve.engine.tool_dialects import TOOL_DIALECTS, tool_dialect

ANY: dict[str, Any] = {"type": "object", "properties": {}}
PLACES = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "when": {"anyOf": [{"type": "number"}, {"type": "null"}]},
        "flags": {"type": ["boolean", "array"]},
        "place": {"type": "object"},
        "kind": {"enum": ["a", 1]},
    },
}
FUNCTIONS = {"get_weather": PLACES, "now": ANY, "a.b/c:d-e": ANY}

texts = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from('"\\{}[]<>/\n ,;:')), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
typed = st.fixed_dictionaries(
    {},
    optional={
        "city": texts.filter(lambda text: "</parameter>" not in text),
        "days": st.integers(),
        "when": st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(),
        "flags": st.booleans() | st.lists(st.integers(), max_size=3),
        "place": st.dictionaries(texts.filter(lambda text: "</parameter>" not in text), st.integers(), max_size=2),
        "kind": st.sampled_from(["a", 1]),
    },
)
any_calls = st.lists(
    st.tuples(st.sampled_from(list(FUNCTIONS)), st.dictionaries(texts, values, max_size=3)), max_size=3
)
typed_calls = st.lists(st.tuples(st.just("get_weather"), typed), max_size=3)
words = st.text("ab \n.", max_size=12)
PLAIN = Reasoning("<think>", "</think>", False)
OPEN = Reasoning("<think>", "</think>", True)


def read(pieces: Iterable[str], parser: AnswerParser) -> list[Event]:
    """All events, neighbours of a kind as one."""
    events: list[Event] = []
    for event in [*(event for piece in pieces for event in parser.push(piece)), *parser.finish()]:
        last = events[-1] if events else None
        if isinstance(event, Content | Thought) and type(last) is type(event):
            events[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        elif isinstance(event, CallArguments) and isinstance(last, CallArguments) and last.index == event.index:
            events[-1] = CallArguments(event.index, last.text + event.text)
        else:
            events.append(event)
    return events


def bytewise(text: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    return (decoder.decode(bytes([byte])) for byte in text.encode())


def parser_of(dialect: str, reasoning: Reasoning | None = None) -> AnswerParser:
    return AnswerParser(reasoning, TOOL_DIALECTS[dialect], FUNCTIONS)


def told(events: list[Event]) -> tuple[str, list[tuple[str, Any]]]:
    """The content and the calls."""
    calls: list[list[Any]] = []
    for event in events:
        if isinstance(event, CallBegin):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            calls[event.index][1] += event.text
    content = "".join(event.text for event in events if isinstance(event, Content))
    return content, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize("dialect", TOOL_DIALECTS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_calls_are_read_as_they_were_meant_however_the_text_is_cut(dialect: str, data: st.DataObject) -> None:
    calls = data.draw(typed_calls if dialect == "qwen3_coder" else any_calls)
    before = "" if dialect == "llama3_json" else data.draw(words)
    text = before + (WRITERS[dialect](calls) if calls else "")
    whole = read([text], parser_of(dialect))
    assert read(bytewise(text), parser_of(dialect)) == whole
    cut = data.draw(st.integers(0, len(text)))
    assert read([text[:cut], text[cut:]], parser_of(dialect)) == whole
    content, found = told(whole)
    assert content == (before.rstrip() if calls else before)
    assert found == calls
    assert sum(isinstance(event, CallEnd) for event in whole) == len(calls)


@pytest.mark.parametrize("dialect", TOOL_DIALECTS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_broken_and_made_up_texts_lose_nothing_and_are_read_the_same_in_any_pieces(
    dialect: str, data: st.DataObject
) -> None:
    """Texts of the dialects' own pieces, in any order, and answers that end anywhere."""
    written = WRITERS[dialect]([("get_weather", {"city": "x"}), ("now", {})])
    marks = [*TOOL_DIALECTS[dialect].begins, *TOOL_DIALECTS[dialect].marks, "<function=", ">", "function", "now"]
    pieces = st.sampled_from(
        [*marks, '{"name": "now", ', '"arguments": {}', "}", "{", "]", ",", ";", '"', "\n", "```json"]
    )
    start = data.draw(st.integers(0, len(written)))
    text = written[:start] + "".join(data.draw(st.lists(pieces, max_size=8))) + data.draw(words)
    whole = read([text], parser_of(dialect))
    assert read(bytewise(text), parser_of(dialect)) == whole
    if not any(isinstance(event, CallBegin) for event in whole):
        assert whole == ([Content(text)] if text else [])
    for name in (event.name for event in whole if isinstance(event, CallBegin)):
        assert name in FUNCTIONS


@pytest.mark.parametrize(
    ("dialect", "text"),
    [
        ("hermes", "Write <tool_call> and </tool_call> around it."),
        ("hermes", '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>'),
        ("hermes", '<tool_call>\n{"name": "now", "arguments": "none"}\n</tool_call>'),
        ("hermes", '```json\n{"name": "now", "arguments": {}}\n```'),
        ("qwen3_coder", "<tool_call>\n<function=unknown>\n</function>\n</tool_call>"),
        ("llama3_json", '{"name": "Ada", "parameters": {"age": 36}}'),
        ("llama3_json", '{"city": "Bonn"}'),
        ("llama3_json", 'Call {"name": "now", "parameters": {}}'),
        ("mistral", "The token is [TOOL_CALLS] and a list follows it: [1]"),
        ("mistral_v11", "[TOOL_CALLS]unknown[ARGS]{}"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>nothing<｜tool▁calls▁end｜>"),
    ],
)
def test_text_that_only_looks_like_a_call_is_text(dialect: str, text: str) -> None:
    assert read([text], parser_of(dialect)) == read(text, parser_of(dialect)) == [Content(text)]


def test_markers_that_are_special_tokens_are_never_content() -> None:
    hidden = frozenset({"[TOOL_CALLS]", "[ARGS]"})
    for text, shown in (("[TOOL_CALLS] hm", " hm"), ("a[ARGS]b[TOOL_CALLS]", "ab"), ("[TOOL_CALLS", "[TOOL_CALLS")):
        for pieces in ([text], list(text)):
            assert read(pieces, AnswerParser(None, TOOL_DIALECTS["mistral"], FUNCTIONS, hidden)) == [Content(shown)]


@pytest.mark.parametrize(
    ("dialect", "text", "calls"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', [("now", {"a": 1})]),
        ("hermes", '<tool_call>\n{"name": "now"}\n</tool_call>', [("now", {})]),
        ("hermes", '<tool_call>\n{"id": [1], "name": "now", "arguments": null}', [("now", {})]),
        ("hermes", '<tool_call>x<tool_call>{"name": "now", "arguments": {}}', [("now", {})]),
        ("llama3_json", ' <|python_tag|>{"type": "function", "name": "now", "parameters": {}}', [("now", {})]),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": {}, "id": "123456789"}]', [("now", {})]),
        ("mistral_v11", "[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}", [("now", {})]),
        ("mistral_v11", '[TOOL_CALLS]now{"a": 1}', [("now", {"a": 1})]),
        (
            "qwen3_coder",
            "<tool_call><function=get_weather><parameter=days>3</parameter><parameter=flags>True</parameter>"
            "<parameter=new>[1]</parameter></function></tool_call>",
            [("get_weather", {"days": 3, "flags": True, "new": [1]})],
        ),
    ],
)
def test_calls_are_read_in_other_spellings(dialect: str, text: str, calls: list[tuple[str, Any]]) -> None:
    assert told(read([text], parser_of(dialect)))[1] == told(read(text, parser_of(dialect)))[1] == calls


def test_the_name_comes_first_and_the_arguments_as_they_come() -> None:
    parser = parser_of("hermes")
    assert parser.push('<tool_call>\n{"name": "now", "arguments": ') == []
    assert parser.push('{"a') == [CallBegin(0, "now"), CallArguments(0, '{"a')]
    assert parser.push('": 1') == [CallArguments(0, '": 1')]
    assert parser.push("}}") == [CallArguments(0, "}"), CallEnd(0)]
    assert parser.push("\n</tool_call>") == parser.finish() == []


def test_an_object_that_is_no_call_is_not_held_back() -> None:
    """Of Llama's calls, which have no marker: answers by a JSON schema come beside tools."""
    parser = parser_of("llama3_json")
    assert parser.push('{"city"') == [Content('{"city"')]
    assert parser.push(': "Bo') == [Content(': "Bo')]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    thought=st.text("ab</think>\n", max_size=20).filter(lambda text: "</think>" not in text),
    said=words,
    is_open=st.booleans(),
    ended=st.booleans(),
    repeated=st.booleans(),
)
def test_reasoning_is_told_from_what_follows(
    thought: str, said: str, is_open: bool, ended: bool, repeated: bool
) -> None:
    thought = "x" + thought
    text = ("" if is_open and not repeated else "<think>") + thought + ("</think>" + said if ended else "")
    reasoning = OPEN if is_open else PLAIN
    whole = read([text], AnswerParser(reasoning))
    assert read(text, AnswerParser(reasoning)) == whole
    kept = said.lstrip("\n") if ended else ""
    assert whole == [Thought(thought.rstrip("\n")), *([Content(kept)] if kept else [])]


def test_without_reasoning_all_is_content() -> None:
    for text in ("Hi <think>x</think>", "<thin", "\n<think>", "x</think>y"):
        assert read([text], AnswerParser(PLAIN)) == read(text, AnswerParser(PLAIN)) == [Content(text)]


def test_calls_in_reasoning_are_reasoning_and_those_behind_it_are_calls() -> None:
    call = WRITERS["hermes"]([("now", {})])
    for pieces in ([f"{call}</think>\n\n{call}"], list(f"{call}</think>\n\n{call}")):
        events = read(pieces, parser_of("hermes", OPEN))
        assert events == [Thought(call), CallBegin(0, "now"), CallArguments(0, "{}"), CallEnd(0)]


def test_where_a_prompt_leaves_the_reasoning() -> None:
    qwen, deepseek = REASONING_DIALECTS["qwen3"], REASONING_DIALECTS["deepseek_r1"]
    assert qwen.after("<|im_start|>assistant\n") == PLAIN
    assert qwen.after("<|im_start|>assistant\n<think>\n") == OPEN
    assert qwen.after("<|im_start|>assistant\n<think>\n\n</think>\n\n") is None
    assert deepseek.after("<|Assistant|>") == OPEN
    assert deepseek.after("<|Assistant|></think>") is None
    assert qwen.after("…<think>\nTwo and", "<think>\nTwo and") == OPEN
    assert qwen.after("…<think>x</think>Four", "<think>x</think>Four") is None
    assert qwen.after("…Four", "Four") is None


@pytest.mark.parametrize(
    ("template", "dialect"),
    [
        ('{{ "<tool_call>" }}{"name": …, "arguments": …}', "hermes"),
        ("<tool_call>\n<function=example>", "qwen3_coder"),
        ("<tool_call>{{ name }}<arg_key> arguments", None),
        ("<｜tool▁calls▁begin｜>…```json", "deepseek_v3"),
        ("<｜tool▁calls▁begin｜>", "deepseek_v31"),
        ("[TOOL_CALLS] [", "mistral"),
        ("[TOOL_CALLS]{{ name }}[ARGS]", "mistral_v11"),
        ('Environment: ipython … "parameters": ', "llama3_json"),
        ("{{ messages }}", None),
    ],
)
def test_a_template_tells_its_dialect(template: str, dialect: str | None) -> None:
    found = tool_dialect(template)
    assert (None if found is None else found.name) == dialect
