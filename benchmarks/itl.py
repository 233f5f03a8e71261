"""ITL of decoding requests: alone, while long prompts arrive, and alone again (their contexts grow meanwhile). `python
-m benchmarks.itl --model DIR`.

DIR needs a config.json only; weights are random. The engine's loop runs in this process.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from miniserve.bench.stats import summarize
from miniserve.config import EngineConfig
from miniserve.core import Request, SamplingParams
from miniserve.engine.build import build_engine
from miniserve.engine.loop import EngineLoop

_PROMPT_LEN = 1024  # of the requests that decode


class Watch:
    """Steps the loop; records when the decoding requests get tokens, and the others their first."""

    def __init__(self, loop: EngineLoop, vocab_size: int) -> None:
        self._loop, self._vocab_size, self._rng = loop, vocab_size, random.Random(0)
        self._last: dict[str, float] = {}
        self._sent: dict[str, float] = {}
        self.gaps: list[float] = []
        self.ttft: list[float] = []

    def add(self, name: str, prompt_len: int, output_len: int) -> None:
        prompt = [self._rng.randrange(self._vocab_size) for _ in range(prompt_len)]
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        self._sent[name] = time.perf_counter()
        self._loop.add(Request(request_id=name, prompt_token_ids=prompt, params=params))

    def step(self) -> None:
        outputs = self._loop.step()
        now = time.perf_counter()
        for name in (output.request_id for output in outputs if output.new_token_ids):
            if name in self._last and name.startswith("decoding"):
                self.gaps.append(now - self._last[name])
            elif name not in self._last and name.startswith("long"):
                self.ttft.append(now - self._sent[name])
            self._last[name] = now

    def run(self, seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and self._loop.has_work:
            self.step()

    def run_alone(self, seconds: float) -> None:
        """Run for a time, after one unmeasured second."""
        self.run(1.0)
        self.gaps = []
        self.run(seconds)

    def report(self, what: str) -> None:
        """Print the gaps since the last report, and clear them."""
        gaps, self.gaps = summarize([1e3 * gap for gap in self.gaps]), []
        if gaps is None:
            raise SystemExit(f"{what}: no request decoded; raise --output-len or --seconds.")
        tail = f"p90 {gaps.p90:.2f}, p99 {gaps.p99:.2f}, max {gaps.max:.2f}"
        print(f"{what}: ITL p50 {gaps.median:.2f} ms, {tail}; {gaps.count} gaps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, help="directory with a config.json")
    parser.add_argument("--max-itl-ratio", type=float, default=2.0)
    parser.add_argument("--kv-layout", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rows", type=int, default=16, help="requests that decode")
    parser.add_argument(
        "--output-len", type=int, default=3000, help="tokens that each of them generates; must last for the whole run"
    )
    parser.add_argument("--prompt-len", type=int, default=8192, help="length of arriving prompts")
    parser.add_argument("--every", type=float, default=1.0, help="seconds between arriving prompts")
    parser.add_argument("--seconds", type=float, default=15.0, help="seconds for which prompts arrive")
    args = parser.parse_args()
    config = EngineConfig(
        model=str(args.model),
        device=args.device,
        load_format="dummy",
        kv_layout=args.kv_layout,
        max_num_seqs=2 * args.rows,
        max_num_batched_tokens=8192,
        max_model_len=max(args.prompt_len + 16, _PROMPT_LEN + args.output_len),
        max_itl_ratio=args.max_itl_ratio,
        enable_prefix_caching=False,
    )
    loop, info = build_engine(config, args.model, args.model.name)
    watch = Watch(loop, info.vocab_size)
    for index in range(args.rows):
        watch.add(f"decoding-{index}", _PROMPT_LEN, args.output_len)
    watch.add("long-warm-up", args.prompt_len, 8)  # everything is compiled by now
    while not watch.ttft:
        watch.step()
    watch.ttft = []
    watch.run_alone(args.seconds / 5)
    watch.report("decode alone")
    num_prompts = max(1, int(args.seconds / args.every))
    for index in range(num_prompts):
        watch.add(f"long-{index}", args.prompt_len, 16)
        watch.run(args.every)
    watch.report(f"with a prompt of {args.prompt_len} tokens every {args.every} s")
    while len(watch.ttft) < num_prompts:
        watch.step()
    print(f"TTFT of these prompts: median {1e3 * statistics.median(watch.ttft):.0f} ms of {len(watch.ttft)}")
    watch.run_alone(args.seconds / 5)
    watch.report("decode alone again")


if __name__ == "__main__":
    main()
