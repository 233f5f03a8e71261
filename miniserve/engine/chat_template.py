"""A conversation through the model's chat template: one renderer for the server, `/tokenize` and `LLM.chat`."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, TypeGuard, cast

import msgspec

from miniserve.core import InvalidRequest, UserError
from miniserve.engine.template_process import OVER_LIMITS, Answer, Job
from miniserve.parallel.child import start_python

_WAIT = 60.0  # seconds; the process ends itself at its limits, unless somebody has stopped it
# Variables for the template must not have these names: they are, or look like, options of the renderer.
_RESERVED = frozenset({
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "conversations", "documents",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "self",
    "tokenize", "tokenizer_kwargs", "tools", "truncation",
})  # fmt: skip


class ChatTemplate:
    """The chat template of a transformers tokenizer. Safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._process = _TemplateProcess()
        # Templates that come with requests run apart, so that a bad one delays nobody else.
        self._foreign = _TemplateProcess()

    def check(self) -> None:
        """Raises `UserError` for a template that no conversation could be rendered with."""
        if self._tokenizer.chat_template is None or isinstance(self._tokenizer.chat_template, dict):
            return
        try:
            self._process.submit(Job(self._tokenizer.chat_template)).result()
        except InvalidRequest as error:
            raise UserError(
                f"{str(error).rstrip('.')}. Mend the model's chat_template.jinja, or chat_template in its "
                "tokenizer_config.json."
            ) from error

    def render(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`submit`'s text."""
        return self.submit(messages, **options).result()

    def submit(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> Future[str]:
        """The text of a conversation, which no message's text is missing from. The template writes all special tokens.

        Raises `InvalidRequest`, at once or as the result, where the model has no template, the template refuses the
        messages, leaves one out or takes too long, or the options contradict each other.
        """
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "add_generation_prompt and continue_final_message exclude each other; set one of them to false.",
                "continue_final_message",
            )
        if not isinstance(variables or {}, Mapping):
            raise InvalidRequest("chat_template_kwargs must be a dict.", "chat_template_kwargs")
        if documents and not (is_list(documents) and all(isinstance(each, Mapping) for each in documents)):
            raise InvalidRequest("documents must be a list of dicts.", "documents")
        reserved = _RESERVED.intersection(variables or {})
        if reserved:
            raise InvalidRequest(f"chat_template_kwargs must not hold {min(reserved)!r}.", "chat_template_kwargs")
        tools = shown_tools(() if tools is None else tools)
        source = self.source(chat_template, tools)
        if documents and not names_variable(source, "documents"):
            raise InvalidRequest(
                "The chat template does not use documents; put their text into a message.", "documents"
            )
        job = Job(
            template=source,
            messages=_checked(messages),
            continue_final_message=continue_final_message,
            variables={
                **self._tokenizer.special_tokens_map,
                **(variables or {}),
                "tools": tools or None,
                "documents": None if documents is None else [dict(document) for document in documents],
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return (self._process if chat_template is None else self._foreign).submit(job)

    def source(self, chat_template: str | None, tools: Sequence[object]) -> str:
        """The template that renders a conversation, with tools perhaps another. Raises `InvalidRequest` where there is
        none."""
        if chat_template is None and self._tokenizer.chat_template is None:
            raise InvalidRequest(
                "This model has no chat template; use the completions endpoint, or serve a chat model.", "messages"
            )
        try:
            return cast(str, self._tokenizer.get_chat_template(chat_template, tools or None))
        except ValueError as error:
            raise InvalidRequest(str(error), "chat_template") from error


class _TemplateProcess:
    """Runs one job after the other, in a process that is started for the first one and again after one that was ended.
    It ends with this object."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "chat-template")
        self._end: Callable[[], object] | None = None

    def submit(self, job: Job) -> Future[str]:
        return self._thread.submit(self._run, job)

    def _run(self, job: Job) -> str:
        if self._end is None or self._process.poll() is not None:
            self._start()
        try:
            self._connection.send_bytes(msgspec.msgpack.encode(job))
            if not self._connection.poll(_WAIT):
                raise TimeoutError
            answer = msgspec.msgpack.decode(self._connection.recv_bytes(), type=Answer)
        except (OSError, EOFError):
            self._stop()
            raise InvalidRequest(OVER_LIMITS, "messages") from None
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise InvalidRequest(f"The messages or their options are not plain data: {error}.", "messages") from error
        if answer.error is not None:
            raise InvalidRequest(answer.error, answer.param)
        return answer.text

    def _start(self) -> None:
        self._stop()
        self._connection, theirs = Pipe()
        # Neither side's half of a message is waited for longer: what has stopped would hold up all renderings.
        with socket.socket(fileno=os.dup(self._connection.fileno())) as ours:
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(_WAIT), 0))
        with theirs:
            self._process = start_python("miniserve.engine.template_process", stdin=theirs.fileno())
        self._end = weakref.finalize(self, _end, self._process, self._connection)

    def _stop(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None


def _end(process: subprocess.Popen[bytes], connection: Connection) -> None:
    process.kill()
    process.wait()
    connection.close()


def _checked(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Raises `InvalidRequest` naming the first thing that no template could show, such as an image."""
    if not is_list(messages) or not messages:
        raise InvalidRequest("messages must hold at least one message.", "messages")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(path: str, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise InvalidRequest(f"{path} must be a dict with a role and a content.", path)
    content, role = message.get("content"), message["role"]
    if role == "assistant" and isinstance(refusal := message.get("refusal"), str) and refusal:
        said = content if is_list(content) else [{"type": "text", "text": content}] if content else []
        content = [*said, {"type": "refusal", "refusal": refusal}]
    if is_list(content):
        content = [_part(f"{path}.content[{i}]", part, role) for i, part in enumerate(content)] or ""
    elif not isinstance(content, str) and (content is not None or role != "assistant"):
        raise InvalidRequest(f"{path}.content must be a text or a list of parts.", f"{path}.content")
    return {**message, "content": content}


def names_variable(template: str, variable: str) -> bool:
    return re.search(rf"\b{re.escape(variable)}\b", template) is not None


def shown_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As templates see them: without `strict`, which is for those who enforce it. Raises `InvalidRequest` for what is
    no function, and for two of one name."""
    if not is_list(tools):
        raise InvalidRequest('tools must be a list of {"type": "function", "function": {"name": …}}.', "tools")
    shown: dict[str, dict[str, Any]] = {}
    for position, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if function is None or not isinstance(name, str):
            path = f"tools[{position}]"
            raise InvalidRequest(f'{path} must be {{"type": "function", "function": {{"name": …}}}}.', path)
        if name in shown:
            raise InvalidRequest(f"tools: two functions have the name {name!r}.", "tools")
        given = {key: value for key, value in function.items() if value is not None and key != "strict"}
        shown[name] = {**tool, "function": given}
    return list(shown.values())


def _part(path: str, part: object, role: str) -> dict[str, Any]:
    """Templates know parts of type text; a refusal, a part or a field, is the text of an assistant that declined."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    name = "refusal" if kind == "refusal" and role == "assistant" else "text"
    if not isinstance(part, Mapping) or kind not in ("text", "input_text", name) or not isinstance(part.get(name), str):
        raise InvalidRequest(f"{path}: only parts of type text are supported, with their text.", f"{path}.type")
    return {**{key: value for key, value in part.items() if key != "refusal"}, "type": "text", "text": part[name]}


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
