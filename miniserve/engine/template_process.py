"""Where chat templates run: `python -m miniserve.engine.template_process`, started by `engine.chat_template` alone.

A template is a program: it may loop for hours or fill the memory. In a process of its own it can be ended: the kernel
does so at the limits below. It sees what transformers shows it: plain data, in Jinja's sandbox. No transformers here:
this process must start fast, as another takes its place.
"""

from __future__ import annotations

import json
import resource
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, Literal

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from miniserve.parallel.child import ignore_signals

_SECONDS = 2.0  # for one conversation
_MEMORY = 2**29  # bytes, for the whole process
_TEXT = 2**25  # characters of a rendered conversation
OVER_LIMITS = "The chat template takes more time or memory than it may (2 seconds, 512 MiB)."
_ERROR = 1000  # characters of an error
_REASONING = ("reasoning_content", "thinking", "reasoning")  # the names it is sent under; templates read the first
_SYSTEM = ("system", "developer")
_SALT = f"{uuid.uuid4().int:039d}"[-20:]  # digits: whatever a template does to a text, it leaves them as they are

Message = dict[str, Any]
_Kind = Literal["text", "call", "tool"]


class Job(msgspec.Struct):
    """A conversation to render; without messages the template is only compiled. `variables` reach the template."""

    template: str
    messages: list[Message] = []
    continue_final_message: bool = False
    variables: dict[str, Any] = {}


class Answer(msgspec.Struct):
    """`param`: the field that an error is about."""

    text: str = ""
    error: str | None = None
    param: str = "messages"


class LeftOut(ValueError):
    """The template leaves out what must not vanish."""

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.param = param


def main() -> None:
    ignore_signals()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = _MEMORY if hard == resource.RLIM_INFINITY else min(_MEMORY, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    connection: Connection[bytes, bytes] = Connection(0)
    with suppress(EOFError, OSError):  # the process that started it has ended
        while True:
            packed = connection.recv_bytes()
            signal.setitimer(signal.ITIMER_REAL, _SECONDS)
            answer = _answer(packed)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(msgspec.msgpack.encode(answer))


def _answer(packed: bytes) -> Answer:
    try:
        text = render(msgspec.msgpack.decode(packed, type=Job))
        if len(text) > _TEXT:
            return Answer(error=f"The chat template makes more than {_TEXT} characters of these messages.")
        text.encode()  # a half of a surrogate pair cannot be sent
        return Answer(text)
    except MemoryError:
        return Answer(error=OVER_LIMITS)
    except jinja2.TemplateSyntaxError as error:
        return Answer(error=f"The chat template is not valid, line {error.lineno}: {str(error.message)[:_ERROR]}")
    except Exception as error:  # a template is a program that runs on the client's data
        kind = "" if type(error) in (jinja2.TemplateError, ValueError, LeftOut) else f"{type(error).__name__}: "
        reason = str(error)[:_ERROR].encode("utf-8", "replace").decode()
        param = error.param if isinstance(error, LeftOut) else "messages"
        return Answer(error=f"The chat template refuses these {param}: {kind}{reason}", param=param)


# --- what a template sees -------------------------------------------------------------------------------------------


class _Generation(Extension):
    """`{% generation %}` marks what training is to learn; a prompt has it as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Any) -> str:
        return str(caller())


class _Namespace(jinja2.utils.Namespace):
    """Takes no names with an underscore in front, which the sandbox keeps for Python."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        for name in dict(*rest, **attributes):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, *rest, **attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not hold {name!r}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(8)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Namespace
    }  # fmt: skip
    return environment.from_string(source)


# --- a conversation in the form that the template takes ---------------------------------------------------------------


def render(job: Job) -> str:
    """The text of a conversation. The first reading of it that the template takes counts; where it takes none, what it
    says of the first one is raised."""
    template = _compiled(job.template)
    if not job.messages:
        return ""
    messages = [_with_read_arguments(_with_reasoning(_said(message))) for message in job.messages]
    refusals = []
    for reading in _readings(messages, "developer" in job.template):
        try:
            return _text_of(template, job, _fitted(template, job, reading))
        except Exception as error:
            refusals.append(error)
    raise refusals[0]


def _readings(messages: Sequence[Message], knows_developer: bool) -> Iterator[Sequence[Message]]:
    """`developer` is OpenAI's newer word for `system`, and stays where the template knows it. Most templates take one
    system message, at the start: where several are refused or left out, they become one. Mistral's write it into the
    last user message, but only where that is the last of all: behind the results of tools it is put there."""
    as_system = [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]
    readings = [messages, as_system] if knows_developer and as_system != messages else [as_system]
    yield from readings
    count = next((i for i, message in enumerate(messages) if message["role"] not in _SYSTEM), len(messages))
    if count > 1:
        text = "\n\n".join(map(_plain_text, messages[:count]))
        yield from ([{**reading[0], "content": text}, *reading[count:]] for reading in readings)
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    if messages[-1]["role"] == "tool" and 0 < count <= last:
        text = "\n\n".join(map(_plain_text, [*messages[:count], messages[last]]))
        yield [*as_system[count:last], {**messages[last], "content": text}, *as_system[last + 1 :]]


def _fitted(template: jinja2.Template, job: Job, messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with their contents as texts or as lists of parts, and the arguments of calls as objects or as JSON
    texts, whichever the template does not leave out. Raises `LeftOut` where it leaves one out both ways, or a part of
    a tool. Text of the model's own earlier turns it may shorten: reasoning is often left out."""
    plain = [{**message, "content": _plain_text(message)} for message in messages]
    forms = [messages, plain]
    if any(message.get("tool_calls") for message in messages):
        forms += [[_with_written_arguments(message) for message in form] for form in forms]
    lost_calls: list[int] = []
    for form in forms:
        try:
            trial = _Trial(template, job, form)
        except Exception:
            continue  # perhaps it refuses a list, a missing content or arguments of one form only
        if not (calls := trial.missing("call")):
            break
        lost_calls = calls
    else:
        if lost_calls:
            raise LeftOut(f"it leaves out the tool calls of messages[{lost_calls[0]}], or writes them wrongly")
        return messages  # what it says of them, without marks, is the answer
    fitted, lost = list(form), set(trial.missing("text"))
    if lost:
        others = [_other_form(message) if i in lost else message for i, message in enumerate(form)]
        with suppress(Exception):
            lost = set(_Trial(template, job, others).missing("text"))
        for i in sorted(lost):
            if form[i]["role"] != "assistant":
                raise LeftOut(f"it leaves out the text of messages[{i}], whose role is {job.messages[i]['role']!r}")
        fitted = [form[i] if i in lost else other for i, other in enumerate(others)]
    for what in trial.missing("tool"):
        raise LeftOut(f"it leaves out {what}", "tools")
    return fitted


class _Trial:
    """A rendering of texts with marks at their ends, as texts alone may be found by chance, or trimmed."""

    def __init__(self, template: jinja2.Template, job: Job, messages: Sequence[Message]) -> None:
        self._places: dict[str, tuple[_Kind, Any]] = {}
        marked = [_marked_message(self, i, message) for i, message in enumerate(messages)]
        variables = job.variables
        if tools := variables.get("tools"):
            variables = {**variables, "tools": [_marked_tool(self, tool) for tool in tools]}
        self._text = template.render(messages=marked, **variables)

    def mark(self, text: object, kind: _Kind, place: object, joint: str = "") -> str:
        mark = f"{_SALT}{joint}{len(self._places):09d}"
        self._places[mark] = kind, place
        return f"{text}{mark}"

    def missing(self, wanted: _Kind) -> list[Any]:
        """The places of what is left out, wholly or in part, or is printed as Python does: the indices of messages, or
        what of the tools it is."""
        return [
            place
            for mark, (kind, place) in self._places.items()
            if kind == wanted and (mark not in self._text or (kind == "call" and f"'{mark}" in self._text))
        ]


def _marked_message(trial: _Trial, i: int, message: Message) -> Message:
    content, calls = message.get("content"), message.get("tool_calls")
    if isinstance(content, str) and content.strip():
        message = {**message, "content": trial.mark(content, "text", i)}
    elif isinstance(content, list):  # whose `repr` doubles the backslash
        parts = [{**part, "text": trial.mark(part["text"], "text", i, joint="\\")} for part in content]
        message = {**message, "content": parts}
    return {**message, "tool_calls": [_marked_call(trial, i, call) for call in calls]} if calls else message


def _marked_call(trial: _Trial, i: int, call: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(function := call.get("function"), dict):
        return call
    name = trial.mark(function.get("name"), "call", i)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = trial.mark(arguments, "call", i)
    else:  # as a key the mark stands in quotes that tell JSON from Python
        arguments = {**(arguments or {}), trial.mark("", "call", i): 0}
    return {**call, "function": {**function, "name": name, "arguments": arguments}}


def _marked_tool(trial: _Trial, tool: dict[str, Any]) -> dict[str, Any]:
    """With marks at its name, its description and its parameters' names."""
    function = dict(tool.get("function") or {})
    name = function.get("name")
    if function.get("description"):
        function["description"] = trial.mark(function["description"], "tool", f"the description of {name!r}")
    if isinstance(properties := (function.get("parameters") or {}).get("properties"), dict):
        named = {trial.mark(key, "tool", f"the parameter {key!r} of {name!r}"): properties[key] for key in properties}
        function["parameters"] = {**function["parameters"], "properties": named}
    if name:
        function["name"] = trial.mark(name, "tool", repr(name))
    return {**tool, "function": function}


def _text_of(template: jinja2.Template, job: Job, messages: Sequence[Message]) -> str:
    """Raises `ValueError` where the final message is to be continued and cannot be."""
    if not job.continue_final_message:
        return template.render(messages=messages, **job.variables)
    final = messages[-1].get("content")
    if not final:
        raise ValueError("the final message has no text to continue")
    end = f"{_SALT} "  # the space tells whether the template trims
    last = f"{final}{end}" if isinstance(final, str) else [*final[:-1], {**final[-1], "text": final[-1]["text"] + end}]
    text = template.render(messages=[*messages[:-1], {**messages[-1], "content": last}], **job.variables)
    cut = text.rfind(end.strip())
    if cut < 0 or (final if isinstance(final, str) else final[-1]["text"]).strip() not in text:
        raise ValueError("it changes the final message, which therefore cannot be continued")
    return text[:cut] if text.startswith(end, cut) else text[:cut].rstrip()


def _said(message: Message) -> Message:
    """Without what is null, and without an empty list of calls, which templates take for calls."""
    return {k: v for k, v in message.items() if v is not None and (k != "tool_calls" or v)}


def _with_reasoning(message: Message) -> Message:
    """Under the name that templates read; gpt-oss's read `thinking`."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _with_read_arguments(message: Message) -> Message:
    """The arguments of its calls as objects, where they are JSON texts of such."""

    def read(arguments: object) -> object:
        with suppress(ValueError, RecursionError):
            if isinstance(arguments, str) and isinstance(found := json.loads(arguments or "{}"), dict):
                return found
        return arguments

    return _with_arguments(message, read)


def _with_written_arguments(message: Message) -> Message:
    """The arguments of its calls as JSON texts; templates take objects or texts."""
    return _with_arguments(message, lambda arguments: _tojson(arguments) if isinstance(arguments, dict) else arguments)


def _with_arguments(message: Message, change: Callable[[object], object]) -> Message:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        if isinstance(call, dict) and isinstance(function := call.get("function"), dict) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": change(function["arguments"])}}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _plain_text(message: Message) -> str:
    content = message.get("content", "")
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _other_form(message: Message) -> Message:
    content = message["content"]
    other = [{"type": "text", "text": content}] if isinstance(content, str) else _plain_text(message)
    return {**message, "content": other}


if __name__ == "__main__":
    main()
