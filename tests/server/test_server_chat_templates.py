"""64 made chat templates: whichever way a conversation comes in, its ids are those that transformers makes of it, in
the form that the template takes. What each template takes is written beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx
import pytest
from engine_fakes import FACTORY
from server_fakes import TINY, FakeEngine, RunningServer, running_server
from transformers import PreTrainedTokenizerFast

from miniserve.core import InvalidRequest, SamplingParams
from miniserve.llm import LLM


class Style(NamedTuple):
    """How a template reads a content, as the body of a macro. `takes`: text, parts (a list), both, or of a list only
    its first part."""

    macro: str
    takes: str
    takes_null: bool = True


class Frame(NamedTuple):
    """How a template writes the turns. `systems`: how many system messages it takes at the start."""

    turns: str
    systems: int | None = None  # any number
    knows_developer: bool = False


STYLES = {
    "plain": Style("{{ content }}", "text"),
    "trimmed": Style("{{ content | trim }}", "text"),
    "strict": Style("{{ '' + content }}", "text", takes_null=False),
    "parts": Style("{% for part in content %}{{ part['text'] }}{% endfor %}", "parts"),
    "either": Style(
        "{% if content is string %}{{ content }}{% else %}{% for part in content %}"
        "{% if part.type == 'text' %}{{ part.text }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}",
        "both",
    ),
    "filtered": Style(
        "{{ content if content is string else "
        "content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join(' | ') }}",
        "both",
    ),
    "counted": Style(
        "{% if content is string %}{{ content.strip() }}{% else %}{% set all = namespace(text='') %}"
        "{% for part in content %}{% set all.text = all.text ~ loop.index ~ ': ' ~ part.text ~ '\n' %}{% endfor %}"
        "{{ all.text }}{% endif %}",
        "both",
    ),
    "first": Style("{{ content if content is string else content[0]['text'] }}", "first", takes_null=False),
}

FRAMES = {
    "chatml": Frame("""
{%- for message in messages %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ text(message.content) ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""),
    "headers": Frame("""
{%- set year = strftime_now('%Y') if strftime_now is defined else '2024' %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = text(messages[0]['content']), messages[1:] %}
{%- else %}
    {%- set system, rest = '', messages %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nThe year is ' + year + '.\n\n' + system + '<|eot_id|>' }}
{%- for message in rest %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + text(message['content']) + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""),
    "inst": Frame(
        """
{%- if messages[0].role == 'system' %}{% set system = text(messages[0].content) %}{% set turns = messages[1:] %}
{%- else %}{% set turns = messages %}{% endif %}
{%- for message in turns %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' }}
        {%- if loop.first and system is defined %}{{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' }}{% endif %}
        {{- text(message.content) ~ ' [/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' ~ text(message.content) ~ eos_token }}
    {%- endif %}
{%- endfor %}""",
        systems=1,
    ),
    "bars": Frame(
        """
{%- set ns = namespace(system='', last=none) %}
{%- for message in messages if message['role'] == 'system' %}{% set ns.system = text(message['content']) %}{% endfor %}
{{- bos_token ~ ns.system }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<|User|>' + text(message['content']) }}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {%- set answer = text(message['content']) %}
        {%- if '</think>' in answer %}{% set answer = answer.split('</think>')[-1] %}{% endif %}
        {{- '<|Assistant|>' + answer + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{% endif %}""",
        systems=1,
    ),
    "turns": Frame(
        """
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\n' + text(message.content) | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{% endif %}""",
        systems=0,
    ),
    "roles": Frame("""
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- '<|system|>' ~ text(message.content) ~ '<|end|>' }}
    {%- elif message.role == 'user' %}{{- '<|user|>' ~ text(message.content) ~ '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>' }}{% generation %}{{- text(message.content) ~ '<|end|>' }}{% endgeneration %}
    {%- else %}{%- continue %}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' if add_generation_prompt else eos_token }}"""),
    "thinking": Frame("""
{%- if tools %}
    {{- '<|im_start|>system\n# Tools' }}
    {%- for tool in tools %}{{- '\n' ~ tool | tojson(indent=2) }}{% endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last_query=messages | length - 1, found=false) %}
{%- for message in messages[::-1] if not ns.found %}
    {%- if message.role == 'user' %}
        {%- set ns.found, ns.last_query = true, messages | length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set words = text(message.content) %}
    {%- if message.role == 'assistant' and '</think>' in words and loop.index0 < ns.last_query %}
        {%- set words = words.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ words ~ '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}"""),
    "channels": Frame(
        """
{%- if messages[0].role in ('system', 'developer') %}
    {{- '<|start|>developer<|message|># Instructions\n\n' ~ text(messages[0].content) ~ '<|end|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{{- '<|start|>user<|message|>' ~ text(message.content) ~ '<|end|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' ~ text(message.content) ~ '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}""",
        systems=1,
        knows_developer=True,
    ),
}

Message = dict[str, Any]


def parts(*texts: str) -> list[Message]:
    return [{"type": "text", "text": text} for text in texts]


def says(role: str, content: object) -> Message:
    return {"role": role, "content": content}


ASKED = says("user", "What is 2 + 2?")
THOUGHT = says("assistant", "<think>\nTwo and two.\n</think>\n\n4")
CONVERSATIONS: tuple[tuple[list[Message], dict[str, Any]], ...] = (
    ([ASKED], {}),
    ([says("system", "Be brief."), ASKED], {"chat_template_kwargs": {"enable_thinking": False}}),
    ([ASKED, says("assistant", "4"), says("user", "Why?")], {"add_generation_prompt": False}),
    ([says("system", "Be brief."), ASKED, THOUGHT, says("user", "Why?")], {}),
    ([says("user", parts("one 'quoted'", "two\nlines"))], {}),
    ([says("developer", "Be brief."), says("user", parts("one"))], {}),
    ([says("system", "You are a cook."), says("developer", "Be brief."), ASKED], {}),
    ([says("user", "  naïve 日本語 😀 \n"), says("assistant", " yes "), says("user", "<b>&amp;</b> {{ x }}")], {}),
    ([ASKED, says("assistant", None), says("user", "Why?")], {}),
    (
        [says("system", parts("Be", "brief.")), ASKED, says("assistant", "Well, 2 + 2 ")],
        {"continue_final_message": True, "add_generation_prompt": False},
    ),
)


def as_text(content: Any) -> Any:
    return "\n".join(part["text"] for part in content) if isinstance(content, list) else content


def as_taken(messages: list[Message], style: Style, frame: Frame) -> list[Message]:
    """What somebody who knows the template would pass to transformers."""
    if not frame.knows_developer:
        messages = [message | {"role": message["role"].replace("developer", "system")} for message in messages]
    count = sum(message["role"] in ("system", "developer") for message in messages)
    if frame.systems == 1 and count > 1:
        merged = "\n\n".join(as_text(message["content"]) for message in messages[:count])
        messages = [messages[0] | {"content": merged}, *messages[count:]]
    return [message | {"content": _content(message["content"], style)} for message in messages]


def _content(content: Any, style: Style) -> Any:
    if content is None:
        return None if style.takes_null else ""
    if style.takes == "parts" and isinstance(content, str):
        return parts(content)
    is_too_long = style.takes == "first" and isinstance(content, list) and len(content) > 1
    return as_text(content) if style.takes == "text" or is_too_long else content


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(FakeEngine(max_model_len=1024), trust_request_chat_template=True) as server:
        yield server


@pytest.fixture(scope="module")
def web(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.root, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(str(TINY), runner_factory=FACTORY, max_model_len=1024)


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(TINY))


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("style", STYLES)
def test_every_front_makes_the_ids_of_transformers(
    style: str, frame: str, server: RunningServer, web: httpx.Client, llm: LLM, reference: PreTrainedTokenizerFast
) -> None:
    template = f"{{%- macro text(content) -%}}{STYLES[style].macro}{{%- endmacro -%}}{FRAMES[frame].turns}"
    for number, (messages, options) in enumerate(CONVERSATIONS):
        options = {"add_generation_prompt": True, **options}
        variables = options.pop("chat_template_kwargs", {})
        taken = as_taken(messages, STYLES[style], FRAMES[frame])
        body = {"messages": messages, "chat_template": template, "chat_template_kwargs": variables, **options}
        tokenized = web.post("/tokenize", json=body)
        if FRAMES[frame].systems == 0 and taken[0]["role"] == "system":
            assert "System role not supported" in tokenized.json()["error"]["message"]
            with pytest.raises(InvalidRequest, match="System role not supported"):
                llm.chat(messages, chat_template=template, **options)
            continue
        expected = reference.apply_chat_template(
            taken, chat_template=template, return_dict=False, **options, **variables
        )
        assert tokenized.json().get("tokens") == expected, (number, tokenized.json())
        (generation,) = llm.chat(
            messages, SamplingParams(max_tokens=1), chat_template=template, chat_template_kwargs=variables, **options
        )
        assert generation.prompt_token_ids == expected, number
        if number == len(CONVERSATIONS) - 1:  # the chat endpoint renders as /tokenize does
            assert web.post("/v1/chat/completions", json=body | {"max_tokens": 1}).status_code == 200
            assert server.engine.seen[-1][0] == expected
