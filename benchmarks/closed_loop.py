"""Steps of a loaded engine without its server, with random weights: `python -m benchmarks.closed_loop --model DIR`.

As `bench serve` does, each of C clients sends its next prompt when its answer has ended. All prompts are new. DIR needs
a config.json only. Says for each kind of step how many there were, how long they took by the device's clock, and how
long the device waited for the next one; `--profile` adds the device's kernels over some later steps of each kind.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.decode import uniform_routing
from miniserve.config import EngineConfig
from miniserve.core import Request, SamplingParams, StepRecord
from miniserve.engine.build import build_engine
from miniserve.engine.loop import EngineLoop


class Clients:
    """Steps the loop and keeps `concurrency` requests in it until all are sent."""

    def __init__(self, loop: EngineLoop, vocab_size: int, args: argparse.Namespace) -> None:
        self._loop, self._vocab_size, self._rng = loop, vocab_size, random.Random(0)
        self._input_len, self._output_len = args.input_len, args.output_len
        self._ids = itertools.count()
        self._to_send = 0
        self.tokens = 0

    def start(self, concurrency: int, total: int) -> None:
        self._to_send = total
        for _ in range(concurrency):
            self._send()

    def _send(self) -> None:
        if self._to_send:
            self._to_send -= 1
            prompt = [self._rng.randrange(self._vocab_size) for _ in range(self._input_len)]
            params = SamplingParams(temperature=0.0, max_tokens=self._output_len, ignore_eos=True)
            self._loop.add(Request(request_id=str(next(self._ids)), prompt_token_ids=prompt, params=params))

    def step(self) -> None:
        for output in self._loop.step():
            self.tokens += len(output.new_token_ids)
            if output.finish_reason is not None:
                self._send()

    def run(self, num_steps: float = float("inf")) -> None:
        while self._loop.has_work and num_steps > 0:
            self.step()
            num_steps -= 1


def report(records: list[StepRecord]) -> None:
    """Print count, tokens, times and waits of each kind of step."""
    kinds: dict[str, list[StepRecord]] = defaultdict(list)
    for record in records:
        kinds[record.kind].append(record)
    for kind, steps in kinds.items():
        device = [1e3 * step.device for step in steps if step.device is not None]
        idle = [1e3 * step.idle for step in steps if step.idle is not None]
        host = statistics.median(1e3 * (step.schedule + step.launch + step.update) for step in steps)
        tokens = statistics.mean(step.tokens for step in steps)
        rows = statistics.mean(step.rows for step in steps)
        line = f"{kind:8s} {len(steps):5d} steps, {tokens:7.0f} tokens, {rows:5.0f} rows; host {host:6.2f} ms"
        if device:
            whole, waited = sum(device) / 1e3, sum(idle) / 1e3
            line += f"; device p50 {statistics.median(device):7.2f} mean {statistics.mean(device):7.2f} ms"
            line += f", {whole:6.2f} s in all, waited {waited:5.2f} s"
        print(line, flush=True)


def print_kernels(clients: Clients, loop: EngineLoop, steps: int) -> None:
    """Milliseconds and launches of each kernel in `steps` steps, and what kinds these were."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        clients.run(steps)
    report(loop.log.records(steps))
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA":
            found[event.name].append(event.time_range.elapsed_us())
    print(f"  {sum(map(sum, found.values())) / 1e3:8.2f} ms in kernels")
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:24]:
        print(f"  {sum(times) / 1e3:8.2f} ms {len(times):5d} x {statistics.mean(times):8.1f} µs  {name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="directory with a config.json")
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--concurrency", default="256", help="numbers of clients, comma-separated")
    parser.add_argument("--rounds", type=int, default=2, help="requests of each client")
    parser.add_argument("--max-num-batched-tokens", type=int, default=None)
    parser.add_argument("--kv-layout", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--uniform-routing", action="store_true", help="draw experts uniformly")
    parser.add_argument("--profile", type=int, default=0, help="steps whose kernels are printed, in the second round")
    args = parser.parse_args()
    sizes = [int(size) for size in args.concurrency.split(",")]
    config = EngineConfig(
        model=str(args.model),
        device=args.device,
        load_format="dummy",
        kv_layout=args.kv_layout,
        max_num_seqs=max(sizes),
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.input_len + args.output_len,
        enable_prefix_caching=False,
    )
    with uniform_routing() if args.uniform_routing else nullcontext():
        loop, info = build_engine(config, args.model, args.model.name)
    print(f"{args.model.name} on {info.device}; {info.attention[0]}", flush=True)
    clients = Clients(loop, info.vocab_size, args)
    clients.start(4, 8)  # everything is compiled by now
    clients.run()
    for size in sizes:
        first, clients.tokens, start = loop.log.records(1)[0].number, 0, time.perf_counter()
        clients.start(size, size * args.rounds)
        if args.profile:
            clients.run(args.output_len + args.input_len * size // 4096)
            print_kernels(clients, loop, args.profile)
        clients.run()
        took = time.perf_counter() - start
        print(f"{args.input_len}:{args.output_len}:{size}: {clients.tokens / took:8.0f} tokens/s", flush=True)
        report([record for record in loop.log.records() if record.number > first])


if __name__ == "__main__":
    main()
