"""Time the decode step of a model's shape, with random weights, on this device: `python -m benchmarks.decode --model
DIR`.

DIR needs a config.json only. All requests of a batch decode together once the last of them is prefilled; the time of a
step is the median over those steps, as the host sees tokens arrive.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from miniserve.bench.report import header, write_json
from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, Request, Runner, SamplingParams
from miniserve.engine.build import build_engine
from miniserve.engine.loop import EngineLoop
from miniserve.engine.roofline import describe
from miniserve.models.layers.norm import Normed
from miniserve.models.layers.routing import Chosen, Router
from miniserve.parallel.group import Alone
from miniserve.runner import ranks
from miniserve.runner.build import build_runner
from miniserve.runner.ranked import Progress, RankStart

_UNIFORM_RANK = "benchmarks.decode:build_uniform_rank"
_patches = ExitStack()


@contextmanager
def uniform_routing() -> Iterator[None]:
    """Within this block routers keep their weights, but experts are drawn uniformly for each layer and row. Random
    router weights may send all tokens to a few experts, and the others' weights would not be read. Ranks draw alike.
    What was drawn stays with its router: graphs that were captured within this block read it later."""
    choose, seeds = Router.__call__, itertools.count()

    def uniform(router: Router, x: Normed) -> Chosen:
        weights, ids = choose(router, x)
        known: torch.Tensor | None = vars(router).get("drawn")
        if known is None or len(known) < len(ids):
            seed = torch.Generator(ids.device).manual_seed(next(seeds))
            scores = torch.rand(max(len(ids), 8192), router.moe.num_experts, device=ids.device, generator=seed)
            known = vars(router)["drawn"] = scores.topk(router.moe.top_k, dim=1).indices.to(ids.dtype)
        return weights, known[: len(ids)].contiguous()

    with mock.patch.object(Router, "__call__", uniform), mock.patch.object(ranks, "_BUILDER", _UNIFORM_RANK):
        yield


def build_uniform_rank(start: RankStart, progress: Progress) -> Runner:
    """Another rank, in a process of its own that routes uniformly to its end."""
    _patches.enter_context(uniform_routing())
    return ranks.build_rank(start, progress)


def one_rank(size: int) -> AbstractContextManager[object]:
    """Engines built within this block have the shapes of the first of `size` ranks, without the others and the sums
    over them; what they compute has no meaning."""
    return mock.patch.object(ranks, "build_ranks", partial(build_runner, group=Alone(0, size)))


def measure(engine: EngineLoop, info: EngineInfo, batch: int, prompt_len: int, output_len: int) -> dict[str, object]:
    """Median seconds of the steps in which every one of `batch` requests gets a token, and how near the memory's limit
    those come: not the steps before and after them, which have fewer rows."""
    rng = random.Random(batch)
    params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    for index in range(batch):
        prompt = [rng.randrange(info.vocab_size) for _ in range(prompt_len)]
        engine.add(Request(request_id=f"{batch}-{index}", prompt_token_ids=prompt, params=params))
    times, totals = [], []
    while engine.has_work:
        num_tokens = sum(len(output.new_token_ids) for output in engine.step())
        if num_tokens == batch:
            times.append(time.perf_counter())
            totals.append(copy(engine.log.totals))
    steps = [later - earlier for earlier, later in itertools.pairwise(times)][2:]
    step = statistics.median(steps)
    period = totals[-1].since(totals[2])
    roofline = describe(period, info.bandwidth)
    read = (period.weight_bytes + period.kv_bytes) / max(1, period.decode_steps)
    floor = read / info.bandwidth if info.bandwidth else None
    beside = "" if floor is None else f", {step / floor:.2f} x the floor of {1e3 * floor:.3f} ms"
    print(f"{batch:5d} x {prompt_len}: {1e3 * step:8.3f} ms{beside}, {batch / step:,.0f} tokens/s; mean: {roofline}")
    return {
        "batch": batch,
        "prompt_len": prompt_len,
        "step_s": step,
        "floor_s": floor,
        "num_steps": len(steps),
        "roofline": roofline,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="directory with a config.json")
    parser.add_argument("--batch", default="1,8,32,64,128,256", help="batch sizes, comma-separated")
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=129)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--kv-layout", default="auto")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--uniform-routing", action="store_true", help="draw experts uniformly")
    parser.add_argument(
        "--rank-of", type=int, default=1, metavar="N", help="the first of N ranks, without the others and their sums"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks, each on its device")
    parser.add_argument("--enable-expert-parallel", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    batches = [int(size) for size in args.batch.split(",")]
    config = EngineConfig(
        model=str(args.model),
        device=args.device,
        load_format="dummy",
        kv_layout=args.kv_layout,
        max_num_seqs=max(batches),
        max_num_batched_tokens=8192,
        max_model_len=args.input_len + args.output_len,
        enable_prefix_caching=False,
        enforce_eager=args.enforce_eager,
        tensor_parallel_size=args.tensor_parallel_size,
        enable_expert_parallel=args.enable_expert_parallel,
    )
    start = time.perf_counter()
    rank = one_rank(args.rank_of) if args.rank_of > 1 else nullcontext()
    with uniform_routing() if args.uniform_routing else nullcontext(), rank:
        engine, info = build_engine(config, args.model, args.model.name)
    started = time.perf_counter() - start
    part = f", rank 0 of {args.rank_of}" if args.rank_of > 1 else ""
    print(f"{args.model.name}{part} on {info.device}, started in {started:.1f} s; {info.attention[0]}")
    rows = [measure(engine, info, batch, args.input_len, args.output_len) for batch in batches]
    if args.json:
        found = {
            "model": args.model.name,
            "rank_of": args.rank_of,
            "tensor_parallel_size": info.tensor_parallel_size,
            "enable_expert_parallel": info.enable_expert_parallel,
            "start_s": started,
            "results": rows,
        }
        write_json(args.json, {**header("decode"), **found})


if __name__ == "__main__":
    main()
