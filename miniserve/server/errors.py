"""Every error leaves in OpenAI's envelope: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from miniserve.core import InvalidRequest

logger = logging.getLogger(__name__)

_MAX_MESSAGE = 1000  # characters: an error never sends a large input back
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestEntityTooLargeError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class APIError(Exception):
    """An answer other than 200. `param` is the field at fault; `code` a word that programs may test for."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers

    def envelope(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        error = {"message": clip(self.message), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> Response:
        return json_response(self.envelope(), self.status, self.headers)


def json_response(body: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Encodes without pydantic; `body` is made of JSON types and finite floats."""
    return Response(msgspec.json.encode(body), status, dict(headers or {}), "application/json")


def clip(text: str) -> str:
    """Printable and at most `_MAX_MESSAGE` characters: half surrogates and long inputs are no answer to anybody."""
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"


def from_invalid_request(error: InvalidRequest) -> APIError:
    return APIError(400, str(error), param=error.param)


def from_validation(errors: Sequence[Mapping[str, Any]]) -> APIError:
    """The first thing wrong with a body, as FastAPI found it."""
    first = errors[0]
    kind, where = str(first.get("type", "")), tuple(first.get("loc", ()))
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", "")
        return APIError(400, f"The request body is not valid JSON: {reason}.")
    if where == ("body",):
        return APIError(400, "The request body must be a JSON object sent with Content-Type: application/json.")
    param = _field_path(where[1:] if where[:1] == ("body",) else where)
    message = str(first.get("msg", "is not valid")).removeprefix("Value error, ")
    return APIError(400, f"{param}: {message}", param=param)


def _field_path(parts: Sequence[object]) -> str:
    """("messages", 0, "role") is `messages[0].role`."""
    path = ""
    for part in parts:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    return clip(path)[:200]


def install(app: FastAPI) -> None:
    """Make every exception of a request an envelope."""

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error.response()

    async def invalid_request(_: Request, error: Exception) -> Response:
        assert isinstance(error, InvalidRequest)
        return from_invalid_request(error).response()

    async def validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return from_validation(error.errors()).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return APIError(404, f"There is nothing at {request.method} {request.url.path}.").response()
        # FastAPI's own sentence does not say what is wrong with the body.
        if error.status_code == 400 and isinstance(error.__cause__, UnicodeDecodeError | RecursionError):
            return APIError(400, f"The request body is not valid JSON: {error.__cause__}.").response()
        return APIError(error.status_code, str(error.detail), headers=error.headers).response()

    async def unexpected(request: Request, error: Exception) -> Response:
        # Starlette raises it again after this answer; uvicorn's logger then prints the traceback.
        return APIError(
            500, f"The server failed on this request ({type(error).__name__}); its log says more."
        ).response()

    app.add_exception_handler(APIError, api_error)
    app.add_exception_handler(InvalidRequest, invalid_request)
    app.add_exception_handler(RequestValidationError, validation)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)
