"""Plain ASGI middleware: the host, the API key and the size of a body, checked before anything is parsed."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
from collections.abc import Collection, Sequence

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miniserve.server.errors import APIError
from miniserve.server.throttle import ThrottledLog

logger = logging.getLogger(__name__)


class HostMiddleware:
    """Refuses a Host header that is neither an address nor one of `hosts`, all in lower case.

    A page in a browser on this machine reaches a local server by a name of its own that resolves here (DNS rebinding),
    and would pass as the server's own page. It cannot do so by an address.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = hosts
        self._log = ThrottledLog(logger)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for value in Headers(scope=scope).getlist("host") if scope["type"] == "http" else ():
            if not self._known(value):
                self._log.warning("%s: request refused for its Host header %r.", _address(scope), value[:100])
                error = APIError(
                    403, f"This server does not go by the name {value[:200]!r}; --allowed-host lets it be used."
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _known(self, value: str) -> bool:
        name = value.partition("]")[0].removeprefix("[") if value.startswith("[") else value.partition(":")[0]
        if name.lower().removesuffix(".") in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def _address(scope: Scope) -> str:
    client = scope.get("client")
    return f"{client[0]}:{client[1]}" if client else "a client"


_GUARDED = ("/v1/", "/debug/", "/tokenize/", "/detokenize/", "/tokenizer_info/")


class PathMiddleware:
    """HEAD is GET, whose body the server leaves out; a slash at the end of a path means nothing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}
        await self._app(scope, receive, send)


class ApiKeyMiddleware:
    """Asks for one of `api_keys` (`Authorization: Bearer …` or `x-api-key`), except for OPTIONS, on `/v1`, `/debug` and
    the tokenizer's paths, which take long texts. Health checks and metrics stay open."""

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key) for key in api_keys]
        self._log = ThrottledLog(logger)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asks = scope["type"] == "http" and scope["method"] != "OPTIONS"
        guarded = asks and f"{scope['path']}/".startswith(_GUARDED)
        if guarded and not self._allowed(Headers(scope=scope)):
            self._log.warning("%s: request refused; its API key is missing or wrong.", _address(scope))
            error = APIError(
                401,
                "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        # Every pair is compared, and by digest, so that the time taken says nothing about the keys.
        matches = [hmac.compare_digest(_digest(key), digest) for key in given for digest in self._digests]
        return any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class BodyLimitMiddleware:
    """Refuses a body of more than `max_bytes` with 413: by its Content-Length, or while it is being read."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._message = f"The request body is larger than this server's limit of {max_bytes} bytes."

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")[:19]  # 19 digits are more than any limit
        if declared.isdecimal() and int(declared) > self._max_bytes:
            await APIError(413, self._message).response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # FastAPI passes an HTTPException on where it would turn any other error of reading into a 400.
                raise HTTPException(413, self._message)
            return message

        await self._app(scope, counted, send)
