"""A client's connection, with limits of time and room."""

from __future__ import annotations

import asyncio
import heapq
import http
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from typing import Any

import httptools
import msgspec
from starlette.types import Message, Scope, Send
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from miniserve.server.errors import APIError
from miniserve.server.gate import ThrottledLog, address, find_request_id

logger = logging.getLogger(__name__)

# A connection's limits.
_HEAD_SECONDS = 30.0  # for the request line and the headers
_BODY_SECONDS = 30.0  # for each _BODY_PIECE bytes of a body, or its end; for all that comes after an early answer
_BODY_PIECE = 16 * 1024
_MAX_HEAD = 64 * 1024  # bytes of a request line with its headers; of what stands between pieces of a body
_READ_PIECE = 4096  # bytes that are parsed in one go
# Of a turn of the event loop, for parsing: a thousand heads take fifteen to thirty times that. And what a piece costs
# behind it: the task that begins with a request, or ends with its client.
_READ_SECONDS, _TASK_SECONDS = 0.001, 0.00002
_LINGER = 2.0  # seconds that what a refused client still sends is read, so that it gets to read the answer
_MAX_REASON = 200  # characters of the parser's
_DIRECT = "miniserve.direct"  # an extension of ASGI
_SHARE = 16  # of so many idle connections one is closed where room is needed: a look at all costs time


class DirectWriter:
    """Writes to the connection what ASGI's `send` would, without the way there: through all that stands around the app
    it costs as much as the rest of an event. For a part of an answer that has begun and goes on, `chunked` or not."""

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, chunked: bool) -> None:
        self._transport = transport
        self._flow = flow
        self._chunked = chunked

    def is_ready(self) -> bool:
        """Whether the client reads as fast as the server writes, or nearly so. Else `send` waits for it."""
        return not (self._flow.write_paused or self._transport.is_closing())

    def write(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)


def direct_writer(scope: Scope) -> DirectWriter | None:
    """Of a request that came over one of our connections."""
    writer: DirectWriter | None = scope.get("extensions", {}).get(_DIRECT, {}).get("writer")
    return writer


class Guard:
    """What the connections of a server share. `max_body_bytes` bounds the bodies in all that are not complete."""

    def __init__(self, max_connections: int, max_body_bytes: int) -> None:
        self.connections: set[Connection] = set()
        self.body_bytes = 0
        self.max_body_bytes = max_body_bytes
        self.log = ThrottledLog(logger)
        self._max_connections = max_connections
        self._unread: OrderedDict[Connection, None] = OrderedDict()  # whose `held` is parsed next, in their order
        self._read_seconds = 0.0  # in this turn of the event loop

    def read(self, connection: Connection) -> None:
        """Let a connection parse what it holds, a piece each time, or end, in this turn of the event loop or in later
        ones: not before those that came first, and so that a thousand together hold up nobody's stream."""
        if not self._unread and not self._read_seconds:
            connection.loop.call_soon(self._next_turn)
        self._unread[connection] = None
        self._read()

    def _read(self) -> None:
        begin = time.perf_counter() - self._read_seconds
        while self._unread and self._read_seconds < _READ_SECONDS:
            connection, _ = self._unread.popitem(last=False)
            if connection.read_piece():
                self._unread[connection] = None
            begin -= _TASK_SECONDS
            self._read_seconds = time.perf_counter() - begin

    def _next_turn(self) -> None:
        self._read_seconds = 0.0
        if self._unread:
            next(iter(self._unread)).loop.call_soon(self._next_turn)
            self._read()

    def forget(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self._unread.pop(connection, None)

    def admit(self, connection: Connection) -> None:
        """Take in a new connection, for which others that are idle are closed at the limit, the oldest first."""
        self.connections.add(connection)
        if len(self.connections) <= self._max_connections:
            return
        self.log.warning(
            "All %d connections that the number of files (ulimit -n) allows are in use; new ones replace idle ones.",
            self._max_connections,
        )
        idle = [each for each in self.connections if not (each.held or each.answering) and each is not connection]
        for each in heapq.nsmallest(1 + len(idle) // _SHARE, idle, key=lambda each: each.begun):
            each.end()
        if not idle:
            connection.end(APIError(503, "The server has as many connections as it can open; try again later."))

    def make_room(self) -> None:
        """End incomplete requests, the oldest first, until the bodies are within their bound."""
        for each in sorted((each for each in self.connections if each.body_bytes), key=lambda each: each.begun):
            if self.body_bytes <= self.max_body_bytes:
                return
            self.log.warning("%s: request ended; too much memory was held by incomplete ones.", each.address)
            each.end(APIError(503, "The server has no memory for more incomplete requests; try again later."))

    def sweep(self) -> None:
        """End what is too late; to be called every second or so."""
        for connection in list(self.connections):
            connection.check_time()


class _Flow(FlowControl):
    """What is held must be parsed before more is read from the client."""

    def __init__(self, transport: asyncio.Transport, held: bytearray) -> None:
        super().__init__(transport)
        self._held = held

    def resume_reading(self) -> None:
        if not self._held:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """`begun`: when its last request began to arrive, or it connected. `held` has come and is not parsed yet. Of a body
    `body_bytes` wait for its end."""

    def __init__(self, guard: Guard, **settings: Any) -> None:
        super().__init__(**settings)
        self._guard = guard
        self.begun = self.loop.time()
        self.held = bytearray()
        self.body_bytes = 0
        self._deadline = self.begun + _HEAD_SECONDS
        self._in_message = self._in_body = False  # a request has begun to arrive, and its body
        self._piece = 0  # bytes of the body since the deadline was last moved
        self._unparsed = 0  # bytes received since the last that were of any use
        self._refused = False
        self._lost: tuple[Exception | None] | None = None
        self._running: RequestResponseCycle | None = None  # `cycle` may be of a later request, which waits

    @property
    def address(self) -> str:
        return address(self.client)

    @property
    def answering(self) -> bool:
        """Whether the client waits for the server, and not the other way round."""
        cycle = self.cycle
        if self.pipeline:
            return True
        return cycle is not None and not cycle.response_complete and (cycle.response_started or not cycle.more_body)

    @property
    def _answered(self) -> bool:
        """Whether the last request has its answer, or a part of one: a second would be taken for that of another."""
        return self.answering or self._refused or (self._in_body and self.cycle.response_complete)

    def check_time(self) -> None:
        if self.held or self.answering or self.flow.read_paused or self.loop.time() < self._deadline:
            return
        if self._in_body and self._piece >= _BODY_PIECE and not self.cycle.response_complete:
            self._deadline, self._piece = self.loop.time() + _BODY_SECONDS, 0
        elif self._in_message and not self._refused:
            self._guard.log.warning("%s: request ended; it did not arrive in time.", self.address)
            self.end(APIError(408, "The request did not arrive in time."))
        elif self._refused or self.timeout_keep_alive_task is None:  # else uvicorn's own timer runs
            self.end()

    def end(self, error: APIError | None = None) -> None:
        """Close, with an answer where there is room for one: none is on its way."""
        self._forget()
        if error is not None and not self._answered:
            self._answer(error)
        self.transport.close()

    # --- asyncio's and uvicorn's calls ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport, self.held)
        self._guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # nothing more is written; its task is told in its turn
        self._lost = (exc,)
        self._guard.read(self)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self.held += data
        self._guard.read(self)
        if self.held:
            self.flow.pause_reading()

    def read_piece(self) -> bool:
        """Take in that the client has left, or parse a piece of what is held; whether there is more to parse now. There
        is not behind a request that waits for the answer to the one before it: it would take memory, and wait as well.
        """
        if self._lost is not None:
            if self._running is not None:
                self._running.message_event.set()
            super().connection_lost(*self._lost)
            return False
        if self.pipeline:
            return False
        data = bytes(self.held[:_READ_PIECE])
        del self.held[:_READ_PIECE]
        self._parse(data)
        if self.held:
            return not self.pipeline
        cycle = self.cycle
        if not self.pipeline and (cycle is None or cycle.response_complete or len(cycle.body) <= HIGH_WATER_LIMIT):
            self.flow.resume_reading()
        return False

    def _parse(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        self._unparsed += len(data)
        try:
            while data:
                data = self._feed(data)
            if self._unparsed > _MAX_HEAD:
                raise _too_large()
        except (httptools.HttpParserError, APIError) as error:
            self._refuse(error)
        if self._guard.body_bytes > self._guard.max_body_bytes:
            self._guard.make_room()

    def _feed(self, data: bytes) -> bytes:
        """Returns what is to be parsed next. A server may go on in HTTP/1.1 where a client asks for another protocol,
        as Java's does in its first request; a parser takes what follows such a head for that protocol, so a new one
        gets the head without it."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if not self._upgrades:
                return b""
            kept = [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
            line = b"%b %b HTTP/%b\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
            self.parser = httptools.HttpRequestParser(self)
            with suppress(AttributeError):  # httptools before 0.6.3; as uvicorn makes it
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
            return line + b"".join(kept) + b"\r\n" + data[upgrade.args[0] :]
        return b""

    @property
    def _upgrades(self) -> bool:
        return bool(self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_message = True
        self.begun = self.loop.time()
        self._deadline = self.begun + _HEAD_SECONDS

    def on_headers_complete(self) -> None:
        if len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > _MAX_HEAD:
            raise _too_large()
        if self._upgrades:
            return
        chunked = self.parser.get_http_version() >= "1.1"
        self.scope["extensions"] = {_DIRECT: {"writer": DirectWriter(self.transport, self.flow, chunked)}}
        self.expect_100_continue &= chunked
        super().on_headers_complete()
        if not self.pipeline:
            self._running = self.cycle
        if not chunked:
            cycle: Any = self.cycle
            cycle.send = _sends_until_close(cycle, cycle.send)
        self._in_body, self._piece, self._unparsed = True, 0, 0
        self._deadline = self.loop.time() + _BODY_SECONDS

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        self._piece += len(body)
        if not self.cycle.response_complete:
            self.body_bytes += len(body)
            self._guard.body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrades:
            return
        super().on_message_complete()
        self._in_message, self._in_body, self._unparsed = False, False, 0
        self._release_body()

    def on_response_complete(self) -> None:
        self._release_body()
        self._deadline = self.loop.time() + _HEAD_SECONDS
        if self.pipeline:
            self._running, _ = self.pipeline[-1]
        super().on_response_complete()
        if self.held:
            self._guard.read(self)

    def shutdown(self) -> None:
        """A request that has not arrived is not waited for."""
        while self.held and self.read_piece():
            pass
        if self._in_body and not self.answering:
            self.end(APIError(503, "The server is shutting down and takes no further requests."))
        else:
            super().shutdown()

    # --------------------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._guard.forget(self)
        self.held.clear()
        self._release_body()

    def _release_body(self) -> None:
        self._guard.body_bytes -= self.body_bytes
        self.body_bytes = 0

    def _refuse(self, error: Exception) -> None:
        """Answer what is not HTTP, or too much of it, and read no more requests."""
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
        if not isinstance(cause, APIError):
            cause = APIError(400, f"The request is not valid HTTP ({str(cause)[:_MAX_REASON]}).")
        self._guard.log.warning("%s: %s", self.address, cause.message)
        if self._answered or self.transport.is_closing():
            self.end()
            return
        self._answer(cause)
        self._refused = True
        self.held.clear()
        self._deadline = self.loop.time() + _LINGER
        if self.transport.can_write_eof():  # TLS cannot
            self.transport.write_eof()

    def _answer(self, error: APIError) -> None:
        if self.cycle is not None and not self.cycle.response_complete:  # the app waits for the rest of a body
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        request_id, _ = find_request_id(self.headers if self._in_message else ())
        body = msgspec.json.encode(error.envelope())
        head = (
            f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nX-Request-Id: {request_id}\r\nConnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)


def _sends_until_close(cycle: RequestResponseCycle, send: Send) -> Send:
    """ASGI's `send` for a client of HTTP/1.0, which knows no chunks: what has no length ends with the connection."""
    unknown = False

    async def sender(message: Message) -> None:
        nonlocal unknown
        if message["type"] == "http.response.start":
            unknown = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = False if unknown else None
        elif unknown:
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return sender


def _too_large() -> APIError:
    return APIError(431, f"The request line and headers are larger than {_MAX_HEAD} bytes.")
