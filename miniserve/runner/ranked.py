"""A runner that is several processes: rank 0 in this one, which all others follow. No torch.

Rank 0 sends each plan to the other ranks before it launches its own part. What a step computes passes between the ranks
on their devices; only plans pass here, and in the other direction signs of life, four a second. A thread of rank 0
watches these and the processes. When a rank has ended, is silent, or a step finishes nowhere, the thread ends all
ranks, which also frees rank 0 from waiting for them, and rank 0 raises `RankFailed`.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from miniserve.config import EngineConfig
from miniserve.core import Runner, Step, StepPlan, TokenMasks, UserError
from miniserve.parallel.child import describe_exit, is_busy, is_stopped, start_python
from miniserve.parallel.link import Link, PeerLost

SIGN_INTERVAL = 0.25  # seconds between a rank's signs of life
_TICK = 0.05  # seconds between looks at the ranks
_SILENCE = 4.0  # seconds; what it leads to is there within 5
_SILENCE_AT_WORK = 60.0  # imports, compilers and other programs may keep the interpreter from a thread for long
_COUNSEL = 0.3  # seconds in which other ranks may show who of them failed first
_GRACE = 2.0  # seconds for rank 0 to see a failure; then it hangs in a call that nothing can end
_GRACE_AT_START = 60.0  # where it does other things meanwhile: it may load or compile for long
_TOKENS = 4096  # of a step that must finish within _SILENCE; more tokens may take more
_END_TIMEOUT = 4.0
_encode = msgspec.msgpack.Encoder().encode


Progress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class RankFailed(RuntimeError):
    """A rank is gone, and with it the model; `str(error)` says which, how, and in which step."""


class RankStart(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank's process is told first, through its stdin. config: with the number of ranks. builder:
    "module:function", called with this and a `Progress`, returns the rank's `Runner`. meeting: address and port of rank
    0's store. plans: where rank 0 of another host listens for this rank, None where stdin carries the plans too."""

    config: EngineConfig
    source_path: str
    rank: int
    builder: str
    parent_pid: int
    meeting: tuple[str, int] = ("", 0)
    plans: tuple[str, int] | None = None


class Hello(msgspec.Struct, frozen=True):
    """A rank of another host introduces itself."""

    rank: int
    version: str
    config: EngineConfig


class Sign(msgspec.Struct, frozen=True, array_like=True):
    """A rank's sign of life. launched: steps so far; present: it can meet the others; loaded: bytes of its `to_load`.
    error: it ends with this; lost_peer: because another rank has ended."""

    launched: int
    present: bool
    loaded: int = 0
    to_load: int = 0
    error: str = ""
    lost_peer: bool = False


class LocalRunner(Runner, Protocol):
    """A rank's own part."""

    def is_done(self, step: Step) -> bool:
        """Whether `collect` would not wait."""
        ...


def encode_plan(plan: StepPlan) -> bytes:
    """For a `PlanReader` that has read the plans before: rows that stay the same are not repeated."""
    return _encode(msgspec.structs.replace(plan, decode_rows=[]) if plan.same_rows else plan)


class PlanReader:
    def __init__(self) -> None:
        self._decode = msgspec.msgpack.Decoder(StepPlan).decode
        self._rows: list[int] = []

    def read(self, message: bytes) -> StepPlan:
        plan = self._decode(message)
        if plan.same_rows:
            return msgspec.structs.replace(plan, decode_rows=self._rows)
        self._rows = plan.decode_rows
        return plan


@dataclass(slots=True, eq=False)
class _Peer:
    """Another rank. process: None on another host. silence: seconds since its last sign."""

    rank: int
    link: Link
    process: subprocess.Popen[bytes] | None
    sign: Sign = field(default_factory=lambda: Sign(0, False))
    silence: float = 0.0
    gone: bool = False

    def trouble(self, stopped_for: float, longest_silence: float) -> tuple[int, str] | None:
        """What is wrong with it and how likely that is the cause of all trouble: 0 is certain. Silence is seconds:
        for how long at most if it is stopped, and else."""
        code = None if self.process is None else self.process.poll()
        if code is not None and code < 0:
            return 0, describe_exit(code, f"rank {self.rank}")
        if self.sign.error:
            return (4 if self.sign.lost_peer else 1), f"rank {self.rank} failed: {self.sign.error}"
        if code is not None:
            return 2, describe_exit(code, f"rank {self.rank}")
        if self.process is not None and self.silence > stopped_for:
            if is_stopped(self.process):
                return 3, f"rank {self.rank} was stopped (SIGSTOP)"
            if self.silence > longest_silence and is_busy(self.process):
                longest_silence = max(longest_silence, _SILENCE_AT_WORK)
        if self.silence > longest_silence:
            return 3, f"rank {self.rank} gave no sign of life for {longest_silence:.0f} s"
        # A process that ends closes its link first; which of its ways to end it was will show.
        return (5, f"rank {self.rank} is gone: its connection was closed") if self.gone else None


class Ranks:
    """The other ranks, their processes on this host and the links to all. To be closed, or left to the interpreter's
    exit; on Linux the processes also end with the thread that started them."""

    def __init__(self, silence: float = _SILENCE) -> None:
        self._limit = silence
        self._thread = threading.get_ident()  # rank 0's own part runs in it
        self._peers: list[_Peer] = []
        self._serving = False
        self._sent = self._launched = self._collected = 0
        self._tokens = 0  # of the latest step
        self._unfinished = 0.0  # seconds since all ranks had launched the oldest step in flight
        self._doubt = 0.0  # seconds since something is wrong
        self._failure: str | None = None
        self.on_signs: Callable[[], None] = lambda: None  # called by the watch's thread, often
        self._failed, self._seen, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._watch = threading.Thread(target=self._look_after_all, name="rank-watch", daemon=True)

    # --- start ----------------------------------------------------------------------------------------------------

    def start(self, starts: Sequence[RankStart]) -> None:
        """Start these ranks on this host."""
        for start in starts:
            link, process = start_rank(start)
            self._peers.append(_Peer(start.rank, link, process))

    def meet(self, listener: socket.socket | None = None, hello: Hello | None = None, remote: int = 0) -> None:
        """Wait until every rank is ready to meet the others, `remote` of them from other hosts through `listener`; they
        must be of the version and settings of `hello`. Raises `RankFailed`, and `UserError` for ranks that differ."""
        self._watch.start()
        while listener is not None and remote:
            listener.settimeout(_TICK)
            self.check()
            try:
                sock, address = listener.accept()
            except TimeoutError:
                continue
            if hello is not None and (peer := self._welcome(sock, address[0], hello)) is not None:
                self._peers = [*self._peers, peer]  # the thread reads it
                remote -= 1
        while not all(peer.sign.present for peer in self._peers):
            self.check()
            time.sleep(_TICK / 2)

    def _welcome(self, sock: socket.socket, host: str, own: Hello) -> _Peer | None:
        """None for a visitor who is no rank."""
        sock.settimeout(_SILENCE)
        link = Link(sock)
        try:
            hello = msgspec.msgpack.decode(link.receive() or b"", type=Hello)
        except (PeerLost, msgspec.DecodeError):
            link.close()
            return None
        sock.settimeout(None)
        if hello.version != own.version:
            raise UserError(f"The host {host} runs miniserve {hello.version} and this one {own.version}; install one.")
        if (name := own.config.differs(hello.config)) is not None:
            raise UserError(f"The host {host} was started with another {name} than this one; give both the same.")
        if hello.rank in {peer.rank for peer in self._peers}:
            raise UserError(f"Two hosts have the same --node-rank, one of them {host}; number them from 0 on.")
        return _Peer(hello.rank, link, None)

    def loaded(self) -> list[tuple[int, int]]:
        """What each has loaded by its last sign, of how much: bytes, 0 where it has not begun."""
        return [(peer.sign.loaded, peer.sign.to_load) for peer in self._peers]

    def serve(self) -> None:
        """From now on silence is judged by the limit of ranks that run steps."""
        for peer in self._peers:
            peer.silence = 0.0
        self._serving = True

    # --- steps ----------------------------------------------------------------------------------------------------

    def send(self, message: bytes, tokens: int) -> None:
        """A step of so many tokens begins. Raises `PeerLost`, `RankFailed`."""
        self.check()
        self._tokens = tokens
        self._sent += 1
        self.add(message)

    def add(self, message: bytes) -> None:
        """What belongs to the step sent last. Raises as `send` does."""
        self.check()
        for peer in self._peers:
            peer.link.send(message)

    def launched(self) -> None:
        """Rank 0 has launched its part of the step sent last."""
        self._launched = self._sent

    def collected(self) -> None:
        """The oldest step in flight has finished."""
        self._collected += 1

    def check(self) -> None:
        """Raises `RankFailed` if a rank has failed."""
        if self._failed.is_set():
            self._seen.set()
            raise RankFailed(self._failure) from None  # what rank 0 saw of it says less

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Of an error of rank 0's own part within this block raises what led to it: the failure of another rank, or
        else the error itself. All ranks are ended then."""
        try:
            yield
        except Exception as error:
            if isinstance(error, PeerLost):
                self._failed.wait(self._limit + _GRACE)
            try:
                if not isinstance(error, UserError):
                    self.check()
                raise
            finally:
                self.close(in_order=False)

    # --- the watch ------------------------------------------------------------------------------------------------

    def _look_after_all(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(_TICK):
            now = time.monotonic()
            # Where this process was stopped itself, the time says nothing about the others.
            tick, last = min(now - last, 4 * _TICK), now
            try:
                trouble = self._find_trouble(tick)
                self.on_signs()
            except Exception as error:  # without a watch rank 0 might wait for ever
                self._fail(f"the watch over the ranks failed ({type(error).__name__}: {error})")
                return
            self._doubt = 0.0 if trouble is None else self._doubt + tick
            if trouble is not None and (trouble[0] == 0 or self._doubt >= _COUNSEL):
                self._fail(trouble[1])
                return

    def _find_trouble(self, tick: float) -> tuple[int, str] | None:
        limit = self._limit if self._serving else max(self._limit, _SILENCE_AT_WORK)
        found = []
        for peer in self._peers:
            peer.silence += tick
            try:
                while (message := peer.link.receive(wait=False)) is not None:
                    peer.sign, peer.silence = msgspec.msgpack.decode(message, type=Sign), 0.0
            except PeerLost:
                peer.gone = True
            if (trouble := peer.trouble(self._limit, limit)) is not None:
                found.append(trouble)
        oldest = self._collected + 1
        # There may be none yet, while ranks of other hosts are still to come.
        everywhere = min((peer.sign.launched for peer in self._peers), default=0)
        # Within a launch rank 0 may compute or compile for long, and collects no step before it.
        waits = self._collected < self._sent == self._launched and everywhere >= oldest
        self._unfinished = self._unfinished + tick if waits else 0.0
        if self._unfinished > limit * (1 + self._tokens // _TOKENS):
            found.append((3, f"all ranks launched a step that none finished for {self._unfinished:.0f} s"))
        return min(found, default=None)

    def _fail(self, what: str) -> None:
        when = f"in step {self._collected + 1}" if self._collected < self._sent else f"after step {self._sent}"
        if not self._serving:
            when = "while the engine started"
        self._failure = f"{what}, {when}"
        busy = self._collected < self._sent or not self._serving
        self._failed.set()
        self._end_all()
        if busy and not self._sees_failure() and not self._closed.is_set():
            # Rank 0 waits for a rank of another host, or for its own device, in a call that has no end.
            print(f"error: {self._failure}; this process hangs and is ended.", file=sys.stderr, flush=True)
            os._exit(1)

    def _sees_failure(self) -> bool:
        """Wait for rank 0 to look whether ranks have failed; False where it does not, as it hangs in a call. Counted in
        ticks, in each of which rank 0 may run: on a busy machine they are longer."""
        place, still = None, 0
        for _ in range(round((_GRACE if self._serving else _GRACE_AT_START) / _TICK)):
            if self._seen.wait(_TICK):
                return True
            frame = sys._current_frames().get(self._thread)
            last, place = place, frame and (id(frame), frame.f_lasti)
            still = still + 1 if place == last else 0
            if still > _GRACE / _TICK:
                break
        return False

    def _end_all(self) -> None:
        for peer in self._peers:
            if peer.process is not None and peer.process.poll() is None:
                peer.process.kill()
            peer.link.close()
        for peer in self._peers:
            if peer.process is not None:
                with suppress(subprocess.TimeoutExpired):  # stuck in a driver; the system will reap it
                    peer.process.wait(_END_TIMEOUT)

    def close(self, *, in_order: bool = True) -> None:
        """End all ranks, after their last step if `in_order`, and wait for those of this host. May be called again."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._seen.set()
        if self._watch.is_alive():
            self._watch.join()
        if in_order and not self._failed.is_set():
            deadline = time.monotonic() + _END_TIMEOUT
            with suppress(PeerLost, subprocess.TimeoutExpired):
                for peer in self._peers:
                    peer.link.send(b"")
                for peer in self._peers:
                    if peer.process is not None:
                        peer.process.wait(max(0.0, deadline - time.monotonic()))
        self._end_all()


class Loading:
    """A `Progress` for rank 0 whose weights are those of all ranks, in bytes. Others go on when it waits for them."""

    def __init__(self, ranks: Ranks, report: Progress) -> None:
        self._ranks, self._report = ranks, report
        self._lock = threading.Lock()  # the watch's thread reports, too, but never at another time than `__call__`
        self._own, self._shown = (0, 0), (0, 0)
        ranks.on_signs = self._show

    def __call__(self, what: str, done: int, total: int) -> None:
        """Of rank 0. Raises `RankFailed` where another rank has failed."""
        self._ranks.check()
        if what == "weights":
            self._own = done, total
            self._show()
            return
        self.end()
        self._report(what, done, total)

    def end(self) -> None:
        """All ranks have loaded, if any has begun; signs of it may still be under way."""
        with self._lock:
            if self._own[1]:
                self._own = (0, 0)
                self._report("weights", self._shown[1], self._shown[1])

    def _show(self) -> None:
        with self._lock:
            if not self._own[1]:
                return
            parts = [self._own, *self._ranks.loaded()]
            # Those that have not begun have about as much to load as this one.
            shown = sum(done for done, _ in parts), sum(total or self._own[1] for _, total in parts)
            if shown != self._shown:
                self._shown = shown
                self._report("weights", *shown)


class RankedRunner:
    """Implements `core.Runner`. local: rank 0's own part."""

    def __init__(self, local: LocalRunner, ranks: Ranks) -> None:
        self._local, self._ranks = local, ranks
        ranks.serve()
        weakref.finalize(self, ranks.close)  # also at the interpreter's exit

    def launch(self, step: Step) -> None:
        """See `core.Runner`. Raises `RankFailed` where a rank is gone."""
        with self._ranks.guard():
            self._ranks.send(encode_plan(step.plan), step.plan.num_tokens)
            self._local.launch(step)
            self._ranks.launched()

    def sample(self, step: Step, masks: TokenMasks) -> None:
        """See `core.Runner`. Raises `RankFailed` where a rank is gone."""
        with self._ranks.guard():
            self._ranks.add(_encode(masks))
            self._local.sample(step, masks)

    def collect(self, step: Step) -> None:
        """See `core.Runner`. Raises `RankFailed` where a rank is gone."""
        with self._ranks.guard():
            while not self._local.is_done(step):
                self._ranks.check()
                time.sleep(0)
            self._local.collect(step)
            self._ranks.collected()

    def check(self) -> None:
        """See `core.Runner`."""
        self._ranks.check()


def start_rank(start: RankStart) -> tuple[Link, subprocess.Popen[bytes]]:
    """Start a rank's process, whose stdin is the link's other end."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = start_python("miniserve.runner.worker", stdin=theirs.fileno())
    link = Link(ours)
    link.send(_encode(start))
    return link, process
