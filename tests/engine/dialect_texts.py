"""How models write calls: for each dialect the text of an answer, and a small chat template in the manner of those that
teach it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Call = tuple[str, dict[str, Any]]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _hermes(calls: Sequence[Call]) -> str:
    return "\n".join(
        f'<tool_call>\n{{"name": {_json(name)}, "arguments": {_json(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    )


def _qwen3_coder(calls: Sequence[Call]) -> str:
    texts = []
    for name, arguments in calls:
        values = "".join(
            f"<parameter={key}>\n{value if isinstance(value, str) else _json(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        texts.append(f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>")
    return "\n".join(texts)


def _llama(calls: Sequence[Call]) -> str:
    return "; ".join(f'{{"name": {_json(name)}, "parameters": {_json(arguments)}}}' for name, arguments in calls)


def _mistral(calls: Sequence[Call]) -> str:
    return "[TOOL_CALLS] " + _json([{"name": name, "arguments": arguments} for name, arguments in calls])


def _mistral_v11(calls: Sequence[Call]) -> str:
    return "".join(f"[TOOL_CALLS]{name}[ARGS]{_json(arguments)}" for name, arguments in calls)


def _deepseek_v3(calls: Sequence[Call]) -> str:
    texts = [
        f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{_json(arguments)}\n```<｜tool▁call▁end｜>"
        for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "\n".join(texts) + "<｜tool▁calls▁end｜>"


def _deepseek_v31(calls: Sequence[Call]) -> str:
    texts = [
        f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{_json(arguments)}<｜tool▁call▁end｜>" for name, arguments in calls
    ]
    return "<｜tool▁calls▁begin｜>" + "".join(texts) + "<｜tool▁calls▁end｜>"


WRITERS: dict[str, Callable[[Sequence[Call]], str]] = {
    "hermes": _hermes,
    "qwen3_coder": _qwen3_coder,
    "llama3_json": _llama,
    "mistral": _mistral,
    "mistral_v11": _mistral_v11,
    "deepseek_v3": _deepseek_v3,
    "deepseek_v31": _deepseek_v31,
}

# Small templates in the manner of those that teach a dialect: how they show tools, earlier calls and results, and
# whether they take the arguments of calls as objects or as text.

_CHATML = """
{%- if tools %}{{- '<|im_start|>system\\n' + HOW }}{% for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content or '' }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}{{- '\\n' }}CALL{% endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
_HERMES_CALL = """{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}"""
_CODER_CALL = """{{- '<tool_call>\\n<function=' + call.function.name + '>\\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\\n' + (value if value is string else value | tojson) + '\\n</parameter>\\n' }}
{%- endfor %}{{- '</function>\\n</tool_call>' }}"""

_LLAMA = """
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {%- for call in message.tool_calls %}
            {{- '; ' if not loop.first }}{{- '{"name": "' + call.function.name + '", "parameters": ' }}
            {{- call.function.arguments | tojson }}{{- '}' }}
        {%- endfor %}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + ({'output': message.content} | tojson) }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {%- if loop.first and tools %}{% for tool in tools %}{{- tool | tojson(indent=4) }}{% endfor %}{% endif %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_MISTRAL = """
{%- set first = namespace(user=messages | selectattr('role', 'equalto', 'user') | first) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools and message == first.user %}
            {{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.tool_calls is defined %}CALLS
    {%- elif message.role == 'tool' %}
        {%- if message.tool_call_id | length != 9 %}{{- raise_exception('ids have 9 characters') }}{% endif %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + message.content + '</s>' }}{% endif %}
{%- endfor %}"""
_MISTRAL_CALLS = """
{{- '[TOOL_CALLS] [' }}
{%- for call in message.tool_calls %}
    {{- ', ' if not loop.first }}{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}
{%- endfor %}{{- ']</s>' }}"""
_MISTRAL_V11_CALLS = """
{%- for call in message.tool_calls %}
    {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + (call.function.arguments | tojson) }}
{%- endfor %}{{- '</s>' }}"""

_DEEPSEEK = """
{%- if tools %}{% for tool in tools %}{{- tool | tojson }}{% endfor %}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{- message['content'] }}{% endif %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {{- '<｜Assistant｜></think>' + message['content'] }}
        {%- if message['tool_calls'] is defined %}
            {{- '<｜tool▁calls▁begin｜>' }}
            {%- for call in message['tool_calls'] %}
                {{- '<｜tool▁call▁begin｜>' + CALL + '<｜tool▁call▁end｜>' }}
            {%- endfor %}
            {{- '<｜tool▁calls▁end｜>' }}
        {%- endif %}
    {%- endif %}
    {%- if message['role'] == 'tool' %}
        {{- '<｜tool▁output▁begin｜>' + message['content'] + '<｜tool▁output▁end｜>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

TEMPLATES: dict[str, str] = {
    "hermes": _CHATML.replace("CALL", _HERMES_CALL).replace("HOW", "'Call with {\"name\": …, \"arguments\": …}'"),
    "qwen3_coder": _CHATML.replace("CALL", _CODER_CALL).replace("HOW", "'Call with <tool_call>\\n<function=NAME>'"),
    "llama3_json": _LLAMA,
    "mistral": _MISTRAL.replace("CALLS", _MISTRAL_CALLS, 1),
    "mistral_v11": _MISTRAL.replace("CALLS", _MISTRAL_V11_CALLS, 1),
    "deepseek_v3": _DEEPSEEK.replace(
        "CALL + ", "'function<｜tool▁sep｜>' + call['function']['name'] + '\\n```json\\n' + "
        "call['function']['arguments'] + '\\n```' + "
    ),
    "deepseek_v31": _DEEPSEEK.replace(
        "CALL + ", "call['function']['name'] + '<｜tool▁sep｜>' + call['function']['arguments'] + "
    ),
}  # fmt: skip
