"""Ranks as processes: `Group` by torch's process groups, gloo on CPUs and NCCL (RCCL) on GPUs.

The process groups are objects of this group's own. torch's default group, of which a process has one, stays free for
whoever else is in the process.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

from miniserve.parallel.link import PeerLost
from miniserve.parallel.peer_memory import open_inboxes
from miniserve.parallel.shard import Shard

if TYPE_CHECKING:
    from miniserve.kernels.triton.reduce_norm import Inboxes

_logger = logging.getLogger(__name__)
_dist: Any = distributed  # most of what it has from C++ is unknown to a type checker
# The ranks' supervisor notices far earlier whatever is wrong; a first step may compile kernels.
_TIMEOUT = timedelta(minutes=30)
_MEETING = timedelta(seconds=60)  # for ranks that are all there
_POLL = 0.05  # seconds
# Below this all ranks get all parts; above, rows of the sum have owners, which moves twice the tensor for any `size`.
_OWNED_FROM = 256 << 10  # bytes


def open_store(address: str, port: int) -> Any:
    """Where ranks find one another, at this address alone; rank 0's. port 0 takes a free one. Raises OSError."""
    sock = socket.create_server((address, port), family=_family(address))
    return _dist.TCPStore(
        address, sock.getsockname()[1], is_master=True, wait_for_workers=False, timeout=_MEETING,
        master_listen_fd=sock.detach(),
    )  # fmt: skip


def find_store(address: str, port: int, timeout: float) -> Any:
    """The store that rank 0 opened, or opens within `timeout` seconds. Raises `PeerLost`."""
    try:
        return _dist.TCPStore(
            address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout)
        )
    except RuntimeError as error:
        raise PeerLost(f"no main rank answers at {address}:{port}") from error


def own_address(address: str, port: int) -> str:
    """This host's address on the way to another."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as sock:
        sock.connect((address, port))  # sends nothing
        name: str = sock.getsockname()[0]
        return name


class DistributedGroup:
    """See `Group`. device: this rank's, of which no other rank of this host has a tensor; address: of this host, that
    the other ranks reach. Waits for all ranks, and calls `check` meanwhile, which may raise. Raises `PeerLost`, as all
    calls do where a peer is gone."""

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        device: torch.device,
        address: str,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.size = rank, size
        self._device = device
        with _losing_peers():
            store.set_timeout(_MEETING)
            options = _dist.ProcessGroupGloo._Options()
            options._devices = [_dist.ProcessGroupGloo.create_device(hostname=address)]
            options._timeout = _TIMEOUT
            shared = _dist.PrefixStore("host", store)
            self._host = _checked(lambda: _dist.ProcessGroupGloo(shared, rank, size, options), check)
            self._tensors = self._host
            if device.type == "cuda":
                torch.cuda.set_device(device)
                on_device = _dist.ProcessGroupNCCL.Options()
                on_device._timeout = _TIMEOUT
                self._tensors = _dist.ProcessGroupNCCL(_dist.PrefixStore("device", store), rank, size, on_device)
        self._store = store  # rank 0's serves it for as long as it lives
        self.inboxes = self._open_inboxes() if device.type == "cuda" else None

    def _open_inboxes(self) -> Inboxes | None:
        try:
            return open_inboxes(self, self.rank, self._device)
        except PeerLost:
            raise
        except Exception as error:  # the same on all ranks
            _logger.warning(
                "GPUs cannot write to each other's memory, so sums over ranks are slower and decode steps run without "
                "graphs: %s",
                error,
            )
            return None

    def reduce(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.numel() * x.element_size() < _OWNED_FROM:
            return _sum(self.gather(x)).to(x.dtype)
        flat = x.view(len(x), -1)
        counts = self._parts(len(flat))
        mine, width = counts[self.rank], flat.shape[1]
        parts = self._swap(flat, [count * width for count in counts], [mine * width] * self.size)
        owned = torch.zeros(max(counts), width, dtype=x.dtype, device=x.device)
        owned[:mine] = _sum(parts.view(self.size, mine, width))
        whole = self.gather(owned)
        return torch.cat([part[:count] for part, count in zip(whole, counts, strict=True)]).view(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        if self.inboxes is not None and self.inboxes.take_gather(x):
            return self.inboxes.gather(x)
        out = torch.empty(self.size, *x.shape, dtype=x.dtype, device=x.device)
        with _losing_peers():
            self._tensors._allgather_base(_bytes(out), _bytes(x)).wait()
        return out

    def rows(self, x: Tensor, count: int) -> Tensor:
        counts, widths = self._parts(len(x)), self._parts(count)
        received = [counts[self.rank] * width for width in widths]
        parts = self._swap(x, [rows * x.shape[1] for rows in counts], received).split(received)
        blocks = [part.view(counts[self.rank], width) for part, width in zip(parts, widths, strict=True)]
        return torch.cat(blocks, dim=1)

    def exchange(self, message: bytes) -> list[bytes]:
        with _losing_peers():
            lengths = self._on_host(torch.tensor([len(message)])).flatten().tolist()
            padded = bytearray(message.ljust(max(1, *lengths), b"\0"))
            found = self._on_host(torch.frombuffer(padded, dtype=torch.uint8)).numpy()
        return [part[:length].tobytes() for part, length in zip(found, lengths, strict=True)]

    def _parts(self, count: int) -> list[int]:
        """How many of `count` each rank has."""
        return [Shard(rank, self.size).part(count).size for rank in range(self.size)]

    def _swap(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send each rank its piece of x's elements, `sent` of them, and return theirs, `received`, in one row."""
        out, width = torch.empty(sum(received), dtype=x.dtype, device=x.device), x.element_size()
        sizes = [[count * width for count in counts] for counts in (received, sent)]
        with _losing_peers():
            self._tensors.alltoall_base(_bytes(out), _bytes(x), *sizes).wait()
        return out

    def _on_host(self, x: Tensor) -> Tensor:
        out = torch.empty(self.size, *x.shape, dtype=x.dtype)
        self._host._allgather_base(_bytes(out), _bytes(x)).wait()
        return out


def _checked(call: Callable[[], Any], check: Callable[[], None]) -> Any:
    """The result of a call that nothing can end. Where `check` raises, it is left to its own timeout."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="meeting", daemon=True).start()
    while not wait([future], _POLL).done:
        check()
    return future.result()


def _bytes(x: Tensor) -> Tensor:
    """As what all backends can send, whatever the dtype."""
    return x.contiguous().view(-1).view(torch.uint8)


def _sum(parts: Tensor) -> Tensor:
    """[ranks, ...] -> [...] in float32, in the order of the ranks, on all devices."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part
    return total


@contextmanager
def _losing_peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(str(error).partition("\n")[0]) from error


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET
