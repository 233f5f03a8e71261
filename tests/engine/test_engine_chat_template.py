"""The one renderer of conversations: what it hands the template, what it refuses, and how a bad template is ended."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fakes import TINY
from transformers import PreTrainedTokenizerFast

from miniserve.core import InvalidRequest, UserError
from miniserve.engine import chat_template
from miniserve.engine.chat_template import ChatTemplate, shown_tools
from miniserve.engine.tokenizer import Tokenizer, load_tokenizer

USER = {"role": "user", "content": "Hi"}
SYSTEM = {"role": "system", "content": "You are a cook."}
DEVELOPER = {"role": "developer", "content": "Be brief."}


@pytest.fixture(scope="module")
def chat() -> ChatTemplate:
    return Tokenizer(TINY).chat_template


def roles(body: str) -> str:
    return f"{{% for message in messages %}}{body}{{% endfor %}}"


WRITTEN = roles("[{{ message.role }}: {{ message.content }}]")
FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}({{ messages[0].content }}){% endif %}"
    + roles("{% if message.role == 'user' %}{{ message.content }}{% endif %}")
)  # fmt: skip
LAST_SYSTEM = (
    "{% set ns = namespace(system='') %}"
    + roles("{% if message.role == 'system' %}{% set ns.system = message.content %}{% endif %}")
    + "({{ ns.system }}){{ messages[-1].content }}"
)
REFUSING = (
    roles("{% if message.role == 'system' and not loop.first %}{{ raise_exception('order') }}{% endif %}") + WRITTEN
)
KNOWS_DEVELOPER = "{# developer #}" + WRITTEN


@pytest.mark.parametrize(
    ("template", "messages", "text"),
    [
        (WRITTEN, [DEVELOPER, USER], "[system: Be brief.][user: Hi]"),
        (WRITTEN, [SYSTEM, DEVELOPER, USER], "[system: You are a cook.][system: Be brief.][user: Hi]"),
        (KNOWS_DEVELOPER, [SYSTEM, DEVELOPER, USER], "[system: You are a cook.][developer: Be brief.][user: Hi]"),
        (FIRST_SYSTEM, [SYSTEM, DEVELOPER, USER], "(You are a cook.\n\nBe brief.)Hi"),
        (LAST_SYSTEM, [SYSTEM, DEVELOPER, USER], "(You are a cook.\n\nBe brief.)Hi"),
        (REFUSING, [DEVELOPER, SYSTEM, USER], "[system: Be brief.\n\nYou are a cook.][user: Hi]"),
    ],
)
def test_system_and_developer_both_reach_the_model(
    chat: ChatTemplate, template: str, messages: list[dict[str, Any]], text: str
) -> None:
    assert chat.render(messages, chat_template=template) == text


def test_a_template_that_leaves_a_text_out_is_named_with_the_message(chat: ChatTemplate) -> None:
    users = roles("{% if message.role in ['user', 'assistant'] %}{{ message.content.split('</t>')[-1] }}{% endif %}")
    thought = {"role": "assistant", "content": "Two and two.</t>"}
    assert chat.render([USER, thought, USER], chat_template=users) == "HiHi"
    # "Hi" is there, but it is the user's.
    with pytest.raises(InvalidRequest, match=r"leaves out the text of messages\[0\], whose role is 'system'"):
        chat.render([{"role": "system", "content": "Hi"}, USER], chat_template=users)
    with pytest.raises(InvalidRequest, match="'developer'"):
        chat.render([SYSTEM | {"role": "developer"}, USER], chat_template=users)
    with pytest.raises(InvalidRequest, match=r"leaves out the text of messages\[1\], whose role is 'tool'"):
        chat.render([USER, {"role": "tool", "content": "4"}], chat_template=users)


def test_no_parts_are_no_text(chat: ChatTemplate) -> None:
    assert chat.render([{"role": "user", "content": []}], chat_template=WRITTEN) == "[user: ]"


def test_lists_go_to_the_roles_that_take_them(chat: ChatTemplate) -> None:
    """A system text printed as it is, beside users' lists that are gone through."""
    template = "{{ messages[0].content | trim }}|" + "{% for p in messages[1].content %}<{{ p.text }}>{% endfor %}"
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "it's\ntwo"}]
    messages = [{"role": "system", "content": parts}, {"role": "user", "content": parts}]
    assert chat.render(messages, chat_template=template) == "one\nit's\ntwo|<one><it's\ntwo>"
    assert chat.render([SYSTEM, USER], chat_template=template) == "You are a cook.|<Hi>"


def test_no_content_is_as_transformers_has_it_or_else_empty(chat: ChatTemplate) -> None:
    messages = [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    calls = (
        "{% if message.content is defined %}{{ message.content }}{% else %}{{ message.tool_calls | tojson }}{% endif %}"
    )
    assert chat.render(messages, chat_template=roles(calls)) == 'Hi[{"name": "f"}]'
    assert chat.render(messages, chat_template=roles("{{ '<' + message.content + '>' }}")) == "<Hi><>"


def test_the_final_message_is_continued_where_it_ends(chat: ChatTemplate) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(str(TINY))
    options = {"continue_final_message": True, "add_generation_prompt": False}
    for template in (None, WRITTEN, roles("{{ message.content | trim }} </s>")):
        for content in ("one, two ", "one,\n", [{"type": "text", "text": "one "}]):
            if template is not None and not isinstance(content, str):
                continue
            messages = [USER, {"role": "assistant", "content": content, "reasoning": "count"}]
            expected = reference.apply_chat_template(messages, chat_template=template, tokenize=False, **options)
            assert chat.render(messages, chat_template=template, **options) == expected
    for content in (None, "", "a</think>b"):
        with pytest.raises(InvalidRequest, match="continue"):
            messages = [USER, {"role": "assistant", "content": content}]
            chat.render(messages, chat_template=roles("{{ message.content.split('>')[-1] }}"), **options)


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([], {}, "messages"),
        (None, {}, "messages"),
        (["Hi"], {}, "messages[0]"),
        ([{"content": "Hi"}], {}, "messages[0]"),
        ([USER, {"role": "user"}], {}, "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, "messages[0].content[0].type"),
        ([{"role": "user", "content": [{"type": "refusal", "refusal": "No."}]}], {}, "messages[0].content[0].type"),
        ([USER], {"continue_final_message": True}, "continue_final_message"),
        ([USER], {"variables": {"tokenize": True}}, "chat_template_kwargs"),
        ([USER], {"variables": "thinking"}, "chat_template_kwargs"),
        ([USER], {"documents": "Once"}, "documents"),
        ([USER], {"documents": ["Once"]}, "documents"),
        ([USER], {"variables": {"x": object()}}, "messages"),
        ([USER], {"variables": {"x": 2**70}}, "messages"),
        ([{"role": "user", "content": "\ud800"}], {}, "messages"),
        ([USER], {"chat_template": "{{ raise_exception('roles must alternate') }}"}, "messages"),
    ],
)
def test_what_cannot_be_rendered_is_named(
    chat: ChatTemplate, messages: Any, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat.render(messages, **options)
    assert refused.value.param == param


def test_a_refusal_is_what_the_assistant_said(chat: ChatTemplate) -> None:
    messages = [USER, {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}]
    assert chat.render(messages, chat_template=WRITTEN).startswith("[user: Hi][assistant: I cannot.]")
    # As the official servers return it.
    for content, said in ((None, "I cannot."), ("", "I cannot."), ("Well.", "Well.\nI cannot.")):
        messages = [USER, {"role": "assistant", "content": content, "refusal": "I cannot."}]
        assert chat.render(messages, chat_template=WRITTEN).startswith(f"[user: Hi][assistant: {said}]")


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 7 ** 9 ** 9 ** 9 }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{% set ns = namespace(s='aaaa') %}{% for a in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 'a' * 2 ** 26 }}" + WRITTEN,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('a' * 2 ** 20) }}",
        "{{ messages.__class__ }}",
        "{% set ns = namespace(__html__=1) %}" + WRITTEN,
        "{% set ns = namespace() %}{% set ns._x = 1 %}" + WRITTEN,
    ],
)
def test_a_hostile_template_ends_alone(chat: ChatTemplate, template: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        chat.render([USER], chat_template=template)
    assert len(str(refused.value)) < 2000
    assert chat.render([USER], chat_template=WRITTEN) == "[user: Hi]"
    assert chat.render([USER]).startswith("<|im_start|>user\nHi")


def test_one_job_is_answered_after_the_process_was_killed(chat: ChatTemplate) -> None:
    text = chat.render([USER])
    os.kill(chat._process._process.pid, signal.SIGKILL)
    chat._process._process.wait()
    assert chat.render([USER]) == text


@pytest.mark.parametrize("size", [10, 2_000_000])  # what a socket holds, and more than that
def test_a_stopped_process_holds_nobody_up(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_WAIT", 1.0)
    chat = Tokenizer(TINY).chat_template
    text = chat.render([USER])
    os.kill(chat._process._process.pid, signal.SIGSTOP)
    with pytest.raises(InvalidRequest, match="takes more time"):
        chat.render([{"role": "user", "content": "a" * size}])
    assert chat.render([USER]) == text


def test_the_process_ends_with_its_tokenizer() -> None:
    tokenizer = Tokenizer(TINY)
    tokenizer.chat_template.render([USER])
    process = tokenizer.chat_template._process._process
    del tokenizer
    gc.collect()
    assert process.poll() is not None


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(TINY / name, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return tmp_path


def test_without_a_template_there_is_no_chat(directory: Path) -> None:
    tokenizer = load_tokenizer(directory, "auto")
    assert tokenizer.info()["chat_template"] is None
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.chat_template.render([USER])


def test_a_broken_template_is_reported_when_the_model_is_loaded(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages }}\n{% if %}")
    with pytest.raises(UserError, match=r"not valid, line 2: .*[^.]\. Mend the model's chat_template.jinja"):
        load_tokenizer(directory, "auto")


def test_several_templates_are_chosen_by_name_and_by_tools(directory: Path) -> None:
    names = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    templates = [{"name": "default", "template": WRITTEN}, {"name": "tool_use", "template": "T" + names + WRITTEN}]
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": templates}))
    chat = load_tokenizer(directory, "auto").chat_template
    assert chat.render([USER]) == "[user: Hi]"
    assert chat.render([USER], tools=[]) == "[user: Hi]"
    assert chat.render([USER], tools=[{"function": {"name": "f"}}]) == "Tf[user: Hi]"
    assert chat.render([USER], chat_template="tool_use") == "T[user: Hi]"


def call(arguments: object, content: str | None = None) -> dict[str, Any]:
    function = {"name": "now", "arguments": arguments}
    return {"role": "assistant", "content": content, "tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("{{ f.arguments | tojson }}", 'now{"a": "é\\""}'),
        ("{% for k, v in f.arguments | items %}({{ k }}={{ v }}){% endfor %}", 'now(a=é")'),
        ("{{ '' + f.arguments }}", 'now{"a": "é\\""}'),  # takes a text alone
        ("{{ f.arguments }}", 'now{"a": "é\\""}'),  # would print an object as Python does
        ("{{ f.arguments if f.arguments is string else f.arguments | tojson }}", 'now{"a": "é\\""}'),
    ],
)
def test_arguments_go_to_a_template_in_the_form_that_it_takes(chat: ChatTemplate, arguments: str, text: str) -> None:
    calls = "{% for call in message.tool_calls or [] %}{% set f = call.function %}{{ f.name }}ARGUMENTS{% endfor %}"
    for content in ("{{ message.content or '' }}", "{{ '' + message.content }}"):  # the latter refuses a missing one
        template = roles(content + calls.replace("ARGUMENTS", arguments))
        assert chat.render([USER, call({"a": 'é"'})], chat_template=template) == f"Hi{text}"


@pytest.mark.parametrize("body", ["", "{{ f.name }}", "{{ f.arguments | tojson }}"])
def test_calls_that_a_template_leaves_out_or_garbles_are_named(chat: ChatTemplate, body: str) -> None:
    calls = "{% for call in message.tool_calls or [] %}{% set f = call.function %}" + body + "{% endfor %}"
    template = roles("{{ message.content or '' }}" + calls)
    with pytest.raises(InvalidRequest, match=r"leaves out the tool calls of messages\[1\]"):
        chat.render([USER, call({}, "Well."), USER], chat_template=template)
    no_calls = [USER, {"role": "assistant", "content": "Well.", "tool_calls": []}]
    assert chat.render(no_calls, chat_template=roles("{{ message.content }}{{ message.tool_calls }}")) == "HiWell."


def test_behind_a_tools_result_mistrals_templates_keep_the_system_text(chat: ChatTemplate) -> None:
    """They write it into the last user message, if nothing follows that."""
    template = "{% set system = messages[0].content if messages[0].role == 'system' %}" + roles(
        "{% if message.role == 'user' %}[INST]{{ system ~ '\n\n' if loop.last and system }}{{ message.content }}"
        "{% elif message.role == 'tool' %}[RESULT]{{ message.content }}"
        "{% elif message.tool_calls %}[CALL]{{ message.tool_calls | map(attribute='function') | list | tojson }}"
        "{% endif %}"
    )
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    conversation = [SYSTEM, USER, called, {"role": "tool", "content": "7"}]
    text = chat.render(conversation, chat_template=template)
    assert text.startswith("[INST]You are a cook.\n\nHi[CALL]") and text.endswith("[RESULT]7")
    assert chat.render([SYSTEM, USER], chat_template=template) == "[INST]You are a cook.\n\nHi"


@pytest.mark.parametrize(
    ("shown", "lost"),
    [
        ("{{ tools | tojson }}", None),
        ("{% for t in tools %}{{ t.function.name }}{{ t.function.description }}{{ t.function.parameters.properties }}"
         "{% endfor %}", None),
        ("{% for t in tools %}{{ t.function.name }}{{ t.function.description }}{% endfor %}", "the parameter 'day'"),
        ("{% for t in tools %}{{ t.function.name }}{% endfor %}", "the description of 'now'"),
        ("{{ tools | length }}", "the description of 'now'"),
    ],
)  # fmt: skip
def test_tools_that_a_template_leaves_out_are_named(chat: ChatTemplate, shown: str, lost: str | None) -> None:
    parameters = {"type": "object", "properties": {"day": {"type": "string"}}}
    tools = [{"type": "function", "function": {"name": "now", "description": "The time.", "parameters": parameters}}]
    if lost is None:
        assert "The time." in chat.render([USER], tools=tools, chat_template=shown + WRITTEN)
        return
    with pytest.raises(InvalidRequest, match=lost) as caught:
        chat.render([USER], tools=tools, chat_template=shown + WRITTEN)
    assert caught.value.param == "tools"


def test_tools_are_shown_as_the_server_shows_them(chat: ChatTemplate) -> None:
    """Without what is null, and without `strict`, which the server enforces."""
    function = {"name": "now", "description": None, "strict": True, "parameters": {"default": None}}
    tools = [{"type": "function", "function": function, "more": 1}]
    shown = [{"type": "function", "function": {"name": "now", "parameters": {"default": None}}, "more": 1}]
    text = chat.render([USER], tools=tools, chat_template="{{ tools | tojson }}" + WRITTEN)
    assert json.loads(text.removesuffix("[user: Hi]")) == shown
    wrong: Any
    for wrong in ({}, [{"name": "now"}], ["now"], [{"function": {"name": 5}}]):
        with pytest.raises(InvalidRequest, match=r"tools.* must be"):
            chat.render([USER], tools=wrong or {"a": 1})


def test_one_name_twice_is_found_in_one_pass() -> None:
    class Name(str):
        compared = 0
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            Name.compared += 1
            return str.__eq__(self, other)

    names = [Name(f"f{number}") for number in range(300)]
    with pytest.raises(InvalidRequest, match="'f299'"):
        shown_tools([{"function": {"name": name}} for name in (*names, Name("f299"))])
    assert Name.compared < 3000


def test_arguments_may_come_as_texts(chat: ChatTemplate) -> None:
    template = roles("{% for call in message.tool_calls or [] %}{{ call.function.name }}"
                     "{{ call.function.arguments | tojson }}{% endfor %}{{ message.content or '' }}")  # fmt: skip
    for arguments in ({"a": "é"}, '{"a": "é"}'):
        assert chat.render([USER, call(arguments)], chat_template=template) == 'Hinow{"a": "é"}'
    assert chat.render([USER, call("")], chat_template=template) == "Hinow{}"
