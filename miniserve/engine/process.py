"""The engine process: `python -m miniserve.engine.process DIRECTORY`, started by `engine.launch` and nobody else.

It owns the device. It takes commands while there is work, steps, and pushes what came out. It ignores SIGINT, SIGTERM
and SIGHUP, because the API process decides when it ends (a Ctrl-C or a service manager signals both at once); and it
never outlives the API process: the kernel kills it with its parent, and its stdin is a pipe whose end says the same.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import traceback
from pathlib import Path

import msgspec
import zmq

from miniserve.core import RequestOutput, UserError
from miniserve.engine import messages
from miniserve.engine.build import build_engine
from miniserve.engine.launch import set_up_logging
from miniserve.engine.loop import EngineLoop
from miniserve.parallel.child import die_with_parent, ignore_signals

_PROGRESS_INTERVAL = 0.05  # seconds
_LINGER_MS = 2000  # how long the last message may take to leave a process that ends


class _Server:
    """Takes commands between the steps of an engine, and sends what the steps bring."""

    def __init__(self, loop: EngineLoop, commands: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
        self._loop = loop
        self._commands = commands
        self._events = events
        self._decode = msgspec.msgpack.Decoder(messages.Command).decode
        self._encode = msgspec.msgpack.Encoder().encode
        self._stopping = False
        self._draining = False

    def serve(self) -> None:
        """Run until told to shut down. Errors of the engine propagate."""
        while not self._stopping and not (self._draining and not self._loop.has_work):
            took_commands = self._take_commands()
            if self._loop.has_work and not self._stopping:
                self._send(self._loop.step())
            elif took_commands:
                self._send([])

    def _take_commands(self) -> bool:
        """Apply the commands that are there; wait for one where the engine has nothing else to do."""
        took = False
        while self._commands.poll(0 if took or self._loop.has_work else None):
            self._apply(self._decode(self._commands.recv()))
            took = True
        return took

    def _apply(self, command: messages.Command) -> None:
        match command:
            case messages.Add(requests):
                for request in requests:
                    self._loop.add(request)
            case messages.Abort(request_ids):
                self._loop.abort(request_ids)
            case messages.Shutdown(drain):
                self._draining = True
                self._stopping = not drain
            case messages.AskStats():
                self._loop.check()  # every batch of commands is answered with the stats
            case messages.AskSteps(limit):
                self._events.send(self._encode(messages.Answer(self._loop.log.records(limit))))
            case messages.AskPool(max_blocks):
                self._events.send(self._encode(messages.Answer(self._loop.pool_view(max_blocks))))

    def _send(self, outputs: list[RequestOutput]) -> None:
        event = messages.StepOutputs(outputs=outputs, stats=self._loop.stats, totals=self._loop.log.totals)
        self._events.send(self._encode(event))


class _ProgressReporter:
    """Sends start-up progress, at most every `_PROGRESS_INTERVAL` but for the end of each stage."""

    def __init__(self, events: zmq.Socket[bytes]) -> None:
        self._events = events
        self._last = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done >= total or now - self._last >= _PROGRESS_INTERVAL:
            self._last = now
            self._events.send(msgspec.msgpack.encode(messages.Progress(stage, done, total)))


def main(directory: Path) -> int:
    """Returns the exit code: 0 after a shutdown, 1 after an error, which was told to the API process and to stderr."""
    ignore_signals()
    start = msgspec.msgpack.decode((directory / messages.START_FILE).read_bytes(), type=messages.Start)
    die_with_parent(start.parent_pid)
    threading.Thread(target=_exit_at_end_of_stdin, name="parent-watch", daemon=True).start()
    context = zmq.Context()
    events = _connect(context, zmq.PUSH, directory / messages.OUTPUTS_SOCKET)
    commands = _connect(context, zmq.PULL, directory / messages.COMMANDS_SOCKET)
    try:
        set_up_logging(start.config.log_level, start.config.log_format)
        loop, info = build_engine(
            start.config, Path(start.source_path), start.model_name, _ProgressReporter(events), start.runner_factory
        )
        # What exists now lives as long as the process: later collections need not look at it again.
        gc.collect()
        gc.freeze()
        events.send(msgspec.msgpack.encode(messages.Ready(info)))
        _Server(loop, commands, events).serve()
    except UserError as error:
        events.send(msgspec.msgpack.encode(messages.Failed(str(error), True)))
        return 1
    except Exception as error:
        traceback.print_exc()
        events.send(msgspec.msgpack.encode(messages.Failed(f"{type(error).__name__}: {error}", False)))
        return 1
    finally:
        commands.close(linger=0)
        events.close(linger=_LINGER_MS)
        context.term()
    return 0


def _connect(context: zmq.Context[zmq.Socket[bytes]], kind: int, path: Path) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)  # no message is ever dropped or waits for the reader
    socket.connect(f"ipc://{path}")
    return socket


def _exit_at_end_of_stdin() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
