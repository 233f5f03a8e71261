"""The engine as the API process sees it: an asyncio object that speaks to the engine process."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from miniserve.config import EngineConfig
from miniserve.core import (
    EngineInfo,
    InvalidRequest,
    PoolView,
    Request,
    RequestOutput,
    SchedulerStats,
    StepRecord,
    StepTotals,
    UserError,
)
from miniserve.engine import messages
from miniserve.engine.build import RUNNER_FACTORY, ProgressCallback
from miniserve.engine.launch import EngineProcess
from miniserve.engine.output import CompletionStream, OutputAssembler, extend, fan_out
from miniserve.engine.tokenizer import Tokenizer, load_tokenizer
from miniserve.models.generation_config import GenerationDefaults, load_generation_defaults

_POLL = 0.1  # seconds; how often an engine that says nothing is looked at
_HEARTBEAT = 1.0  # seconds of silence after which the engine is asked for a sign of life
# Seconds that a step may take by default. A GPU's takes well under one; a CPU's may be a long prefill of a large model.
_GPU_STEP, _CPU_STEP = 60.0, 600.0
_FIRST_STEPS = 600.0  # at least, for the first ones: they may compile kernels
_PERIOD = 1.0  # seconds, at least, that `recent` sums up
_SHUT_DOWN = "The engine was shut down."
# Outputs passed on, and mostly written to their clients, in one go, and the seconds after which it is enough: all of
# 1,024 streams would keep the event loop for 20 ms, and a turn of it has other work as well. The last one of a
# sequence, with which a request may end, counts as so many.
_SLICE, _SLICE_SECONDS, _END = 64, 0.002, 4
# Outputs taken in between two such, if there are so many: 2 ms. A stream that falls behind gets up to _INTAKE ÷ _SLICE
# tokens at once, for little more than the cost of one, so that no engine is faster than this for long.
_INTAKE = 2048
_log = logging.getLogger(__name__)


class EngineDead(RuntimeError):
    """The engine process has ended, or is about to; `str(error)` says why."""


@dataclass(slots=True, eq=False)
class _Running:
    """A caller's request in progress. `sequence_ids` are its sequences' ids in the engine."""

    request_id: str
    assembler: OutputAssembler
    sequence_ids: list[str]
    stream: CompletionStream


class AsyncEngine:
    """Runs an engine process and speaks with it. All methods belong to the event loop in which `start` ran.

    `source_path` is the model's directory, `model_name` what the user called it. `runner_factory` ("module:function")
    builds the runner in the engine process. `info`, `tokenizer` and `generation_defaults` exist once `start` returned.
    `totals` sums up all steps so far, `recent` those of the last second or so; at rest, no step. An engine whose step
    lasts longer than `step_timeout` seconds (None: by the device) counts as dead and is killed.
    """

    def __init__(
        self,
        config: EngineConfig,
        source_path: str | Path,
        model_name: str,
        *,
        runner_factory: str = RUNNER_FACTORY,
        step_timeout: float | None = None,
    ) -> None:
        self._start = messages.Start(
            config=config,
            source_path=str(source_path),
            model_name=model_name,
            runner_factory=runner_factory,
            parent_pid=os.getpid(),
        )
        self.config, self.source_path = config, self._start.source_path
        self._step_timeout = step_timeout
        self._decode = msgspec.msgpack.Decoder(messages.Event).decode
        self._process: EngineProcess | None = None
        self._receiver: asyncio.Task[None] | None = None
        self._shutting_down = False
        self._running: dict[str, _Running] = {}  # by the caller's request id
        self._sequences: dict[str, tuple[_Running, int]] = {}  # by the id in the engine: whose, and which of them
        # What the engine said and is not passed on yet: one output a sequence, in the order of their first tokens.
        self._waiting: OrderedDict[str, RequestOutput] = OrderedDict()
        self._serial = count()
        self._last_sign: float | None = None
        self._asked: float | None = None  # since when a heartbeat is unanswered
        self.engines = (self,)  # see `Replicas`
        self.info: EngineInfo
        self.tokenizer: Tokenizer
        self.generation_defaults: GenerationDefaults
        self.stats = SchedulerStats()
        self.step_sizes: Counter[int] = Counter()  # steps that generated, by `SchedulerStats.step_tokens`
        self.totals = StepTotals()
        self.recent = StepTotals()
        self._period = (0.0, self.totals)  # the current one's begin and what there was then
        # Who waits for the answer to a question; the engine answers in their order.
        self._readers: deque[asyncio.Future[Any]] = deque()
        self.dead: str | None = None  # why nothing can be asked of it any more

    @property
    def died(self) -> bool:
        """Whether it ended otherwise than by `shutdown`."""
        return self.dead not in (None, _SHUT_DOWN)

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(
        self, progress: ProgressCallback | None = None, tokenizer: asyncio.Future[Tokenizer] | None = None
    ) -> None:
        """Start the process and wait until it is ready; `progress` is told (stage, done, total) meanwhile. tokenizer:
        where somebody else loads it.

        Raises `UserError` with the engine's sentence for what the user can mend, `EngineDead` where the process failed
        or died otherwise. Cancelling ends the process.
        """
        path, config = self.source_path, self.config
        self.generation_defaults = load_generation_defaults(path, config.generation_config)
        self._process = EngineProcess(self._start)
        ready = asyncio.create_task(self._wait_ready(self._process, progress))
        loading = tokenizer or asyncio.create_task(asyncio.to_thread(load_tokenizer, path, config.load_format))
        try:
            self.info, self.tokenizer = await asyncio.gather(ready, loading)
        except BaseException as error:
            self.dead = str(error) or "The engine's start was cancelled."
            ready.cancel()
            await asyncio.wait([ready])
            self._process.close()
            raise
        self._last_sign = time.monotonic()
        self._receiver = asyncio.create_task(self._receive(self._process), name="engine-receiver")

    async def _wait_ready(self, process: EngineProcess, progress: ProgressCallback | None) -> EngineInfo:
        info: EngineInfo | None = None
        while not self._shutting_down:
            if info is not None:
                # The answer shows that commands arrive: until the engine has connected they go nowhere.
                process.send(messages.AskStats())
            if not await process.wait(_POLL):
                reason = process.exit_reason()
                # The message may have come between the wait and the look at the process.
                if reason is None or process.events.poll(0):
                    continue
                raise EngineDead(f"The engine did not start: {reason}.")
            match self._decode(process.events.recv()):
                case messages.Progress(stage, done, total):
                    if progress is not None:
                        progress(stage, done, total)
                case messages.Ready(ready):
                    info = ready
                case messages.Failed(message, user_error):
                    raise UserError(message) if user_error else EngineDead(f"The engine did not start: {message}")
                case messages.StepOutputs() if info is not None:
                    process.remove_directory()
                    return info
                case unexpected:
                    raise RuntimeError(f"unexpected {type(unexpected).__name__} from the engine")
        raise EngineDead("The engine was shut down while it started.")

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> bool:
        """End the process: at once, or after what is running has finished (`drain`), but within `timeout` seconds.

        Requests that do not finish get their last delta with an error. A second call with drain false ends a drain. May
        be called at any time, also after the engine's death. Returns False where it died, before or meanwhile.
        """
        self._shutting_down = True
        if self._process is None or self._receiver is None:
            return True  # `start` sees the mark
        self._process.send(messages.Shutdown(drain))
        done, _ = await asyncio.wait([self._receiver], timeout=timeout)
        if not done:
            self._receiver.cancel()
            await asyncio.wait([self._receiver])
        return not self.died

    # --- requests -------------------------------------------------------------------------------------------------

    def generate(self, request: Request) -> CompletionStream:
        """Start a request that has passed `check_request`; its deltas come by the stream.

        Raises `InvalidRequest` for an id that is running, `EngineDead` where there is no engine any more.
        """
        process, request_id = self._live_process(), request.request_id
        if request_id in self._running:
            raise InvalidRequest(f"A request with the id {request_id!r} is already running.", "request_id")
        # A caller may use an id again while tokens of its first request are still on their way.
        requests = fan_out(f"{next(self._serial)}:{request_id}", request)
        assembler = OutputAssembler(self.tokenizer, request.prompt_token_ids, request.params)
        stream = CompletionStream(lambda: self._abort(running))
        running = _Running(request_id, assembler, [request.request_id for request in requests], stream)
        self._running[request_id] = running
        for index, sequence_id in enumerate(running.sequence_ids):
            self._sequences[sequence_id] = (running, index)
        process.send(messages.Add(requests))
        return stream

    def _abort(self, running: _Running) -> None:
        """Its blocks are free within one step."""
        if self._running.get(running.request_id) is running:
            self._forget(running)

    @property
    def num_sequences(self) -> int:
        """That callers wait for."""
        return len(self._sequences)

    def last_step_age(self) -> float | None:
        """Seconds since the engine last finished a step or, at rest, answered a heartbeat; None before it was ready."""
        return None if self._last_sign is None else time.monotonic() - self._last_sign

    async def steps(self, limit: int) -> list[StepRecord]:
        """The last `limit` steps, the oldest first; the engine answers between two steps. Raises `EngineDead`."""
        records: list[StepRecord] = await self._ask(messages.AskSteps(limit))
        return records

    async def pool_view(self, max_blocks: int) -> PoolView:
        """At most `max_blocks` blocks of the KV cache; the engine answers between two steps. Raises `EngineDead`."""
        view: PoolView = await self._ask(messages.AskPool(max_blocks))
        return view

    async def _ask(self, question: messages.AskSteps | messages.AskPool) -> Any:
        process = self._live_process()
        reader: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._readers.append(reader)
        process.send(question)
        return await reader

    def _live_process(self) -> EngineProcess:
        if self.dead is not None:
            raise EngineDead(self.dead)
        if self._shutting_down:
            raise EngineDead("The engine is shutting down and takes no further requests.")
        if self._process is None or self._receiver is None:
            raise EngineDead("The engine was not started.")
        return self._process

    def _forget(self, running: _Running) -> None:
        """Take a request off the books, and out of the engine what of it still runs there."""
        del self._running[running.request_id]
        unfinished = [each for each in running.sequence_ids if self._sequences.pop(each, None) is not None]
        if unfinished and self._process is not None:
            self._process.send(messages.Abort(unfinished))

    # --- what the engine says -------------------------------------------------------------------------------------

    async def _receive(self, process: EngineProcess) -> None:
        """Take in what the engine sends until it ends. Whatever happens, no stream is left waiting and no process."""
        reason: str | None = None
        try:
            reason = await self._take_all(process)
        except Exception as error:
            _log.exception("The engine's client failed.")
            reason = f"its client failed ({type(error).__name__}: {error})"
        finally:
            if reason is None and process.is_stopped:
                reason = "the engine process was stopped (SIGSTOP)"
            in_order = reason is None and self._shutting_down
            self.dead = _SHUT_DOWN if in_order else f"The engine died: {reason or 'its client was cancelled'}."
            running, self._running = self._running, {}
            self._sequences.clear()
            for request in running.values():
                for delta in request.assembler.fail(self.dead):
                    request.stream.put(delta)
                request.stream.end()
            while self._readers:
                reader = self._readers.popleft()
                if not reader.done():
                    reader.set_exception(EngineDead(self.dead))
            process.close()

    async def _take_all(self, process: EngineProcess) -> str | None:
        """Returns why the engine died; None where it ended because it was asked to.

        What the engine has said meanwhile is taken in first, so that a stream's tokens that wait are passed on as one.
        """
        waiting, events = self._waiting, process.events
        while True:
            if not waiting and not await process.wait(_POLL):
                reason = process.exit_reason() or self._look_after(process)
                if reason is not None and not events.poll(0):
                    return None if self._shutting_down and process.ended_in_order else reason
            num_taken = 0
            while num_taken < _INTAKE and events.poll(0):
                event = self._decode(events.recv())
                if isinstance(event, messages.Failed):
                    while waiting:
                        self._pass_on()
                    return event.message
                num_taken += 1 + self._take(event)
            self._pass_on()
            await asyncio.sleep(0)  # the others' turn; a fast engine's messages never run out

    def _look_after(self, process: EngineProcess) -> str | None:
        """Ask a silent engine for a sign of life, which it gives between steps. Why it counts as dead, if it does."""
        now, age = time.monotonic(), self.last_step_age()
        if self._asked is None:
            if age is not None and age > _HEARTBEAT:
                self._asked = now
                process.send(messages.AskStats())
            return None
        limit = self._longest_step()
        if now - self._asked <= limit:
            return None
        return f"it gave no sign of life for {limit:.0f} s (a longer --step-timeout lets its steps last longer)"

    def _longest_step(self) -> float:
        """Seconds. More until a step of each kind has ended; then what it needed is compiled."""
        limit = self._step_timeout or (_CPU_STEP if self.info.device == "cpu" else _GPU_STEP)
        return limit if self.totals.decode_steps and self.totals.prefill_tokens else max(limit, _FIRST_STEPS)

    def _take(self, event: messages.Event) -> int:
        """Put what is to be passed on to what waits; returns how many outputs there were."""
        if isinstance(event, messages.Answer):
            reader = self._readers.popleft()
            if not reader.done():  # its caller may have left
                reader.set_result(event.found)
            return 0
        if not isinstance(event, messages.StepOutputs):
            raise RuntimeError(f"unexpected {type(event).__name__} from the engine")
        self._last_sign = time.monotonic()
        self._asked = None
        if event.totals.num_steps > self.totals.num_steps and event.stats.step_tokens:
            self.step_sizes[event.stats.step_tokens] += 1
        self.stats, self.totals = event.stats, event.totals
        begin, totals = self._period
        if self._last_sign - begin >= _PERIOD:
            self.recent = event.totals.since(totals)
            self._period = (self._last_sign, event.totals)
        waiting = self._waiting
        for output in event.outputs:
            if (earlier := waiting.get(output.request_id)) is None:
                waiting[output.request_id] = output
            else:
                extend(earlier, output)
        return len(event.outputs)

    def _pass_on(self) -> None:
        """A slice of those that wait, the oldest first."""
        waiting, find, room, clock = self._waiting, self._sequences.get, _SLICE, time.monotonic
        end = clock() + _SLICE_SECONDS
        while waiting and room > 0 and clock() < end:
            sequence_id, output = waiting.popitem(last=False)
            room -= 1 if output.finish_reason is None else _END
            if (entry := find(sequence_id)) is not None:  # else it was aborted while this was on its way
                self._pass(*entry, output)

    def _pass(self, running: _Running, index: int, output: RequestOutput) -> None:
        deltas, met_stop = running.assembler.push(index, output)
        if met_stop and self._process is not None:
            self._process.send(messages.Abort([output.request_id]))
        if met_stop or output.finish_reason is not None:
            del self._sequences[output.request_id]
        for delta in deltas:
            running.stream.put(delta)
        if running.assembler.finished:
            self._forget(running)
            running.stream.end()
