"""The bench's HTTP client against servers that answer with given bytes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from miniserve.bench.connections import ConnectionPool, HttpError
from miniserve.core import UserError

OK = b"HTTP/1.1 200 OK\r\n"


@contextlib.asynccontextmanager
async def server(
    *answers: bytes, close: bool = False, close_second: bytes | None = None, timeout: float = 30.0
) -> AsyncIterator[tuple[ConnectionPool, list[int]]]:
    """Answers every request with the pieces given, each in a write of its own; None of them means silence. The second
    request of a connection gets `close_second` and the connection's end instead. The list counts the requests of each
    connection."""
    served: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(served)
        served.append(0)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.lower().split(b"content-length:")[1].split()[0])
                await reader.readexactly(length)
                served[number] += 1
                if close_second is not None and served[number] == 2:
                    writer.write(close_second)
                    break
                for answer in answers:
                    writer.write(answer)
                    await writer.drain()
                    await asyncio.sleep(0)
                if close:
                    break
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    pool = ConnectionPool(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/prefix", "key", timeout)
    try:
        yield pool, served
    finally:
        pool.close()
        listener.close()


async def post(pool: ConnectionPool) -> tuple[int, bytes]:
    body = b""

    def on_body(status: int, data: bytes, arrived: float) -> None:
        nonlocal body
        body += data

    return await pool.post("/v1/x", b"{}", on_body), body


@pytest.mark.parametrize(
    "answer",
    [
        [OK + b"Content-Length: 5\r\n\r\nhello"],
        [OK + b"Content-Length: 5\r\n", b"\r\nhe", b"llo"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n", b"2\r\nhe\r\n", b"3\r\nllo\r\n0\r\n\r\n"],
        [OK + b"Transfer-Encoding: chunked\r\n\r\n2\r", b"\nhe\r\n3\r\nl", b"lo\r\n0\r\n", b"\r\n"],
    ],
)
def test_answers_are_whole_however_they_come_and_connections_are_kept(answer: list[bytes]) -> None:
    async def main() -> None:
        async with server(*answer) as (pool, served):
            for _ in range(3):
                assert await post(pool) == (200, b"hello")
            assert served == [3]
            await asyncio.gather(post(pool), post(pool))
            assert sorted(served) == [1, 4]

    asyncio.run(main())


def test_an_answer_may_end_with_its_connection() -> None:
    async def main() -> None:
        async with server(OK + b"\r\nhello", close=True) as (pool, served):
            assert await post(pool) == (200, b"hello")
            assert await post(pool) == (200, b"hello")
            assert served == [1, 1]
        async with server(OK + b"Connection: close\r\nContent-Length: 5\r\n\r\nhello") as (pool, served):
            assert await post(pool) == (200, b"hello")
            assert await post(pool) == (200, b"hello")
            assert served == [1, 1]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answers", "close", "message"),
    [
        ([], True, "closed the connection"),
        ([], False, "the server sent nothing for 1 seconds"),
        ([OK + b"Content-Length: 5\r\n\r\nhe"], False, "the server sent nothing"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], False, "not an HTTP answer"),
    ],
)
def test_an_answer_that_does_not_come_is_an_error(answers: list[bytes], close: bool, message: str) -> None:
    async def main() -> None:
        async with server(*answers, close=close, timeout=1.0 if "nothing" in message else 30.0) as (pool, served):
            for _ in range(2):
                with pytest.raises(HttpError, match=message):
                    await post(pool)
            assert served == [1, 1]  # a connection that failed is not used again

    asyncio.run(main())


def test_a_request_lost_with_a_kept_connection_goes_out_again_over_a_new_one() -> None:
    async def main() -> None:
        async with server(OK + b"Content-Length: 5\r\n\r\nhello", close_second=b"") as (pool, served):
            for _ in range(3):
                assert await post(pool) == (200, b"hello")
            assert served == [2, 2, 1]

    asyncio.run(main())


@pytest.mark.parametrize("begun", [b"HTTP/1.1 2", OK + b"Content-Length: 5\r\n\r\nhe"])
def test_a_request_whose_answer_has_begun_is_not_sent_again(begun: bytes) -> None:
    async def main() -> None:
        async with server(OK + b"Content-Length: 5\r\n\r\nhello", close_second=begun) as (pool, served):
            assert await post(pool) == (200, b"hello")
            if begun.startswith(OK):  # cut short: the caller sees that the answer is not whole
                assert await post(pool) == (200, b"he")
            else:
                with pytest.raises(HttpError, match="closed the connection"):
                    await post(pool)
            assert served == [2]

    asyncio.run(main())


def test_what_the_reader_raises_reaches_the_caller() -> None:
    def refuse(status: int, data: bytes, arrived: float) -> None:
        raise LookupError(data.decode())

    async def main() -> None:
        async with server(OK + b"Content-Length: 5\r\n\r\nhello") as (pool, _):
            with pytest.raises(LookupError, match="hello"):
                await pool.post("/v1/x", b"{}", refuse)

    asyncio.run(main())


@pytest.mark.parametrize("root", ["127.0.0.1:8000", "ftp://x", "http://", ""])
def test_a_url_must_be_one(root: str) -> None:
    with pytest.raises(UserError, match="--url"):
        ConnectionPool(root, None, 1.0)
