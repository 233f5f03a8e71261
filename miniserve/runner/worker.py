"""A rank's process: `python -m miniserve.runner.worker`, started by rank 0 and nobody else, or by the main process of
another host (`ranks.run_node`).

It builds its part of the model, then receives and launches steps until it is told to end. It never outlives the process
that started it or rank 0: the kernel kills it with its parent, and the end of either's connection says the same.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pkgutil import resolve_name

import msgspec

from miniserve import __version__
from miniserve.core import Runner, Step, TokenMasks, UserError
from miniserve.parallel.child import die_with_parent, ignore_signals
from miniserve.parallel.link import Link, PeerLost
from miniserve.runner.ranked import SIGN_INTERVAL, Hello, PlanReader, Progress, RankStart, Sign

_LAST_WORDS = 1.0  # seconds in which what was received before a connection's end may still be read
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class _Signs:
    """Sends rank 0 signs of life from a thread of its own, which ends the process when rank 0 or the parent is gone."""

    def __init__(self, link: Link, parent: Link) -> None:
        self._link, self._lock = link, threading.Lock()
        self._poll = select.poll()
        for each in {link, parent}:
            self._poll.register(each.fileno(), _GONE)
        self.launched = 0
        self.loaded = (0, 0)  # bytes, of how many
        self.present = False
        threading.Thread(target=self._run, name="signs-of-life", daemon=True).start()

    def send(self, error: str = "", *, lost_peer: bool = False) -> None:
        sign = Sign(self.launched, self.present, *self.loaded, error, lost_peer)
        with self._lock:
            self._link.send(msgspec.msgpack.encode(sign))

    def report(self, what: str, done: int, total: int) -> None:
        """A `Progress` that goes with the next sign."""
        if what == "weights":
            self.loaded = done, total

    def _run(self) -> None:
        try:
            while not self._poll.poll(SIGN_INTERVAL * 1000):
                self.send()
        except PeerLost:
            pass
        time.sleep(_LAST_WORDS)
        os._exit(1)


def main() -> int:
    """Returns the exit code: 0 after an end in order, else 1; rank 0 and stderr are told why."""
    ignore_signals()
    parent = Link(socket.socket(fileno=os.dup(0)))
    start = msgspec.msgpack.decode(parent.receive() or b"", type=RankStart)
    die_with_parent(start.parent_pid)
    try:
        link = parent if start.plans is None else _call(start, start.plans)
    except OSError as error:
        print(f"error: rank {start.rank} does not reach rank 0 at {start.plans}: {error}", file=sys.stderr)
        return 1
    signs = _Signs(link, parent)
    try:
        _serve(start, link, signs)
    except Exception as error:
        ours = not isinstance(error, PeerLost | UserError)
        if ours:
            traceback.print_exc()
        with contextlib.suppress(PeerLost):
            message = f"{type(error).__name__}: {error}" if ours else str(error)
            signs.send(message, lost_peer=isinstance(error, PeerLost))
        return 1
    return 0


def _serve(start: RankStart, link: Link, signs: _Signs) -> None:
    build: Callable[[RankStart, Progress], Runner] = resolve_name(start.builder)
    signs.present = True
    signs.send()
    runner = build(start, signs.report)
    # What exists now lives as long as the process: later collections need not look at it again.
    gc.collect()
    gc.freeze()
    read = PlanReader().read
    in_flight: list[Step] = []
    while message := link.receive():
        step = Step(read(message))
        runner.launch(step)
        signs.launched += 1
        if step.plan.masked:
            runner.sample(step, msgspec.msgpack.decode(link.receive() or b"", type=TokenMasks))
        in_flight.append(step)
        if len(in_flight) > 1:  # rank 0 has at most two in flight, too
            runner.collect(in_flight.pop(0))


def _call(start: RankStart, address: tuple[str, int]) -> Link:
    link = Link(socket.create_connection(address))
    link.send(msgspec.msgpack.encode(Hello(start.rank, __version__, start.config)))
    return link


if __name__ == "__main__":
    sys.exit(main())
