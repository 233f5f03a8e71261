"""Tools and reasoning through the official client, over a stub engine whose answers are scripted: for each dialect a
server with a small template of its kind, which the answers are written in."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dialect_texts import WRITERS
from server_fakes import running_server, tokenizer
from server_scripted import ASKED, CALLS, NOW, TOOLS, WEATHER, Scripted, scripted

from miniserve.core import UserError
from miniserve.engine.tool_dialects import TOOL_DIALECTS
from miniserve.server import reading
from miniserve.server.config import ServerConfig


@pytest.fixture(scope="module", params=WRITERS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    yield from scripted(request.param, tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    yield from scripted("hermes", tmp_path_factory.mktemp("qwen") / "model")


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    yield from scripted("deepseek_v31", tmp_path_factory.mktemp("deepseek") / "model", reasoning_parser="deepseek_r1")


def streamed(model: Scripted, messages: list[Any], **options: Any) -> Any:
    """The message and the end of an answer that the client's own helper puts together."""
    with model.client.chat.completions.stream(model="tiny/fake", messages=messages, **options) as stream:
        return stream.get_final_completion()


def test_a_round_trip_in_every_dialect(each: Scripted) -> None:
    """A call, its result in the next prompt as the template has it, and the answer."""
    written = WRITERS[each.dialect](CALLS)
    each.says(written)
    answer = each.ask([ASKED], tools=TOOLS).choices[0]
    assert "get_weather" in each.prompt
    assert "How the weather is." in each.prompt
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    calls = answer.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == CALLS
    assert len({call.id for call in calls}) == 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": f"17 degrees {i}"} for i, call in enumerate(calls)]
    each.says("It will be warm.")
    last = each.ask([ASKED, answer.message.model_dump(exclude_none=True), *results], tools=TOOLS).choices[0]
    assert (last.finish_reason, last.message.content, last.message.tool_calls) == ("stop", "It will be warm.", None)
    for text in ("17 degrees 0", "17 degrees 1"):
        assert text in each.prompt
    as_written = json.dumps(CALLS[0][1])[1:-1] if each.dialect != "qwen3_coder" else WRITERS["qwen3_coder"](CALLS)
    assert as_written in each.prompt


def test_a_stream_is_the_whole_answer_in_every_dialect(each: Scripted) -> None:
    before = "" if each.dialect == "llama3_json" else "Let me see. "
    each.says(before + WRITERS[each.dialect](CALLS))
    chunks = list(each.ask([ASKED], tools=TOOLS, stream=True))
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    for index, (name, arguments) in enumerate(CALLS):
        first, *rest = [piece for piece in pieces if piece.index == index]
        assert (first.type, first.function.name, first.function.arguments) == ("function", name, "")
        assert first.id
        assert all(piece.id is None and piece.function.name is None for piece in rest)
        assert json.loads("".join(piece.function.arguments for piece in rest)) == arguments
        assert len(rest) > 3 or not arguments
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == before.rstrip()
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    whole, final = each.ask([ASKED], tools=TOOLS).choices[0].message, streamed(each, [ASKED], tools=TOOLS).choices[0]
    assert final.finish_reason == "tool_calls"
    assert (final.message.content or None) == whole.content
    for one, other in zip(final.message.tool_calls, whole.tool_calls, strict=True):
        assert (one.function.name, one.function.arguments) == (other.function.name, other.function.arguments)


def test_an_answer_without_calls_is_as_without_tools(each: Scripted) -> None:
    each.says("No, and <tool_call> is a word. \n")
    for options in ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}, {}):
        answer = each.ask([ASKED], **options).choices[0]
        assert (answer.finish_reason, answer.message.content) == ("stop", "No, and <tool_call> is a word. \n")
    each.says(WRITERS[each.dialect](CALLS))
    answer = each.ask([ASKED], tools=TOOLS, tool_choice="none").choices[0]
    assert answer.finish_reason == "stop"
    assert answer.message.tool_calls is None
    assert "get_weather" not in each.prompt


def test_tokenize_counts_the_tools(each: Scripted) -> None:
    body = {"messages": [ASKED], "tools": TOOLS}
    tokens = httpx.post(f"{each.server.root}/tokenize", json=body).json()["tokens"]
    each.says("Hi.")
    each.ask([ASKED], tools=TOOLS)
    assert tokens == each.server.engine.seen[-1][0]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "no way"}}]}, "tools[0].function.name"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [NOW, NOW]}, "tools"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(1025)]}, "tools"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
    ],
)
def test_what_cannot_be_done_with_tools_is_named(qwen: Scripted, change: dict[str, Any], param: str) -> None:
    assert qwen.refused([ASKED], **{"tools": TOOLS, **change}) == param


@pytest.mark.parametrize("arguments", ["{", "[1]", '"x"', 5])
def test_arguments_in_earlier_turns_must_be_objects(qwen: Scripted, arguments: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    body = {"messages": messages}
    error = httpx.post(f"{qwen.server.url}/chat/completions", json=body).json()["error"]
    assert error["param"] == "messages[1].tool_calls[0].function.arguments"


def test_a_template_that_takes_no_tools_is_named() -> None:
    with running_server(tool_call_parser="hermes") as server:
        body = {"messages": [ASKED], "tools": TOOLS, "max_tokens": 1}
        error = httpx.post(f"{server.url}/chat/completions", json=body).json()["error"]
        assert (error["param"], "leaves out" in error["message"]) == ("tools", True)
        calls = [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]
        body = {"messages": [ASKED, {"role": "assistant", "tool_calls": calls}, ASKED]}
        error = httpx.post(f"{server.url}/chat/completions", json=body).json()["error"]
        assert (error["param"], "messages[1]" in error["message"]) == ("messages", True)


def test_an_unknown_parser_is_refused_at_the_start() -> None:
    for name in ("tool_call_parser", "reasoning_parser"):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be one of auto, none"):
            ServerConfig(**{name: "klingon"})  # type: ignore[arg-type]
    for name in ("auto", "none", *TOOL_DIALECTS):
        ServerConfig(tool_call_parser=name)


def test_a_call_that_is_cut_says_so(qwen: Scripted) -> None:
    text = WRITERS["hermes"](CALLS)
    qwen.says(text)
    num_tokens = len(tokenizer().encode(text[: text.index("Ems")], False))
    answer = qwen.ask([ASKED], tools=TOOLS, max_tokens=num_tokens).choices[0]
    assert answer.finish_reason == "length"
    assert answer.message.tool_calls[0].function.arguments.startswith('{"city": "Bad ')


def test_reasoning_is_told_from_the_answer_and_counted(qwen: Scripted) -> None:
    thought, text = "<think>\nTwo and two.\n</think>", "\n\nFour."
    qwen.says(thought + text)
    for options in ({}, {"tools": TOOLS}):
        answer = qwen.ask([ASKED], **options)
        message = answer.choices[0].message
        assert (message.content, message.reasoning_content, message.reasoning) == ("Four.", *2 * ["Two and two."])
        count = answer.usage.completion_tokens_details.reasoning_tokens
        ids = qwen.server.engine.script
        decode = qwen.server.engine.tokenizer.decode
        assert decode(ids[: count - 1]) in thought != decode(ids[: count - 1])
        assert decode(ids[:count]).startswith(thought)
    chunks = list(qwen.ask([ASKED], stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta.model_dump() for chunk in chunks if chunk.choices]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Two and two."
    assert "".join(delta.get("content") or "" for delta in deltas) == "Four."
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == count
    hidden = qwen.ask([ASKED], extra_body={"include_reasoning": False})
    assert "reasoning" not in hidden.choices[0].message.model_dump()
    assert hidden.choices[0].message.content == "Four."
    assert hidden.usage.completion_tokens_details.reasoning_tokens == count
    cut = qwen.ask([ASKED], max_tokens=count - 1)
    assert (cut.choices[0].message.content, cut.choices[0].finish_reason) == (None, "length")
    assert cut.usage.completion_tokens_details.reasoning_tokens == count - 1


def test_thinking_is_switched_off_by_the_template(qwen: Scripted) -> None:
    for options in ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, {"reasoning_effort": "none"}):
        qwen.says("Four <think>.")
        answer = qwen.ask([ASKED], **options)
        assert qwen.prompt.endswith("<think>\n\n</think>\n\n")
        assert answer.choices[0].message.content == "Four <think>."
        assert answer.usage.completion_tokens_details is None
    cut = {"truncate_prompt_tokens": 4, "truncation_side": "right", "chat_template_kwargs": {"enable_thinking": False}}
    qwen.says("<think>Two.</think>Four.")
    assert qwen.ask([ASKED], extra_body=cut).choices[0].message.content == "Four."


def test_an_effort_is_what_the_template_makes_of_it(qwen: Scripted, deepseek: Scripted) -> None:
    """Where it knows a switch alone, any but none turns reasoning on."""
    qwen.says("Four.")
    deepseek.says("Four.")
    for effort, off in (("none", True), ("minimal", False), ("low", False), ("high", False), ("max", False)):
        qwen.ask([ASKED], reasoning_effort=effort)
        assert qwen.prompt.endswith("</think>\n\n") == off
        deepseek.ask([ASKED], reasoning_effort=effort)
        assert deepseek.prompt.endswith("<think>") != off
    qwen.ask([ASKED], reasoning_effort="high", extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert qwen.prompt.endswith("</think>\n\n")
    with running_server() as server:  # whose model does not reason
        body = {"messages": [ASKED], "max_tokens": 1}
        for effort, status in (("none", 200), ("low", 400)):
            answer = httpx.post(f"{server.url}/chat/completions", json={**body, "reasoning_effort": effort})
            assert answer.status_code == status
        assert answer.json()["error"]["param"] == "reasoning_effort"


def test_reasoning_that_the_prompt_begins(deepseek: Scripted) -> None:
    deepseek.says("Two and two.</think>Four.")
    answer = deepseek.ask([ASKED], extra_body={"chat_template_kwargs": {"thinking": True}})
    assert deepseek.prompt.endswith("<think>")
    assert answer.choices[0].message.reasoning_content == "Two and two."
    deepseek.says("Four.")
    for options in ({}, {"reasoning_effort": "none"}):
        assert deepseek.ask([ASKED], **options).choices[0].message.content == "Four."


def test_stop_strings_count_outside_reasoning(qwen: Scripted) -> None:
    qwen.says("<think>\none, two, three\n</think>\n\nFour, five, two, six")
    for options in ({"stop": ["two"]}, {"stop": ["two"], "tools": TOOLS}):
        for answer in (qwen.ask([ASKED], **options), streamed(qwen, [ASKED], **options)):
            (choice,) = answer.choices
            assert choice.message.reasoning_content == "one, two, three"
            assert choice.message.content.rstrip() == "Four, five,"
            assert choice.finish_reason == "stop"


def test_an_answer_goes_on_where_its_beginning_left_the_reasoning(qwen: Scripted) -> None:
    begun = {"role": "assistant", "content": "<think>\nTwo"}
    options = {"extra_body": {"continue_final_message": True, "add_generation_prompt": False}}
    qwen.says(" and two.</think>Four.")
    message = qwen.ask([ASKED, begun], **options).choices[0].message
    assert (message.reasoning_content, message.content) == (" and two.", "Four.")
    qwen.says(" and <think>three.")
    message = qwen.ask([ASKED, begun | {"content": "Two"}], **options).choices[0].message
    assert message.content == " and <think>three."


def test_what_the_model_must_call_is_enforced_by_a_grammar(each: Scripted) -> None:
    """The stub engine follows none; `test_server_real_engine.py` has one that does."""
    each.says(WRITERS[each.dialect](CALLS[:1]))
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    named = {"type": "function", "function": {"name": "get_weather"}}
    for options, held in (
        ({}, False), ({"tool_choice": "auto", "parallel_tool_calls": True}, False), ({"tool_choice": "required"}, True),
        ({"tool_choice": named}, True), ({"tools": [strict, NOW]}, True), ({"parallel_tool_calls": False}, True),
    ):  # fmt: skip
        answer = each.ask([ASKED], **{"tools": TOOLS, **options}).choices[0]
        assert answer.finish_reason == "tool_calls"
        grammar = each.server.engine.seen[-1][1].grammar
        assert (grammar is not None) == held, options
        if grammar is not None:
            assert ("now" in grammar.text) == (options.get("tool_choice") != named)


@pytest.mark.parametrize(
    ("dialect", "schema"),
    [("hermes", {"not": {"type": "string"}}), ("qwen3_coder", {"type": "string", "minLength": 2})],
)
def test_a_schema_that_cannot_be_enforced_is_named_where_it_would_have_to_be(
    dialect: str, schema: dict[str, Any], tmp_path: Path
) -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    tools = [{"type": "function", "function": function}]
    for model in scripted(dialect, tmp_path / "model"):
        model.says(WRITERS[dialect]([("f", {"a": "x"})]))
        assert model.ask([ASKED], tools=tools).choices[0].finish_reason == "tool_calls"
        assert model.refused([ASKED], tools=tools, tool_choice="required") == "tools"
        tools[0]["function"] = function | {"strict": True}
        assert model.refused([ASKED], tools=tools) == "tools"


def test_an_output_has_a_form_or_calls(qwen: Scripted) -> None:
    form = {"type": "json_object"}
    for regex in ({"guided_regex": "a+"}, {"structured_outputs": {"choice": ["a"]}}):
        (field,) = regex
        assert qwen.refused([ASKED], tools=TOOLS, extra_body=regex).partition(".")[0] == field
    qwen.says("{}")
    assert qwen.ask([ASKED], tools=TOOLS, response_format=form).choices[0].message.content == "{}"
    assert qwen.server.engine.seen[-1][1].grammar.kind == "calls"
    qwen.says(WRITERS["hermes"](CALLS))
    answer = qwen.ask([ASKED], tools=TOOLS, response_format=form).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    qwen.says("{}")
    assert qwen.ask([ASKED], tools=TOOLS, tool_choice="none", response_format=form).choices[0].message.content == "{}"


def test_grammars_of_calls_are_made_off_the_event_loop(qwen: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many tools it takes a good part of a second."""
    threads = []
    make = reading.call_grammar

    def seen(*arguments: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return make(*arguments, **options)

    monkeypatch.setattr(reading, "call_grammar", seen)
    qwen.says(WRITERS["hermes"](CALLS[:1]))
    qwen.ask([ASKED], tools=TOOLS, tool_choice="required")
    assert threads and qwen.server._thread not in threads
