"""What the API process does with an engine that costs nothing: `python -m benchmarks.host --streams 256,1024`.

A fake engine gives every running request a token each `--step-ms`; with `--real` the built-in model computes them on
the CPU, as fast as it can. One client process reads all streams and parses nothing. Printed: the median stream's time
per output token and the mean step of decode rows alone, to compare; tokens a second as sent and for each CPU second of
the API process (its rate on one core that it has for itself); tokens an event (above 1 the server was slower than the
engine and joined them); and how late its event loop was at worst while tokens flowed. On a machine that others use as
well it may have waited for a core, as the scheduler says of the latest look: the CPU time of its thread between two
looks is what it did itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import miniserve
from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, Step, TokenMasks
from miniserve.engine.build import RUNNER_FACTORY
from miniserve.engine.client import AsyncEngine
from miniserve.server.config import ServerConfig
from miniserve.server.serve import listening, loop_factory, serve

TINY = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"
PROMPT = "The quick brown fox jumps over the lazy dog."
_PROBE = 0.002  # seconds


class FakeRunner:
    """Each row's tokens count upwards; a step lasts `step_seconds`."""

    def __init__(self, step_seconds: float) -> None:
        self._step_seconds = step_seconds
        self._next = 0.0
        self._num_steps = 0

    def launch(self, step: Step) -> None:
        self._num_steps += 1
        step.token_ids = [300 + (row * 7 + self._num_steps) % 1500 for row in step.plan.sampling_rows]

    def sample(self, step: Step, masks: TokenMasks) -> None:
        pass

    def collect(self, step: Step) -> None:
        now = time.monotonic()
        self._next = max(self._next + self._step_seconds, now)
        time.sleep(self._next - now)

    def check(self) -> None:
        pass


def build_fake(
    config: EngineConfig, source_path: Path, model_name: str, progress: Callable[[str, int, int], None] | None
) -> tuple[FakeRunner, EngineInfo]:
    """A `runner_factory`; the model's name is the milliseconds of a step."""
    info = EngineInfo(
        model=model_name,
        model_path=str(source_path),
        architecture="Fake",
        dtype="float32",
        device="cpu",
        vocab_size=2048,
        max_model_len=4096,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=16384,
        block_size=config.block_size,
        num_blocks=config.max_num_seqs * 128,
        kv_layout="linear",
        enable_prefix_caching=config.enable_prefix_caching,
        async_scheduling=bool(config.async_scheduling),
        eos_token_ids=[],
        memory=[],
        attention=[],
    )
    return FakeRunner(float(model_name) / 1e3), info


def waited() -> float:
    """Seconds that this thread has waited for a core; 0 where nobody counts them."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


class Stream(NamedTuple):
    """As its client saw it; `seconds` from the first event to the last."""

    num_events: int
    seconds: float


def run_server(streams: int, step_ms: float, is_real: bool) -> None:
    """Serve until stdin says something; the first line out is the port, the last what it cost."""
    engine_config = EngineConfig(max_num_seqs=streams, device="cpu") if is_real else EngineConfig(max_num_seqs=streams)
    config, factory = (
        ServerConfig(port=0, log_requests=False),
        RUNNER_FACTORY if is_real else "benchmarks.host:build_fake",
    )

    async def main() -> None:
        engine = AsyncEngine(engine_config, TINY, f"{step_ms:g}", runner_factory=factory)
        await engine.start()
        stop, looks = asyncio.Event(), [(0.0, 0.0, 0.0)]  # how late, the CPU time, the wait for a core

        async def probe() -> None:
            while not stop.is_set():
                begin, begin_cpu, begin_wait = time.monotonic(), time.thread_time(), waited()
                await asyncio.sleep(_PROBE)
                late = time.monotonic() - begin - _PROBE
                looks.append((late, time.thread_time() - begin_cpu, waited() - begin_wait))

        def at_input() -> None:
            if sys.stdin.readline().strip() != "more":
                asyncio.get_running_loop().remove_reader(0)
                stop.set()
            usage = resource.getrusage(resource.RUSAGE_SELF)
            late = sorted(looks)
            report = {"cpu": usage.ru_utime + usage.ru_stime, "late_p99": late[len(late) * 99 // 100][0]}
            report |= {"late": late[-1][0], "waited": late[-1][2], "busy": max(cpu for _, cpu, _ in looks)}
            report |= {"steps": engine.totals.decode_steps, "seconds": engine.totals.decode_seconds}
            del looks[1:]
            print(json.dumps(report), flush=True)

        with listening(config) as sock:
            asyncio.get_running_loop().add_reader(0, at_input)
            probing = asyncio.create_task(probe())
            port = sock.getsockname()[1]
            await serve(engine, config, sock=sock, on_ready=lambda: print(port, flush=True), stop=stop)
            probing.cancel()

    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(main())


async def _stream(port: int, path: str, body: bytes) -> Stream:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    writer.write(head.encode() + b"\r\nConnection: close\r\n\r\n" + body)
    answer, num_events, first, last = b"", 0, 0.0, 0.0
    while data := await reader.read(65536):
        if found := data.count(b"data: {"):
            last = time.monotonic()
            first = first or last
            num_events += found
        answer = (answer + data)[-400:]
    if b"[DONE]" not in answer:
        raise RuntimeError(answer.decode(errors="replace"))
    writer.close()
    return Stream(num_events, last - first)


def measure(streams: int, tokens: int, step_ms: float, chat: bool, is_real: bool) -> None:
    command = [sys.executable, "-m", "benchmarks.host", "--serve", "--streams", str(streams), "--step-ms", str(step_ms)]
    command += ["--real"] * is_real
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as server:
        assert server.stdin is not None and server.stdout is not None
        port = int(server.stdout.readline())
        fields = {"max_tokens": tokens, "ignore_eos": True, "stream": True, "temperature": 0}
        asked = {"messages": [{"role": "user", "content": PROMPT}]} if chat else {"prompt": PROMPT}
        path = "/v1/chat/completions" if chat else "/v1/completions"
        body = json.dumps(asked | fields).encode()

        async def ask(num: int) -> list[Stream]:
            return await asyncio.gather(*(_stream(port, path, body) for _ in range(num)))

        asyncio.run(ask(1))
        print("more", file=server.stdin, flush=True)
        before = json.loads(server.stdout.readline())
        begin = time.monotonic()
        answers = asyncio.run(ask(streams))
        seconds = time.monotonic() - begin
        print("end", file=server.stdin, flush=True)
        after = json.loads(server.stdout.readline())
    total, cpu = streams * tokens, after["cpu"] - before["cpu"]
    step = 1e3 * (after["seconds"] - before["seconds"]) / max(after["steps"] - before["steps"], 1)
    tpot = 1e3 * statistics.median(answer.seconds for answer in answers) / (tokens - 1)
    print(
        f"{'chat' if chat else 'completions':12} {streams:5} streams, a step each {step:.2f} ms: TPOT {tpot:.2f} ms, "
        f"{total / seconds:8,.0f} tokens/s, {total / cpu:8,.0f} a CPU second, "
        f"{total / sum(answer.num_events for answer in answers):5.2f} tokens an event, event loop late by "
        f"{1e3 * after['late_p99']:.1f} ms (p99), {1e3 * after['late']:.1f} ms (most, of which "
        f"{1e3 * after['waited']:.1f} for a core; by its own CPU time {1e3 * after['busy']:.1f} ms)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="256", help="one or more numbers, as 256,1024")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream")
    parser.add_argument("--step-ms", type=float, default=8.0)
    parser.add_argument("--chat", action="store_true", help="chat completions")
    parser.add_argument("--real", action="store_true", help="the built-in model on the CPU instead of the fake engine")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        run_server(int(args.streams), args.step_ms, args.real)
        return
    for streams in map(int, args.streams.split(",")):
        measure(streams, args.tokens, args.step_ms, args.chat, args.real)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", os.getcwd())
    main()
