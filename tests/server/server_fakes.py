"""An engine without a process or a model, and a real server over it on a loopback socket.

Tokenizer, detokenizer, stop strings, checks and streams are the engine's own. The "model" is a table of random bigrams:
what follows a token depends on that token alone, so a test can compute every log probability by itself. Decoding is
greedy; sequence i of n begins with the token of rank i. A `script` replaces what would be generated.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

import miniserve
from miniserve.config import EngineConfig
from miniserve.core import (
    EngineInfo,
    FinishReason,
    PoolView,
    Request,
    RequestOutput,
    SamplingParams,
    SchedulerStats,
    StepRecord,
    StepTotals,
    StepTraffic,
    TokenLogprobs,
)
from miniserve.engine.client import EngineDead
from miniserve.engine.output import CompletionStream, OutputAssembler, extend
from miniserve.engine.replicas import Engine
from miniserve.engine.tokenizer import Tokenizer
from miniserve.server.config import ServerConfig
from miniserve.server.serve import listening, loop_factory, serve

TINY = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"
VOCAB_SIZE = 2048
EOS = 2047
MAX_MODEL_LEN = 256
REAL = EngineConfig(device="cpu", dtype="float32", kv_cache_memory=16 * 2**20, max_model_len=512, max_num_seqs=16)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


@lru_cache(4096)
def bigram_logprobs(token_id: int) -> np.ndarray:
    """float32 log probabilities of what follows a token, [VOCAB_SIZE]; special tokens never win."""
    logits = np.random.default_rng(token_id).normal(size=VOCAB_SIZE).astype(np.float32) * 4
    logits[2045:] = -20.0
    return logits - np.log(np.exp(logits).sum())


def entry(previous: int, token_id: int, k: int) -> TokenLogprobs:
    row = bigram_logprobs(previous)
    top = np.argsort(-row, kind="stable")[:k].tolist()
    logprob = float(row[token_id])
    return TokenLogprobs(token_id, logprob, int((row > row[token_id]).sum()) + 1, top, [float(row[i]) for i in top])


@lru_cache(4096)
def follower(token_id: int, rank: int = 0) -> int:
    return int(np.argsort(-bigram_logprobs(token_id), kind="stable")[rank])


def greedy(prompt: list[int], num_tokens: int, rank: int = 0) -> list[int]:
    tokens = [prompt[-1]]
    for position in range(num_tokens):
        tokens.append(follower(tokens[-1], rank if position == 0 else 0))
    return tokens[1:]


@dataclass
class Defaults:
    sampling: dict[str, float | int] = field(default_factory=dict)


class FakeEngine:
    """Has what the server uses of `AsyncEngine`. `seen` keeps the parameters of every request, `aborted` counts the
    requests whose stream was closed before its end."""

    def __init__(
        self,
        *,
        script: list[int] | None = None,
        step_seconds: float = 0.0,
        fail_after: int | None = None,
        hold_at: int | None = None,
        sampling: dict[str, float | int] | None = None,
        max_model_len: int = MAX_MODEL_LEN,
        num_blocks: int = 64,
        max_num_seqs: int = 256,
    ) -> None:
        self.tokenizer = tokenizer()
        self.generation_defaults = Defaults(sampling or {})
        self.info = EngineInfo(
            model="tiny/fake", model_path=str(TINY), architecture="Fake", dtype="float32", device="cpu",
            vocab_size=VOCAB_SIZE, max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_num_batched_tokens=512,
            block_size=16, num_blocks=num_blocks, kv_layout="linear", enable_prefix_caching=True,
            async_scheduling=False, eos_token_ids=[EOS], memory=[], attention=[],
            traffic=StepTraffic(weights=10**9, kv=[(None, 1000)], bandwidth=1e12),
        )  # fmt: skip
        self.script = script
        self.scripts: list[list[int]] = []  # of the next requests, one each; the last stays
        self.step_seconds = step_seconds
        self.joined = 1  # steps whose outputs come as one, as where the server is slower than its engine
        self.fail_after = fail_after
        self.hold_at = hold_at  # the step at which all requests wait for `gate`
        self.gate = asyncio.Event()
        self.dead: str | None = None
        self.age: float | None = 0.0
        self.seen: list[tuple[list[int], SamplingParams]] = []
        self.aborted = 0
        self.num_running = 0
        self.num_looks = 0  # at the pool
        self.guesses = (0, 0, 0)  # runs, tokens, right ones
        self.step_sizes = Counter({1: 3, 300: 2})
        self.totals = StepTotals()
        self.recent = StepTotals()
        self.records: list[StepRecord] = []
        self.shutdowns: list[bool] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._boxes: dict[int, tuple[CompletionStream, OutputAssembler]] = {}
        self._serial = count()

    @property
    def stats(self) -> SchedulerStats:
        usage = self.num_running / 64
        drafts, tokens, right = self.guesses
        return SchedulerStats(
            num_running=self.num_running,
            kv_cache_usage=usage,
            prefix_cache_queries=7,
            num_drafts=drafts,
            num_draft_tokens=tokens,
            num_accepted_tokens=right,
        )

    @property
    def engines(self) -> tuple[FakeEngine, ...]:
        return (self,)

    def last_step_age(self) -> float | None:
        return self.age

    async def steps(self, limit: int) -> list[StepRecord]:
        if self.dead:
            raise EngineDead(self.dead)
        return self.records[-limit:] if limit else []

    async def pool_view(self, max_blocks: int) -> PoolView:
        self.num_looks += 1
        if self.dead:
            raise EngineDead(self.dead)
        # Rows 0 and 1 share a prefix of two blocks; four blocks of others are kept.
        owners = [PoolView.SHARED] * 2 + [0, 1, 1] + [PoolView.KEPT] * 4
        owners += [PoolView.FREE] * (self.info.num_blocks - len(owners))
        return PoolView(stride=1, owners=owners, num_tokens={0: 44, 1: 60})

    def generate(self, request: Request) -> CompletionStream:
        prompt_token_ids, params = request.prompt_token_ids, request.params
        if self.dead or self.shutdowns:
            raise EngineDead(self.dead or "The engine is shutting down.")
        self.seen.append((prompt_token_ids, params))
        if self.scripts:
            self.script = self.scripts.pop(0)
        number = next(self._serial)

        def abort() -> None:
            self.aborted += 1
            task.cancel()
            self._end(number, "aborted")

        stream = CompletionStream(abort)
        self._boxes[number] = stream, OutputAssembler(self.tokenizer, prompt_token_ids, params)
        task = asyncio.get_running_loop().create_task(self._run(number, prompt_token_ids, params, self.script))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self.num_running += params.n
        return stream

    def kill(self, reason: str) -> None:
        self.dead = reason
        for task in list(self._tasks):
            task.cancel()
        for number in list(self._boxes):
            self._end(number, reason)

    async def shutdown(self, drain: bool = True, timeout: float | None = None) -> bool:
        self.shutdowns.append(drain)
        if drain and self._tasks:
            await asyncio.wait(list(self._tasks), timeout=timeout)
        if self.dead is None:
            self.kill("The engine was shut down.")
        return self.dead == "The engine was shut down."

    def _end(self, number: int, error: str) -> None:
        box = self._boxes.pop(number, None)
        if box is None:
            return
        stream, assembler = box
        for delta in assembler.fail(error):
            self.num_running -= 1
            stream.put(delta)
        stream.end()

    async def _run(self, number: int, prompt: list[int], params: SamplingParams, script: list[int] | None) -> None:
        stream, assembler = self._boxes[number]
        started = time.monotonic()
        wanted = max(params.max_tokens or 0, 1)
        tokens = [script or greedy(prompt, wanted, index) for index in range(params.n)]
        waiting: dict[int, RequestOutput] = {}
        for step in range(wanted):
            await asyncio.sleep(self.step_seconds)
            if step == self.hold_at:
                await self.gate.wait()
            if self.fail_after is not None and step >= self.fail_after:
                self._end(number, "The fake device broke.")
                return
            for index in range(params.n):
                output = self._output(prompt, params, tokens[index], index, step)
                output.first_scheduled_time = started
                if index in waiting:
                    extend(waiting[index], output)
                else:
                    waiting[index] = output
                if waiting[index].finish_reason is None and (step + 1) % self.joined:
                    continue
                deltas, _ = assembler.push(index, waiting.pop(index))
                for delta in deltas:
                    self.num_running -= delta.finish_reason is not None
                    stream.put(delta)
            if assembler.finished:
                break
        self._boxes.pop(number, None)
        stream.end()

    def _output(
        self, prompt: list[int], params: SamplingParams, tokens: list[int], index: int, step: int
    ) -> RequestOutput:
        token = tokens[step % len(tokens)]
        previous = (prompt + tokens[:step])[-1]
        # Like an engine whose later sequences find the blocks of the first.
        cached = 16 * (len(prompt) > 16) * (1 + index)
        output = RequestOutput(request_id="", num_cached_tokens=cached)
        if step == 0 and params.prompt_logprobs is not None and index == 0:
            pairs = pairwise(prompt)
            output.prompt_logprobs = [None, *(entry(a, b, params.prompt_logprobs) for a, b in pairs)]
        if params.max_tokens:
            output.new_token_ids = [token]
            if params.logprobs is not None:
                output.logprobs = [entry(previous, token, params.logprobs)]
        if token == EOS and not params.ignore_eos:
            output.finish_reason = FinishReason.STOP
        elif token in params.stop_token_ids:
            output.finish_reason, output.stop_token_id = FinishReason.STOP, token
        elif step + 1 >= (params.max_tokens or 0):
            output.finish_reason = FinishReason.LENGTH
        return output


class RunningServer:
    """`root` is the server's address; `call` runs something on its event loop and waits for it."""

    def __init__(self, engine: Any, config: ServerConfig, port: int = 0) -> None:
        self.engine = engine
        self._config = config
        self._bound = listening(config if config.uds else replace(config, host="127.0.0.1", port=port))
        self._socket = self._bound.__enter__()
        self.port = 0 if config.uds else int(self._socket.getsockname()[1])
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v1"
        self._ready = threading.Event()
        self.exit_code: int | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(120)
        assert self.exit_code is None

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            try:
                self.exit_code = runner.run(self._main())
            finally:
                self._ready.set()
                self._bound.__exit__(None, None, None)

    async def _main(self) -> int:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        if not isinstance(self.engine, FakeEngine):
            await self.engine.start()
        return await serve(self.engine, self._config, self._socket, on_ready=self._ready.set, stop=self._stop)

    def call(self, work, *args):  # type: ignore[no-untyped-def]
        async def run():  # type: ignore[no-untyped-def]
            return work(*args)

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(30)

    def num_tasks(self) -> int:
        return self.call(lambda: len(asyncio.all_tasks()))

    def request_stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> int:
        if self._thread.is_alive():
            self.request_stop()
        return self.join()

    def join(self) -> int:
        self._thread.join(120)
        assert not self._thread.is_alive()
        assert self.exit_code is not None
        return self.exit_code


@contextmanager
def running_server(engine: FakeEngine | Engine | None = None, **config: object) -> Iterator[RunningServer]:
    server = RunningServer(engine or FakeEngine(), ServerConfig(**config))  # type: ignore[arg-type]
    try:
        yield server
    finally:
        if isinstance(server.engine, FakeEngine) and server.exit_code is None:
            server.call(server.engine.gate.set)
        server.stop()


def wait_until(condition, seconds: float = 120.0) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)
