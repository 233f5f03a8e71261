"""From the bytes of a request to its checked body: large ones in a thread, and bounded before anything is made of them,
so that no body holds up the streams of other requests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_type_hints

import msgspec
from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect

from miniserve.core import InvalidRequest
from miniserve.server.errors import APIError, from_validation
from miniserve.server.fields import Body
from miniserve.server.generation import ClientGone, while_connected

_SMALL = 65_536  # bytes; read in a few milliseconds, whatever they are
# What a larger body may hold: each bound is some tens of milliseconds of work that cannot be interrupted.
_MAX_STRINGS = 65_536
_MAX_CONTAINERS, _MOST_CONTAINERS = 8_192, 32_768
_MAX_VALUES = 262_144


def body_route(max_model_len: int, admit: Callable[[Body], None]) -> type[APIRoute]:
    """The class of routes whose endpoints take a parameter `body`, of the type to check it against, which `admit` lets
    pass or raises. FastAPI describes the body in the API's schema and has no other part in it."""
    # One large body at a time: several threads would keep the interpreter from the event loop in turns.
    thread = ThreadPoolExecutor(1, "large-body")
    # Prompts of a context's length, and messages of a token each, must pass.
    max_values, max_containers = _MAX_VALUES + max_model_len, min(_MAX_CONTAINERS + max_model_len, _MOST_CONTAINERS)

    def parse_large(raw: bytes, model: type[Body]) -> Body:
        _check_counts(raw, max_containers, max_values)
        return _parse(raw, model)

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            model = get_type_hints(self.endpoint).get("body")
            if model is None:
                return super().get_route_handler()
            endpoint: Callable[[Any], Coroutine[Any, Any, Response]] = self.endpoint

            async def answer(body: Body) -> Response:
                admit(body)
                return await endpoint(body)

            async def handle(request: Request) -> Response:
                try:
                    _check_headers(request.headers)
                    raw = await request.body()
                    if len(raw) <= _SMALL:
                        return await answer(_parse(raw, model))
                    return await while_connected(request.receive, answer_large(raw))
                except (ClientDisconnect, ClientGone):
                    return Response(status_code=499)  # which nobody reads

            async def answer_large(raw: bytes) -> Response:
                loop = asyncio.get_running_loop()
                return await answer(await loop.run_in_executor(thread, parse_large, raw, model))

            return handle

    return BodyRoute


def _check_headers(headers: Headers) -> None:
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise APIError(415, f"A body with Content-Encoding: {encoding[:40]} is not read; send it uncompressed.")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise APIError(400, "The request body must be a JSON object sent with Content-Type: application/json.")


def _check_counts(raw: bytes, max_containers: int, max_values: int) -> None:
    """Raises `InvalidRequest` for a body of too many parts, by counting what separates them."""
    # With those within texts; to take these out takes several times as long.
    if (
        raw.count(b'"') <= 2 * _MAX_STRINGS
        and raw.count(b"{") + raw.count(b"[") <= max_containers
        and raw.count(b",") < max_values
    ):
        return
    # Without escapes every quote begins or ends a string.
    bare = raw.replace(rb"\\", b"").replace(rb"\"", b"")
    num_strings = bare.count(b'"') // 2
    if num_strings > _MAX_STRINGS:
        raise InvalidRequest(f"The body holds {num_strings} strings; this server takes at most {_MAX_STRINGS}.")
    outside = b"".join(bare.split(b'"')[::2])
    num_containers = outside.count(b"{") + outside.count(b"[")
    if num_containers > max_containers:
        raise InvalidRequest(
            f"The body holds {num_containers} lists and objects; this server takes at most {max_containers}."
        )
    num_values = outside.count(b",") + 1
    if num_values > max_values:
        raise InvalidRequest(f"The body holds {num_values} values; this server takes at most {max_values}.")


def _parse(raw: bytes, model: type[Body]) -> Body:
    """Raises `APIError` 400 for what is no JSON object, and for the first field that is not as `model` has it."""
    try:
        value = _decode(raw)
    except (ValueError, RecursionError, msgspec.DecodeError) as error:
        raise APIError(400, f"The request body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise APIError(400, "The request body must be a JSON object.")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_validation(error.errors(include_url=False, include_context=False, include_input=False)) from error


def _decode(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        if len(raw) > _SMALL:
            raise
        # Slower, but it takes a NaN, for the field's own check to name, and says better where the fault is.
        return json.loads(raw)
