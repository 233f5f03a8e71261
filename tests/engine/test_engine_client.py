"""The engine in a process of its own: real processes and sockets, a runner without a model."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from engine_fakes import FACTORY, TINY, expected_tokens, fake_info

from miniserve.config import EngineConfig
from miniserve.core import (
    Completion,
    FinishReason,
    InvalidRequest,
    Request,
    RequestOutput,
    SamplingParams,
    SchedulerStats,
    StepTotals,
    TokenLogprobs,
    UserError,
)
from miniserve.engine import messages
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.output import CompletionStream
from miniserve.engine.tokenizer import Tokenizer
from miniserve.scheduler.limits import check_request

pytestmark = pytest.mark.timeout(180)
ENDLESS = SamplingParams(max_tokens=100)
PROMPT = [300, 301, 302, 303, 304]


def make(options: str = "", config: EngineConfig | None = None, *, step_timeout: float | None = None) -> AsyncEngine:
    config = config or EngineConfig()
    return AsyncEngine(config, TINY, f"fake?{options}", runner_factory=FACTORY, step_timeout=step_timeout)


@asynccontextmanager
async def running(
    options: str = "", config: EngineConfig | None = None, **settings: float
) -> AsyncIterator[AsyncEngine]:
    engine = make(options, config, **settings)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.shutdown(drain=False, timeout=5)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 120))  # type: ignore[arg-type]


async def following(stream: CompletionStream) -> Completion | None:
    """The next delta, or None after the last."""
    arrived = asyncio.Event()
    stream.notify = arrived.set
    while (delta := stream.get()) is None and not stream.complete:
        arrived.clear()
        await arrived.wait()
    return delta


async def collect(stream: CompletionStream) -> list[Completion]:
    deltas = []
    while (delta := await following(stream)) is not None:
        deltas.append(delta)
    return deltas


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def ask(engine: AsyncEngine, prompt: list[int], params: SamplingParams, request_id: str) -> CompletionStream:
    request = Request(request_id=request_id, prompt_token_ids=prompt, params=params)
    return engine.generate(check_request(request, engine.info))


def pid_of(engine: AsyncEngine) -> int:
    assert engine._process is not None
    return engine._process.pid


@pytest.mark.parametrize("overlap", [False, True])
def test_many_requests_at_once_get_their_own_tokens(overlap: bool) -> None:
    async def body() -> None:
        stages: list[tuple[str, int, int]] = []
        engine = make(config=EngineConfig(async_scheduling=overlap, max_num_seqs=16))
        await engine.start(lambda *progress: stages.append(progress))
        assert stages[-1] == ("weights", 2, 2)
        assert engine.info.eos_token_ids == [2045, 2047] == sorted(engine.generation_defaults.eos_token_ids)
        prompts = [[300 + index, *range(400, 400 + index % 7)] for index in range(60)]
        params = SamplingParams(max_tokens=30)
        streams = [ask(engine, prompt, params, f"r{index}") for index, prompt in enumerate(prompts)]
        for prompt, deltas in zip(prompts, await asyncio.gather(*map(collect, streams)), strict=True):
            ids = [token_id for delta in deltas for token_id in delta.token_ids]
            assert ids == expected_tokens(prompt, 30)
            assert "".join(delta.text for delta in deltas) == engine.tokenizer.decode(ids)
            assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [FinishReason.LENGTH]
            assert deltas[-1].finish_reason is FinishReason.LENGTH
        assert engine.stats.num_running == engine.stats.num_waiting == 0
        await engine.shutdown(drain=True, timeout=5)
        assert engine.dead == "The engine was shut down."

    run(body)


def test_n_sequences_stop_strings_and_logprobs() -> None:
    async def body() -> None:
        async with running() as engine:
            prompt = engine.tokenizer.encode(" one two three")
            params = SamplingParams(n=3, seed=0, max_tokens=20, stop=(" one tw",), logprobs=0, prompt_logprobs=0)
            deltas = await collect(ask(engine, prompt, params, "r"))
            for index in range(3):
                mine = [delta for delta in deltas if delta.index == index]
                ids = [token_id for delta in mine for token_id in delta.token_ids]
                assert ids == expected_tokens(prompt, len(ids), seed=index)
                assert mine[-1].finish_reason is FinishReason.STOP and mine[-1].stop_reason == " one tw"
                text = engine.tokenizer.decode(ids)
                assert "".join(delta.text for delta in mine) == text[: text.index(" one tw")]
                assert sum(len(delta.logprobs or ()) for delta in mine) == len(ids)
                assert len(mine[0].prompt_logprobs or ()) == len(prompt)
                assert all(delta.prompt_logprobs is None for delta in mine[1:])
            await until(lambda: engine.stats.num_running == 0)
            assert engine.step_sizes.total() == engine.stats.num_steps
            generated = sum(len(delta.token_ids) for delta in deltas)
            assert sum(size * times for size, times in engine.step_sizes.items()) >= 3 * len(prompt) + generated
            assert max(engine.step_sizes) == 3 * (len(prompt) + 1) and min(engine.step_sizes) <= 3

    run(body)


def test_an_id_that_is_running_is_refused_at_the_call() -> None:
    async def body() -> None:
        async with running("num_blocks=4", EngineConfig(max_model_len=50)) as engine:
            stream = ask(engine, [300], ENDLESS, "twice")
            with pytest.raises(InvalidRequest, match="already running"):
                ask(engine, [300], ENDLESS, "twice")
            assert len([t for delta in await collect(stream) for t in delta.token_ids]) == 49
            await collect(ask(engine, [300], ENDLESS, "twice"))

    run(body)


def test_a_reader_that_leaves_frees_its_blocks() -> None:
    async def body() -> None:
        async with running("step_seconds=0.01") as engine:
            stream = ask(engine, PROMPT, SamplingParams(max_tokens=100, n=4), "r")
            await following(stream)
            await until(lambda: engine.stats.num_running == 4)
            steps = engine.stats.num_steps
            stream.close()
            stream.close()
            assert stream.complete and stream.get() is None
            await until(lambda: engine.stats.num_running == 0)
            assert engine.stats.kv_cache_usage == 0.0
            assert engine.stats.num_steps < steps + 50, "it ran on"
            assert not engine._running and not engine._sequences

    run(body)


def test_a_stream_tells_its_reader_of_each_delta_and_of_the_end() -> None:
    async def body() -> None:
        async with running("step_seconds=0.01") as engine:
            stream, told = ask(engine, PROMPT, SamplingParams(max_tokens=5), "r"), list[tuple[bool, int]]()

            def notify() -> None:
                delta = stream.get()
                told.append((stream.complete, 0 if delta is None else len(delta.token_ids)))

            stream.notify = notify
            await until(lambda: stream.complete)
            *before, at_end = told  # the tokens of several steps come together where this process was slow
            assert at_end == (True, 0) and sum(size for _, size in before) == 5
            assert all(size and not complete for complete, size in before)

    run(body)


class SaidAlready:
    """An engine process that has said all it will, and ended."""

    is_stopped = False
    ended_in_order = False

    def __init__(self, events: list[messages.Event]) -> None:
        self.events = self
        self._said = [msgspec.msgpack.encode(event) for event in events]

    def poll(self, timeout: int) -> int:
        return bool(self._said)

    def recv(self) -> bytes:
        return self._said.pop(0)

    async def wait(self, seconds: float) -> bool:
        return bool(self._said)

    def send(self, command: messages.Command) -> None:
        pass

    def exit_reason(self) -> str:
        return "it ended"

    def close(self) -> None:
        pass


@asynccontextmanager
async def hearing(
    steps: int, requests: int, *last: messages.Event
) -> AsyncIterator[tuple[list[list[Completion]], list[int]]]:
    """What each of the requests is offered, delta by delta, and in which turn of the event loop, by a client that hears
    only now of as many steps, each with a token for each of the requests."""
    engine = make()
    engine.info, engine.tokenizer = fake_info(EngineConfig(), num_blocks=64), Tokenizer(TINY)
    given: list[list[Completion]] = [[] for _ in range(requests)]
    turns: list[int] = []
    streams = []
    turn = 0

    def told(index: int) -> Callable[[Completion], bool]:
        def offer(delta: Completion) -> bool:
            given[index].append(delta)
            turns.append(turn)
            return True

        return offer

    engine._process = engine._receiver = SaidAlready([])  # type: ignore[assignment]
    for index in range(requests):
        stream = ask(engine, PROMPT, SamplingParams(max_tokens=steps, logprobs=0), f"r{index}")
        stream.offer = told(index)
        streams.append(stream)
    ids = list(engine._sequences)
    said: list[messages.Event] = [
        messages.StepOutputs(
            outputs=[
                RequestOutput(
                    request_id=each,
                    new_token_ids=[300 + step],
                    logprobs=[TokenLogprobs(300 + step, -step / 8, 1, [], [])],
                    finish_reason=FinishReason.LENGTH if step == steps - 1 and not last else None,
                    num_cached_tokens=16,
                )
                for each in ids
            ],
            stats=SchedulerStats(),
            totals=StepTotals(),
        )
        for step in range(steps)
    ]
    receiving = asyncio.create_task(engine._receive(SaidAlready([*said, *last])))  # type: ignore[arg-type]
    while not receiving.done():
        turn += 1
        await asyncio.sleep(0)
    await receiving
    assert all(stream.complete for stream in streams)
    yield given, turns


def test_tokens_that_wait_for_a_slow_api_process_are_passed_on_together() -> None:
    async def body() -> None:
        async with hearing(40, 3) as (given, _):
            for (delta,) in given:
                assert delta.token_ids == list(range(300, 340)) and delta.finish_reason is FinishReason.LENGTH
                assert delta.text == Tokenizer(TINY).decode(delta.token_ids)
                assert [entry.logprob for entry in delta.logprobs or ()] == [-step / 8 for step in range(40)]
                assert delta.num_cached_tokens == 16

    run(body)


def test_what_waits_is_passed_on_in_turns_that_bound_what_is_taken_in_as_well() -> None:
    async def body() -> None:
        async with hearing(50, 300) as (given, turns):
            assert all([t for delta in deltas for t in delta.token_ids] == list(range(300, 350)) for deltas in given)
            assert max(Counter(turns).values()) <= 64
            # A part of the 15,000 outputs is read before the first are passed on, and the rest between the slices.
            first, last = given[0], given[-1]
            assert 1 < len(first[0].token_ids) < len(last[0].token_ids) and len(last) <= len(first) < 10

    run(body)


def test_tokens_that_came_before_a_failure_are_passed_on() -> None:
    async def body() -> None:
        async with hearing(2, 200, messages.Failed("it broke", False)) as (given, _):
            for tokens, end in given:
                assert tokens.token_ids == [300, 301] and tokens.finish_reason is None
                assert end.finish_reason is FinishReason.ERROR and end.error == "The engine died: it broke."

    run(body)


def test_an_aborted_requests_id_can_be_used_again() -> None:
    async def body() -> None:
        async with running("step_seconds=0.01") as engine:
            stream = ask(engine, PROMPT, ENDLESS, "r")
            await following(stream)
            stream.close()
            again = ask(engine, [700, 701], SamplingParams(max_tokens=5), "r")
            assert [t for delta in await collect(again) for t in delta.token_ids] == expected_tokens([700, 701], 5)

    run(body)


def test_of_200_readers_a_third_leaves_and_the_others_get_everything() -> None:
    async def body() -> None:
        async with running("num_blocks=256", EngineConfig(max_num_seqs=64, async_scheduling=True)) as engine:

            async def read(index: int) -> None:
                prompt = [300 + index, *range(700, 700 + index % 9)]
                stream = ask(engine, prompt, SamplingParams(max_tokens=20 + index % 50), f"r{index}")
                ids: list[int] = []
                while (delta := await following(stream)) is not None:
                    ids += delta.token_ids
                    reason = delta.finish_reason
                    if index % 3 == 0 and len(ids) > index % 20:
                        stream.close()
                        return
                assert ids == expected_tokens(prompt, 20 + index % 50)
                assert reason is FinishReason.LENGTH

            await asyncio.gather(*map(read, range(200)))
            await until(lambda: engine.stats.kv_cache_usage == 0.0)
            assert not engine._running and not engine._sequences
            assert engine.stats.num_running == engine.stats.num_waiting == 0

    run(body)


def test_a_slow_reader_gets_its_deltas_merged() -> None:
    async def body() -> None:
        async with running() as engine:
            stream = ask(engine, PROMPT, SamplingParams(max_tokens=100, n=2), "r")
            await until(lambda: not engine._running)
            deltas = await collect(stream)
            assert [delta.index for delta in deltas] == [0, 1]
            assert all(delta.token_ids == expected_tokens(PROMPT, 100) for delta in deltas)

    run(body)


def test_a_killed_engine_ends_every_stream_with_an_error() -> None:
    async def body() -> None:
        async with running("step_seconds=0.01") as engine:
            streams = [ask(engine, PROMPT, SamplingParams(max_tokens=100, n=2), f"r{index}") for index in range(5)]
            await asyncio.gather(*map(following, streams))
            os.kill(pid_of(engine), signal.SIGKILL)
            async with asyncio.timeout(2):
                results = await asyncio.gather(*map(collect, streams))
            for deltas in results:
                last = {delta.index: delta for delta in deltas}
                assert sorted(last) == [0, 1]
                for delta in last.values():
                    assert delta.finish_reason is FinishReason.ERROR
                    assert "killed by SIGKILL" in (delta.error or "")
            assert engine.dead is not None and "SIGKILL" in engine.dead
            with pytest.raises(EngineDead, match="SIGKILL"):
                ask(engine, PROMPT, ENDLESS, "late")

    run(body)


def test_an_error_of_the_device_reaches_every_stream(capfd: pytest.CaptureFixture[str]) -> None:
    async def body() -> None:
        async with running("fail_at_step=5") as engine:
            deltas = await collect(ask(engine, PROMPT, ENDLESS, "r"))
            assert deltas[-1].finish_reason is FinishReason.ERROR
            assert "the fake device broke" in (deltas[-1].error or "")
            await until(lambda: engine.dead is not None)

    run(body)
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ("start=user_error", UserError, "^The fake device is too small; buy a larger one.$"),
        ("start=crash", EngineDead, "did not start: ZeroDivisionError: a bug in the runner"),
        ("start=exit", EngineDead, "exited with code 3"),
    ],
)
def test_a_start_that_fails_says_why(
    options: str, error: type[Exception], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    async def body() -> None:
        engine = make(options)
        with pytest.raises(error, match=sentence):
            await engine.start()
        with pytest.raises(EngineDead):
            engine.generate(Request(request_id="r", prompt_token_ids=PROMPT, params=ENDLESS))
        await engine.shutdown()

    run(body)


def test_a_start_without_a_tokenizer_does_not_wait_for_the_model(tmp_path: Path) -> None:
    async def body() -> None:
        engine = AsyncEngine(EngineConfig(), tmp_path, "fake?start=hang", runner_factory=FACTORY)
        with pytest.raises(UserError, match="has no tokenizer"):
            await engine.start()
        assert not _alive(pid_of(engine))

    run(body)


@pytest.mark.parametrize("how", ["cancel", "shutdown"])
def test_a_start_can_be_given_up(how: str) -> None:
    async def body() -> None:
        engine = make("start=hang")
        task = asyncio.create_task(engine.start())
        await until(lambda: engine._process is not None)
        await (engine.shutdown() if how == "shutdown" else asyncio.sleep(0))
        if how == "cancel":
            task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() or isinstance(task.exception(), EngineDead)
        assert not _alive(pid_of(engine))

    run(body)


def test_a_drain_finishes_what_runs_and_takes_nothing_new() -> None:
    async def body() -> None:
        engine = make("step_seconds=0.005")
        await engine.start()
        stream = ask(engine, PROMPT, SamplingParams(max_tokens=60), "r")
        await following(stream)
        shutdown = asyncio.create_task(engine.shutdown(drain=True, timeout=20))
        await asyncio.sleep(0)
        with pytest.raises(EngineDead, match="shutting down"):
            ask(engine, PROMPT, ENDLESS, "late")
        deltas = await collect(stream)
        assert deltas[-1].finish_reason is FinishReason.LENGTH
        await shutdown
        assert not _alive(pid_of(engine))

    run(body)


@pytest.mark.parametrize("how", ["at once", "second call", "timeout"])
def test_a_shutdown_can_cut_a_drain_short(how: str) -> None:
    async def body() -> None:
        engine = make("step_seconds=2")
        await engine.start()
        stream = ask(engine, PROMPT, ENDLESS, "r")
        await following(stream)
        started = time.monotonic()
        match how:
            case "at once":
                await engine.shutdown(drain=False)
            case "second call":
                drain = asyncio.create_task(engine.shutdown(drain=True))
                await asyncio.sleep(0.05)
                await engine.shutdown(drain=False)
                await drain
            case "timeout":
                await engine.shutdown(drain=True, timeout=0.1)
        assert time.monotonic() - started < 100, "100 steps of 2 s were waited for"
        deltas = await collect(stream)
        assert deltas[-1].finish_reason is FinishReason.ERROR
        assert deltas[-1].error == "The engine was shut down."
        assert not _alive(pid_of(engine))

    run(body)


def test_signals_do_not_end_the_engine_and_a_heartbeat_shows_it_lives() -> None:
    async def body() -> None:
        async with running() as engine:
            for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid_of(engine), each)
            await until(lambda: (engine.last_step_age() or 0) > 0.9)
            await until(lambda: (engine.last_step_age() or 1) < 0.5)
            assert await collect(ask(engine, PROMPT, SamplingParams(max_tokens=1), "r"))

    run(body)


def test_an_engine_that_stays_stopped_counts_as_dead() -> None:
    async def body() -> None:
        async with running("step_seconds=0.01") as engine:
            stream = ask(engine, PROMPT, ENDLESS, "r")
            await following(stream)
            os.kill(pid_of(engine), signal.SIGSTOP)
            deltas = await collect(stream)
            assert deltas[-1].finish_reason is FinishReason.ERROR
            assert "was stopped (SIGSTOP)" in (deltas[-1].error or "")
            assert engine.dead is not None and "was stopped (SIGSTOP)" in engine.dead
            await until(lambda: not _alive(pid_of(engine)))
            assert not await engine.shutdown(drain=True, timeout=5)

    run(body)


def test_an_engine_that_is_stopped_for_a_moment_goes_on() -> None:
    async def body() -> None:
        async with running("step_seconds=0.01") as engine:
            assert engine._process is not None
            stream = ask(engine, PROMPT, ENDLESS, "r")
            os.kill(pid_of(engine), signal.SIGSTOP)
            await until(lambda: engine._process.is_stopped)
            os.kill(pid_of(engine), signal.SIGCONT)
            await until(lambda: not engine._process.is_stopped)
            assert (await collect(stream))[-1].finish_reason is FinishReason.LENGTH
            assert await engine.shutdown(drain=True, timeout=20)

    run(body)


def test_a_stopped_engine_is_not_drained() -> None:
    async def body() -> None:
        engine = make()
        await engine.start()
        os.kill(pid_of(engine), signal.SIGSTOP)
        assert not await engine.shutdown(drain=True, timeout=0.1)
        assert not _alive(pid_of(engine))
        assert "was stopped (SIGSTOP)" in (engine.dead or "")

    run(body)


def test_an_engine_that_is_stopped_while_it_starts_counts_as_dead() -> None:
    async def body() -> None:
        engine = make("start=hang")
        task = asyncio.create_task(engine.start())
        await until(lambda: engine._process is not None)
        os.kill(pid_of(engine), signal.SIGSTOP)
        with pytest.raises(EngineDead, match="did not start: the engine process was stopped"):
            await task
        assert not _alive(pid_of(engine))

    run(body)


def test_a_step_that_does_not_end_is_the_death_of_the_engine() -> None:
    async def body() -> None:
        async with running("hang_at_step=8", step_timeout=3.0) as engine:
            assert engine._longest_step() == 600, "the first steps may compile kernels"
            await collect(ask(engine, PROMPT, SamplingParams(max_tokens=3), "r"))
            assert engine._longest_step() == 3.0
            deltas = await collect(ask(engine, PROMPT, ENDLESS, "s"))
            assert deltas[-1].finish_reason is FinishReason.ERROR
            assert "no sign of life" in (deltas[-1].error or "") and "--step-timeout" in (engine.dead or "")
            await until(lambda: not _alive(pid_of(engine)))

    run(body)


def test_no_temporary_directory_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))

    async def body() -> None:
        with pytest.raises(UserError, match=r"No temporary directory can be written .* set TMPDIR"):
            await make().start()

    run(body)


@pytest.fixture
def short_path() -> Iterator[Path]:
    """pytest's own directories may be too deep for the name of a socket."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        yield Path(directory)


def test_nothing_is_left_behind(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(short_path))

    async def body() -> None:
        tasks = asyncio.all_tasks()
        modes: set[int] = set()

        def progress(stage: str, done: int, total: int) -> None:
            modes.update(path.stat().st_mode & 0o777 for path in short_path.iterdir())

        engine = make()
        await engine.start(progress)
        assert modes == {0o700}, "the sockets' directory is not private"
        assert list(short_path.iterdir()) == [], "a kill would leave the sockets' directory behind"
        await collect(ask(engine, PROMPT, SamplingParams(max_tokens=1), "r"))
        await engine.shutdown()
        assert asyncio.all_tasks() == tasks
        with pytest.raises(EngineDead):
            await make("start=crash").start()
        assert list(short_path.iterdir()) == []

    run(body)


PARENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from engine_fakes import FACTORY, TINY
from miniserve.config import EngineConfig
from miniserve.core import Request, SamplingParams
from miniserve.engine.client import AsyncEngine

async def main():
    engine = AsyncEngine(EngineConfig(), TINY, "fake?step_seconds=" + sys.argv[2], runner_factory=FACTORY)
    await engine.start()
    params = SamplingParams(max_tokens=100)
    stream = engine.generate(Request(request_id="r", prompt_token_ids=[300, 301], params=params))
    await asyncio.sleep(0.1)
    print(engine._process.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("step_seconds", ["0.01", "300"])
def test_the_engine_dies_with_its_parent_also_in_the_middle_of_a_step(step_seconds: str) -> None:
    command = [sys.executable, "-c", PARENT, str(Path(__file__).parent), step_seconds]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        engine_pid = int(parent.stdout.readline())
        assert _alive(engine_pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while _alive(engine_pid):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
