"""A minimal HTTP/1.1 client for measuring: POST, keep-alive, and body bytes with their time of arrival.

A load client must cost less than the server it measures: here the event loop hands a socket's bytes to a parser in C
(httptools, which uvicorn uses as well) and that to the caller. A chunk of a stream takes 10 to 13 µs of CPU, decoding
included; over aiohttp it takes 21 to 23, over httpx 68 to 82 (16 and 64 streams of 400 chunks on two busy cores).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

from miniserve.core import UserError

OnBody = Callable[[int, bytes, float], None]


class HttpError(Exception):
    """A request got no answer, or only the beginning of one; `str(error)` says why."""


class _Unanswered(HttpError):
    """The server closed the connection before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One connection, one request at a time. Driven by the event loop and by its parser, both by callback."""

    def __init__(self) -> None:
        self.closed = False
        self.last_data = 0.0
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._on_body: OnBody = lambda status, body, arrived: None
        self._done: asyncio.Future[None] | None = None
        self._answered = False  # a byte of the answer has come
        self._status = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass

    def data_received(self, data: bytes) -> None:
        self.last_data = time.perf_counter()
        self._answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # What `on_body` raises arrives here as the cause of the parser's own error.
            self._settle(error.__context__ or HttpError(f"not an HTTP answer: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        # An answer without a length ends with its connection; whether it was whole is for the caller to see.
        if self._status and exc is None:
            self._settle(None)
        else:
            error = HttpError if self._answered else _Unanswered
            self._settle(error(f"the server closed the connection{f' ({exc})' if exc else ''}"))

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._on_body(self._status, body, self.last_data)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        self._settle(None)

    def _settle(self, error: BaseException | None) -> None:
        if self._done is None or self._done.done():
            return
        if error is None:
            self._done.set_result(None)
        else:
            self._done.set_exception(error)

    async def exchange(self, request: bytes, on_body: OnBody, timeout: float) -> int:
        """Write a request, wait until its answer is over, return its status."""
        if self.closed:
            raise HttpError("the connection is closed")
        self._on_body, self._status, self._answered = on_body, 0, False
        self._done = asyncio.get_running_loop().create_future()
        self.last_data = time.perf_counter()
        self._transport.write(request)
        try:
            while not self._done.done():
                silence_left = self.last_data + timeout - time.perf_counter()
                if silence_left <= 0:
                    raise HttpError(f"the server sent nothing for {timeout:g} seconds")
                await asyncio.wait([self._done], timeout=silence_left)
            self._done.result()
        except BaseException:
            self.close()
            raise
        return self._status

    def close(self) -> None:
        self.closed = True
        self._transport.abort()


class ConnectionPool:
    """Connections to one server, one for each request in flight, kept open for later requests. No proxy is used: it
    would be measured with the server.

    `root` is a URL such as "http://127.0.0.1:8000"; `timeout` the most seconds without a byte from the server. Raises
    `UserError` for an invalid URL.
    """

    def __init__(self, root: str, api_key: str | None, timeout: float) -> None:
        try:
            parts = urlsplit(root)
            port = parts.port
        except ValueError as error:
            raise UserError(f"{root!r} is not a URL ({error}); --url looks like http://127.0.0.1:8000.") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"{root!r} is not the URL of a server; --url looks like http://127.0.0.1:8000.")
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._timeout = timeout
        self._idle: list[_Connection] = []
        authorization = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._headers = (
            f"Host: {parts.netloc.rpartition('@')[2]}\r\nContent-Type: application/json\r\n"
            f"Accept-Encoding: identity\r\nUser-Agent: miniserve-bench\r\n{authorization}"
        )

    async def post(self, path: str, body: bytes, on_body: OnBody) -> int:
        """Send `body` as JSON; call `on_body(status, bytes, time.perf_counter() of their arrival)` as the answer's body
        comes; return the status when it is over. Raises `HttpError`, and what `on_body` raises."""
        head = f"POST {self._prefix}{path} HTTP/1.1\r\n{self._headers}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode() + body
        self._idle = [connection for connection in self._idle if not connection.closed]
        if self._idle:
            # A server may close an idle connection while a request is on its way to it. Without a byte of an answer
            # the request goes out once more, over a new connection (RFC 9112, 9.3.1).
            with contextlib.suppress(_Unanswered):
                return await self._exchange(self._idle.pop(), request, on_body)
        return await self._exchange(await self._connect(), request, on_body)

    async def _exchange(self, connection: _Connection, request: bytes, on_body: OnBody) -> int:
        status = await connection.exchange(request, on_body, self._timeout)
        if not connection.closed:
            self._idle.append(connection)
        return status

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeout):
                _, connection = await loop.create_connection(
                    _Connection, self._host, self._port, ssl=True if self._tls else None
                )
        except TimeoutError as error:
            raise HttpError(f"no connection within {self._timeout:g} seconds") from error
        except OSError as error:
            raise HttpError(f"cannot connect: {error}") from error
        return connection

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()
