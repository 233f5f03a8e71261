"""Time the prefill of single prompts of a model's shape, with random weights, on this device: `python -m
benchmarks.prefill --model DIR`.

DIR needs a config.json only. A prompt's time is from its arrival in the engine loop to its first token; the next one
comes after that. `--cached N` shares the first N tokens with a prompt before it, whose time is not counted.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.decode import uniform_routing
from miniserve.config import EngineConfig
from miniserve.core import Request, SamplingParams
from miniserve.engine.build import build_engine
from miniserve.engine.loop import EngineLoop

WARM_UP, REPEATS = 2, 7


def seconds(engine: EngineLoop, ids: Iterator[int], prompt: list[int]) -> float:
    """From the prompt's arrival to its first token."""
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    start = time.perf_counter()
    engine.add(Request(request_id=str(next(ids)), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        engine.step()
    return time.perf_counter() - start


def print_kernels(run: Callable[[], object]) -> None:
    """What the device did in `run`: milliseconds and launches of each kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiled.events() or ():
        if event.device_type.name == "CUDA":
            found[event.name].append(event.time_range.elapsed_us())
    for name, times in sorted(found.items(), key=lambda item: -sum(item[1]))[:20]:
        print(f"  {sum(times) / 1e3:8.2f} ms {len(times):5d} x {statistics.mean(times):8.1f} µs  {name[:80]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="directory with a config.json")
    parser.add_argument("--input-len", default="1024,8192", help="lengths of prompts, comma-separated")
    parser.add_argument("--cached", type=int, default=0, help="first tokens that are in the prefix cache")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kv-layout", default="auto")
    parser.add_argument("--no-fp8-activations", action="store_true", help="as of `miniserve serve`")
    parser.add_argument("--uniform-routing", action="store_true", help="draw experts uniformly")
    parser.add_argument("--profile", action="store_true", help="also print the time of each kernel of a GPU")
    args = parser.parse_args()
    lengths = [int(length) for length in args.input_len.split(",")]
    config = EngineConfig(
        model=str(args.model),
        device=args.device,
        load_format="dummy",
        kv_layout=args.kv_layout,
        fp8_activations=not args.no_fp8_activations,
        max_num_seqs=16,
        max_model_len=max(lengths) + 1,
        enforce_eager=True,  # no prompt of more than some hundred tokens meets a graph
    )
    with uniform_routing() if args.uniform_routing else nullcontext():
        engine, info = build_engine(config, args.model, args.model.name)
        print(f"{args.model.name} on {info.device}", *info.attention, sep="\n  ")
        rng, ids = random.Random(0), itertools.count()

        def prefill(length: int) -> float:
            prompt = [rng.randrange(info.vocab_size) for _ in range(length)]
            if args.cached:
                seconds(engine, ids, prompt[: args.cached])
            return 1e3 * seconds(engine, ids, prompt)

        for length in lengths:
            times = [prefill(length) for _ in range(WARM_UP + REPEATS)][WARM_UP:]
            median = statistics.median(times)
            print(f"{length:6d} tokens: {median:8.2f} ms ({min(times):.2f} to {max(times):.2f}), {args.cached} cached")
            if args.profile:
                print_kernels(lambda length=length: prefill(length))  # type: ignore[misc]


if __name__ == "__main__":
    main()
