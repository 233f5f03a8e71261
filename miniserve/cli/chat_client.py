"""A small client of the chat API: one conversation's next answer, piece by piece."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from miniserve.core import UserError

# Limit for a model without a chat template, which continues the text: the endpoint's default of 16 tokens is too few.
_COMPLETION_TOKENS = 256


class ChatError(Exception):
    """The server did not give an answer; `str(error)` says why."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """What is sent with each question; None means the server's default."""

    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Message:
    role: str
    content: str


class ChatClient:
    """Talks to an OpenAI-compatible server at `url` (with or without `/v1`).

    `finish_reason` is that of the last answer. `has_chat_template` turns False when the server reports that its model
    has none: from then on each question is sent alone, as text to continue.
    """

    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # No limit on the time between two pieces: a long prompt on a CPU takes minutes. No proxy from the environment:
        # it has no place between two processes of one machine.
        with self._reach_server():
            self._http = httpx.Client(
                base_url=self.url, headers=headers, timeout=httpx.Timeout(None, connect=10), trust_env=False
            )
        self._model = model
        self.has_chat_template = True
        self.finish_reason: str | None = None

    @property
    def model(self) -> str:
        """The model asked for, else the first that the server has. Raises `UserError` where no server answers."""
        if self._model is None:
            self._model = self._first_model()
        return self._model

    def answer(self, messages: Sequence[Message], settings: ChatSettings) -> Generator[str, None, None]:
        """Yield the pieces of the answer to the last of `messages`. Closing the iterator aborts the request.

        Raises `ChatError` where the server refuses or fails, `UserError` where none answers.
        """
        self.finish_reason = None
        if self.has_chat_template:
            try:
                yield from self._stream("/v1/chat/completions", self._chat_body(messages, settings))
            except ChatError as error:
                if "no chat template" not in str(error):
                    raise
                self.has_chat_template = False
        if not self.has_chat_template:
            if settings.system is not None:
                raise ChatError("the model has no chat template, so it takes no system prompt")
            yield from self._stream("/v1/completions", self._completion_body(messages[-1].content, settings))

    def _chat_body(self, messages: Sequence[Message], settings: ChatSettings) -> dict[str, Any]:
        system = [Message("system", settings.system)] if settings.system is not None else []
        history = [{"role": message.role, "content": message.content} for message in (*system, *messages)]
        return {"model": self.model, "messages": history, "stream": True} | _sampling(settings)

    def _completion_body(self, prompt: str, settings: ChatSettings) -> dict[str, Any]:
        body = {"model": self.model, "prompt": prompt, "stream": True, "max_tokens": _COMPLETION_TOKENS}
        return body | _sampling(settings)

    def _stream(self, path: str, body: dict[str, Any]) -> Iterator[str]:
        with self._reach_server(), self._http.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                response.read()
                raise ChatError(_error_message(response))
            for line in response.iter_lines():
                if line.startswith("data:") and line != "data: [DONE]":
                    yield from self._pieces(_parse(line.removeprefix("data:")))

    def _pieces(self, event: dict[str, Any]) -> Iterator[str]:
        if "error" in event:
            raise ChatError(str(event["error"].get("message", event["error"])))
        for choice in event.get("choices", []):
            piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if piece:
                yield piece

    def _first_model(self) -> str:
        with self._reach_server():
            response = self._http.get("/v1/models")
        if response.status_code != 200:
            why = _error_message(response)
            raise UserError(f"{self.url} does not list its models ({why}): check --url and --api-key.")
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{self.url} does not list its models: is --url an OpenAI-compatible server?") from None

    @contextmanager
    def _reach_server(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise UserError(
                f"No server answers at {self.url}: start one with `miniserve run`, or pass --url."
            ) from None
        except (httpx.UnsupportedProtocol, httpx.InvalidURL):
            raise UserError(f"{self.url!r} is not a URL: pass one such as http://127.0.0.1:8000.") from None
        except UnicodeEncodeError:  # undecodable bytes from a terminal, a pipe or the command line
            raise ChatError("the text is not valid UTF-8") from None
        except httpx.HTTPError as error:
            raise ChatError(f"the connection to {self.url} broke ({type(error).__name__})") from error


def _parse(data: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise ChatError("the server sent an event that is not a JSON object")
    return event


def _sampling(settings: ChatSettings) -> dict[str, Any]:
    chosen = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    return {name: value for name, value in chosen.items() if value is not None}


def _error_message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return f"HTTP {response.status_code}"
