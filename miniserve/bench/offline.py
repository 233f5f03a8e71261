"""`miniserve bench latency` and `throughput`: the engine in this process, without HTTP."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from miniserve.bench.decode_steps import DecodeSteps
from miniserve.bench.report import header
from miniserve.bench.stats import Summary, rates, summarize
from miniserve.bench.workload import Shape, token_prompts
from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, InvalidRequest, SamplingParams, UserError

if TYPE_CHECKING:
    from miniserve.llm import LLM


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyResult:
    """Of `repeats` batches, in seconds: `whole` from the call to the last token of the batch, `first` likewise with one
    token per prompt, and `step` = (whole - first) / (output_len - 1), the decode step (TPOT). `step` is empty where
    output_len is 1. `steps`: what the engine counted meanwhile."""

    batch_size: int
    input_len: int
    output_len: int
    whole: list[float]
    first: list[float]
    step: list[float]
    steps: DecodeSteps

    def summaries(self) -> dict[str, Summary | None]:
        return {"whole": summarize(self.whole), "first": summarize(self.first), "step": summarize(self.step)}

    @property
    def decode_tokens_per_s(self) -> float | None:
        summary = summarize(self.step)
        return self.batch_size / summary.median if summary else None

    def to_json(self, info: EngineInfo) -> dict[str, Any]:
        latency = {name: summary and asdict(summary) for name, summary in self.summaries().items()}
        return _record("latency", info, self) | {
            "latency_s": latency,
            "decode_tokens_per_s": self.decode_tokens_per_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputResult:
    """`duration` in seconds for all prompts, submitted at once."""

    num_prompts: int
    input_tokens: int
    output_tokens: int
    duration: float
    steps: DecodeSteps

    def rates(self) -> dict[str, float]:
        return rates(self.duration, self.num_prompts, self.input_tokens, self.output_tokens)

    def to_json(self, info: EngineInfo) -> dict[str, Any]:
        return _record("throughput", info, self) | {"throughput": self.rates()}


def _record(kind: str, info: EngineInfo, result: LatencyResult | ThroughputResult) -> dict[str, Any]:
    fields = ("model", "architecture", "dtype", "device", "max_num_seqs", "max_num_batched_tokens", "block_size")
    more = ("num_blocks", "kv_layout", "enable_prefix_caching", "async_scheduling", "memory", "attention")
    engine = {name: getattr(info, name) for name in (*fields, *more)}
    return {**header(kind), "engine": engine, **asdict(result), "steps": result.steps.to_json()}


def open_engine(config: EngineConfig) -> LLM:
    """Raises `UserError` where it cannot start."""
    from miniserve.llm import LLM  # here and not above: torch would slow down `miniserve bench --help`

    return LLM(**asdict(config))


def measure_latency(
    engine: LLM, *, batch_size: int, shape: Shape, warmup: int, repeats: int, seed: int
) -> LatencyResult:
    """Time `repeats` batches after `warmup` unmeasured ones. Each batch has new prompts: none is found in the prefix
    cache. Raises `UserError` for a count out of range."""
    if batch_size < 1 or repeats < 1 or warmup < 0:
        raise UserError("--batch-size and --repeats must be 1 or more and --warmup 0 or more.")
    whole, first, ids = [], [], range(engine.info.vocab_size)
    for index in range(warmup + repeats):
        if index == warmup:
            before = _count_steps(engine)
        # One draw for both runs of a repeat, half of it each.
        prompts = [prompt for prompt, _ in token_prompts(2 * batch_size, shape, ids, seed + index)]
        times = [
            _timed(engine, prompts[:batch_size], [shape.output_len] * batch_size),
            _timed(engine, prompts[batch_size:], [1] * batch_size),
        ]
        if index >= warmup:
            whole.append(times[0])
            first.append(times[1])
    decode_steps = shape.output_len - 1
    return LatencyResult(
        batch_size=batch_size,
        input_len=shape.input_len,
        output_len=shape.output_len,
        whole=whole,
        first=first,
        step=[(n - one) / decode_steps for n, one in zip(whole, first, strict=True)] if decode_steps else [],
        steps=_count_steps(engine).since(before),
    )


def measure_throughput(engine: LLM, *, num_prompts: int, shape: Shape, seed: int) -> ThroughputResult:
    """Time many prompts submitted at once, after one small unmeasured batch. Raises `UserError`."""
    if num_prompts < 1:
        raise UserError("--num-prompts must be 1 or more.")
    ids = range(engine.info.vocab_size)
    (warmup, _), *_ = token_prompts(1, shape, ids, seed + 1)
    _timed(engine, [warmup], [2])
    drawn = token_prompts(num_prompts, shape, ids, seed)
    prompts, lengths = [prompt for prompt, _ in drawn], [length for _, length in drawn]
    before = _count_steps(engine)
    duration = _timed(engine, prompts, lengths)
    return ThroughputResult(
        num_prompts=num_prompts,
        input_tokens=sum(map(len, prompts)),
        output_tokens=sum(lengths),
        duration=duration,
        steps=_count_steps(engine).since(before),
    )


def _count_steps(engine: LLM) -> DecodeSteps:
    return DecodeSteps(engine.step_totals, engine.info.bandwidth)


def _timed(engine: LLM, prompts: list[list[int]], lengths: list[int]) -> float:
    """Seconds it takes to generate exactly `lengths` tokens, greedily."""
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    start = time.perf_counter()
    try:
        results = engine.generate(prompts, params, progress=False)
    except InvalidRequest as error:
        raise UserError(f"The engine refuses such requests: {error}") from error
    duration = time.perf_counter() - start
    # A figure over fewer tokens than asked for would be wrong.
    counts = [len(result.outputs[0].token_ids) for result in results]
    short = [(got, asked) for got, asked in zip(counts, lengths, strict=True) if got != asked]
    if short:
        got, asked = short[0]
        raise UserError(
            f"{len(short)} of {len(counts)} requests got {got} tokens instead of {asked}; "
            "lower --input-len or --output-len, or raise --max-model-len."
        )
    return duration
