"""Plain ASGI middleware before the app: ids of requests, their paths, and what is refused before a body is read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from miniserve.server.errors import APIError

logger = logging.getLogger(__name__)

_REQUEST_ID = b"x-request-id"
# Warnings of a kind that are logged, in so many seconds: nobody may fill the log from outside.
_LINES, _PERIOD = 10, 60.0
_AT_ONCE = 2  # requests that begin in one turn of the event loop
# Paths that need the API key: also the tokenizer's, which take long texts.
_GUARDED = ("/v1/", "/debug/", "/tokenize/", "/detokenize/", "/tokenizer_info/")


class ThrottledLog:
    """Writes the first warnings of a kind in each period. The next period's first says how many were left out."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._logger = logger
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # by its text: the period's begin, and how many came in it

    def warning(self, text: str, *args: object) -> None:
        """`text` is the kind: what differs from one to the next is in `args`."""
        now = self._clock()
        begin, count = self._kinds.get(text, (now, 0))
        missed = 0
        if now - begin >= _PERIOD:
            begin, count, missed = now, 0, max(0, count - _LINES)
        self._kinds[text] = begin, count + 1
        if count < _LINES:
            rest = f" ({missed} more like this were left out before.)" if missed else ""
            self._logger.warning(text + "%s", *args, rest)


class Pace:
    """Lets a few callers through in each turn of the event loop."""

    def __init__(self) -> None:
        self._begun = 0  # in this turn
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def turn(self) -> None:
        loop = asyncio.get_running_loop()
        if self._begun == 0:
            loop.call_soon(self._next_turn)
        self._begun += 1
        if self._begun > _AT_ONCE:
            self._waiting.append(loop.create_future())
            await self._waiting[-1]

    def _next_turn(self) -> None:
        waiting = self._waiting
        self._begun = len(waiting)
        for _ in range(min(_AT_ONCE, len(waiting))):
            turn = waiting.popleft()
            if not turn.done():  # its request may have been cancelled
                turn.set_result(None)
        if self._begun:
            asyncio.get_running_loop().call_soon(self._next_turn)


class PaceMiddleware:
    """Lets requests with a body begin in turn. To read one takes a good part of a millisecond: a thousand that come
    together would hold up all streams by half a second."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._pace = Pace()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._pace.turn()
        await self._app(scope, receive, send)


class RequestIdMiddleware:
    """Puts x-request-id on every answer: the client's, else a new one. It is also in the scope's state, for the log."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, is_valid = find_request_id(scope["headers"])
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (_REQUEST_ID, request_id.encode())]
                message = {**message, "headers": headers}
            await send(message)

        app = self._app
        if not is_valid:
            message = "The header x-request-id must be 1 to 128 printable ASCII characters."
            app = APIError(400, message, "x-request-id").response(scope)
        await app(scope, receive, marked)


def find_request_id(headers: Iterable[tuple[bytes, bytes]]) -> tuple[str, bool]:
    """The client's id, or a new one where it sent none or one that is not valid; and whether it sent no invalid one."""
    given = next((value.decode("latin-1") for name, value in headers if name.lower() == _REQUEST_ID), None)
    is_valid = given is None or (0 < len(given) <= 128 and given.isascii() and given.isprintable())
    return (given if given is not None and is_valid else uuid.uuid4().hex), is_valid


class PathMiddleware:
    """HEAD is GET, whose body the server leaves out; a slash at the end of a path means nothing, nor does `root_path`
    before it. The others, the check of API keys among them, see what is left."""

    def __init__(self, app: ASGIApp, root_path: str = "") -> None:
        self._app = app
        self._root_path = root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            method = "GET" if scope["method"] == "HEAD" else scope["method"]
            path, root_path = scope["path"].rstrip("/"), self._root_path
            if f"{path}/".startswith(f"{root_path}/"):
                path = path[len(root_path) :]
            if f"{path}/".startswith(f"{root_path}/"):
                root_path = ""  # else the router would leave it out once more, behind the check of keys
            scope = {**scope, "method": method, "path": path or "/", "root_path": root_path}
        await self._app(scope, receive, send)


class Gate:
    """Refuses a request before its body is read, or while it is.

    `hosts`: its Host header must be an address or one of these, in lower case; None: any. A page in a browser on this
    machine reaches a local server by a name of its own that resolves here (DNS rebinding), and would pass as the
    server's own page. It cannot do so by an address.
    `api_keys`: guarded paths ask for one of these, if there are any (`Authorization: Bearer …` or `x-api-key`), except
    for OPTIONS. Health checks and metrics stay open.
    `max_body_bytes`: of the Content-Length, and of what comes.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str] | None, api_keys: Sequence[str], max_body_bytes: int
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._digests = [_digest(key) for key in api_keys]
        self._max_bytes = max_body_bytes
        self._too_large = f"The request body is larger than this server's limit of {max_body_bytes} bytes."
        self._log = ThrottledLog(logger)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (error := self._refusal(scope, Headers(scope=scope))) is not None:
            await error.response(scope)(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                # FastAPI passes an HTTPException on where it would turn any other error of reading into a 400.
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, counted, send)

    def _refusal(self, scope: Scope, headers: Headers) -> APIError | None:
        client = address(scope["client"])
        for host in headers.getlist("host"):
            if self._hosts is not None and not _is_known(host, self._hosts):
                self._log.warning("%s: request refused for its Host header %r.", client, host[:100])
                return APIError(
                    403, f"This server does not go by the name {host[:200]!r}; --allowed-host lets it be used."
                )
        is_guarded = f"{scope['path']}/".startswith(_GUARDED) and scope["method"] != "OPTIONS"
        if self._digests and is_guarded and not self._has_key(headers):
            self._log.warning("%s: request refused; its API key is missing or wrong.", client)
            return APIError(
                401,
                "The API key is missing or wrong; send it as 'Authorization: Bearer KEY'.",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        declared = headers.get("content-length", "0")[:19]  # 19 digits are more than any limit
        return APIError(413, self._too_large) if declared.isdecimal() and int(declared) > self._max_bytes else None

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        # Every pair is compared, and by digest, so that the time taken says nothing about the keys.
        matches = [hmac.compare_digest(_digest(key), digest) for key in given for digest in self._digests]
        return any(matches)


def address(client: Sequence[Any] | None) -> str:
    return f"{client[0]}:{client[1]}" if client else "a client"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_known(host: str, hosts: Collection[str]) -> bool:
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    if name.lower().removesuffix(".") in hosts:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
