"""A stream between two ranks that carries messages of any length, each as a whole. No torch."""

from __future__ import annotations

import contextlib
import socket
import sys

_LENGTH = 4  # bytes in front of each message
_LOST_AFTER = 5000  # milliseconds that sent bytes may stay unacknowledged by the other host's system


class PeerLost(RuntimeError):
    """Another rank is gone, or does not answer; which one, its supervisor knows better than whoever met with this."""


class Link:
    """One end of the stream. One thread may send while another receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket, self._received = sock, bytearray()
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if sys.platform == "linux":  # a host that lost its power closes nothing
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _LOST_AFTER)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        """Raises `PeerLost` where the other end is closed."""
        try:
            self._socket.sendall(len(message).to_bytes(_LENGTH, "little") + message)
        except OSError as error:
            raise PeerLost(str(error)) from error

    def receive(self, *, wait: bool = True) -> bytes | None:
        """The next message. None where there is none yet and `wait` is false. Raises `PeerLost` at the end."""
        while (message := self._take()) is None:
            try:
                piece = self._socket.recv(1 << 16, 0 if wait else socket.MSG_DONTWAIT)
            except BlockingIOError:
                return None
            except OSError as error:
                raise PeerLost(str(error)) from error
            if not piece:
                raise PeerLost("the connection was closed")
            self._received += piece
        return message

    def _take(self) -> bytes | None:
        end = _LENGTH + int.from_bytes(self._received[:_LENGTH], "little")
        if not _LENGTH <= end <= len(self._received):
            return None
        message = bytes(self._received[_LENGTH:end])
        del self._received[:end]
        return message

    def close(self) -> None:
        """Ends a call that waits in another thread, too."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
