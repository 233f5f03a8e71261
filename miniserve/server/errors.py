"""Every error leaves in OpenAI's envelope, `{"error": {"message", "type", "param", "code"}}`, on Anthropic's paths in
theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Scope

from miniserve.core import InvalidRequest

_MAX_MESSAGE = 1000  # characters: an error never sends a large input back
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
_ANTHROPIC_PATH = "/v1/messages/"
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


@dataclass(eq=False)
class APIError(Exception):
    """An answer other than 200. `param` is the field at fault; `code` a word that programs may test for."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    def envelope(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        error = {"message": clip(self.message), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def anthropic_envelope(self, request_id: str = "") -> dict[str, Any]:
        """It has no place for the field at fault but the message."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        named = self.param is None or self.param in self.message
        error: dict[str, Any] = {
            "type": kind,
            "message": clip(self.message if named else f"{self.param}: {self.message}"),
        }
        if self.code is not None:
            error["details"] = {"error_code": self.code}
        return {"type": "error", "error": error, "request_id": request_id}

    def response(self, scope: Scope) -> Response:
        """In the envelope of the path's API."""
        if _ANTHROPIC_PATH not in scope["path"] + "/":
            return json_response(self.envelope(), self.status, self.headers)
        request_id = scope.get("state", {}).get("request_id", "")
        return json_response(self.anthropic_envelope(request_id), self.status, self.headers)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Encodes without pydantic; `body` is made of JSON types and finite floats."""
    return Response(msgspec.json.encode(body), status, dict(headers or {}), "application/json")


def clip(text: str) -> str:
    """Printable, and cut after `_MAX_MESSAGE` characters: half surrogates and long inputs are no answer to anybody."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"


def as_api_error(error: Exception) -> APIError:
    """How a request that ended with `error` is answered."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, InvalidRequest):
        return APIError(400, str(error), param=error.param, code=error.code)
    if isinstance(error, RequestValidationError):
        return from_validation(error.errors())
    if isinstance(error, HTTPException):
        return APIError(error.status_code, str(error.detail), headers=error.headers)
    return APIError(500, f"The server failed on this request ({type(error).__name__}); its log says more.")


def from_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first thing wrong with a body or a query, as pydantic found it."""
    first = errors[0]
    param = _field_path(first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "string_unicode":  # pydantic says so of names alone, and of what they are in
        message = "the name of a field holds half of a surrogate pair, which is no Unicode text"
    return APIError(400, f"{param or 'The body'}: {message}", param=param or None)


def _field_path(parts: Sequence[object]) -> str:
    """("messages", 0, "role") is `messages[0].role`."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return clip(path)[:200]


def install(app: FastAPI) -> None:
    """Make every exception of a request an envelope. One that nobody foresaw Starlette raises again after the answer;
    uvicorn's logger then prints the traceback."""

    async def answer(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code == 404:
            error = APIError(404, f"There is nothing at {request.method} {request.url.path}.")
        return as_api_error(error).response(request.scope)

    for kind in (APIError, InvalidRequest, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
