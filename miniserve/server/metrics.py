"""Prometheus metrics under the names of vLLM, so that its dashboards work unchanged, and the roofline under our own.

Latencies are measured here, where the client's request is; gauges and scheduler counters come from `engine.stats` at
each scrape. All of it happens on the event loop's thread, so plain numbers serve where prometheus_client's own
instruments would take a lock for every token.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder

from miniserve.core import Completion, FinishReason, SamplingParams
from miniserve.engine.replicas import Engine
from miniserve.engine.roofline import hidden_share, share_of_bandwidth

if TYPE_CHECKING:
    from miniserve.server.generation import Turns

_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
_ITL = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
)  # fmt: skip
_LATENCY = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
_STEP_TOKENS = (1.0, *(2.0**power for power in range(3, 15)))  # 1, 8, 16, … 16384
_N = (1.0, 2.0, 5.0, 10.0, 20.0)
_PREEMPTIONS = (0.0, 1.0, 2.0, 5.0, 10.0)
_LABELS = ("model_name", "engine")
_ROOFLINE = (  # names, fields of `StepTotals`
    ("decode_steps", "decode_steps", "Steps of decode rows alone."),
    ("decode_step_seconds", "decode_seconds", "Time of these steps."),
    ("decode_rows", "decode_rows", "Rows of these steps: tokens decoded, and wrong guesses."),
    ("decode_padded_rows", "padded_rows", "Rows that filled graphs up."),
    ("decode_weight_bytes", "weight_bytes", "Weights these steps had to read."),
    ("decode_kv_bytes", "kv_bytes", "Cached keys and values they had to read."),
    ("decode_sum_seconds", "sum_seconds", "Time that their sums over ranks take at least."),
    ("mixed_steps", "mixed_steps", "Steps of decode rows and prefill."),
    ("mixed_step_seconds", "mixed_seconds", "Time of these steps."),
    ("prefill_steps", "prefill_steps", "Steps of prefill alone."),
    ("prefill_step_seconds", "prefill_seconds", "Time of these steps."),
)


def token_buckets(max_model_len: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50, … up to the context length."""
    steps = (mantissa * 10.0**exponent for exponent in range(12) for mantissa in (1, 2, 5))
    return tuple(step for step in steps if step <= max_model_len)


class Histogram:
    """Counts of values at or below each bound, and their sum."""

    def __init__(self, name: str, about: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._about = about
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def family(self, labels: Sequence[str]) -> Metric:
        names = [*(f"{bound}" for bound in self._bounds), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(self._counts)), strict=True))
        family = HistogramMetricFamily(self._name, self._about, labels=_LABELS)
        family.add_metric(labels, buckets, self._sum)
        return family


class ServerMetrics:
    """All metrics of one server. A request is one sequence: n of them for n > 1, each with the prompt, as in vLLM.

    With several engines the label `engine` is the number of that which a figure is of. What is measured here, of all
    requests together, has the first one's, so that a sum over engines is right for either.
    """

    def __init__(self, engine: Engine, turns: Turns, model_name: str) -> None:
        self._engine = engine
        self._turns = turns
        self._labels = (model_name, "0")
        tokens = token_buckets(engine.info.max_model_len)
        self.ttft = Histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _TTFT)
        self.itl = Histogram("vllm:inter_token_latency_seconds", "From one token to the next.", _ITL)
        self.tpot = Histogram("vllm:request_time_per_output_token_seconds", "Mean of a request's ITLs.", _ITL)
        self.e2e = Histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY)
        self.queue = Histogram("vllm:request_queue_time_seconds", "Arrival to first being scheduled.", _LATENCY)
        self.inference = Histogram("vllm:request_inference_time_seconds", "First scheduled to last token.", _LATENCY)
        self.prefill = Histogram("vllm:request_prefill_time_seconds", "First scheduled to first token.", _LATENCY)
        self.decode = Histogram("vllm:request_decode_time_seconds", "First token to last token.", _LATENCY)
        self.prompt_len = Histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", tokens)
        self.output_len = Histogram("vllm:request_generation_tokens", "Generated tokens of a request.", tokens)
        self.max_output_len = Histogram(
            "vllm:request_max_num_generation_tokens", "The most tokens generated for one of n.", tokens
        )
        self.n = Histogram("vllm:request_params_n", "The n asked for.", _N)
        self.max_tokens = Histogram("vllm:request_params_max_tokens", "The max_tokens asked for.", tokens)
        self.preemptions = Histogram("vllm:request_num_preemptions", "Preemptions of a request.", _PREEMPTIONS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.finished = dict.fromkeys(FinishReason, 0)
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The body and its content type, in the format that the client's Accept header prefers."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def collect(self) -> Iterator[Metric]:
        engines, info = self._engine.engines, self._engine.info
        stats = [engine.stats for engine in engines]
        yield self._gauge("vllm:num_requests_running", "Requests in the running batch.", [s.num_running for s in stats])
        # Those that are before all engines count with the first.
        num_waiting = [s.num_waiting + self._turns.waiting * (s is stats[0]) for s in stats]
        yield self._gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled.", num_waiting)
        usage = [s.kv_cache_usage for s in stats]
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", usage)
        yield self._gauge(
            "vllm:num_requests_waiting_by_reason", "Requests waiting, by reason.", num_waiting, reason="capacity"
        )
        yield self._gauge(
            "vllm:cache_config_info",
            "The KV cache.",
            [1.0] * len(engines),
            block_size=info.block_size,
            num_gpu_blocks=info.num_blocks,
            kv_cache_size_tokens=info.num_blocks * info.block_size,
            kv_cache_max_concurrency=round(info.num_blocks * info.block_size / info.max_model_len, 2),
            enable_prefix_caching=info.enable_prefix_caching,
        )
        refused = [self._turns.num_refused]
        yield self._counter(
            "vllm:admission_rejections", "Requests answered 429.", refused, reason="max_num_queued_reqs"
        )
        ranks = [info.tensor_parallel_size] * len(engines)
        yield self._gauge("miniserve:tensor_parallel_size", "Ranks that share the model.", ranks)
        yield self._counter("vllm:prompt_tokens", "Prompt tokens processed.", [self.prompt_tokens])
        yield self._counter("vllm:prompt_tokens_cached", "Prompt tokens from the prefix cache.", [self.cached_tokens])
        yield self._counter("vllm:generation_tokens", "Tokens generated.", [self.generation_tokens])
        counters = {
            "vllm:num_preemptions": ("num_preemptions", "Preemptions by the scheduler."),
            "vllm:prefix_cache_queries": ("prefix_cache_queries", "Tokens looked up."),
            "vllm:prefix_cache_hits": ("prefix_cache_hits", "Tokens found."),
        }
        if info.speculative is not None:
            counters |= {
                "vllm:spec_decode_num_drafts": ("num_drafts", "Steps of requests with guesses."),
                "vllm:spec_decode_num_draft_tokens": ("num_draft_tokens", "Tokens guessed."),
                "vllm:spec_decode_num_accepted_tokens": ("num_accepted_tokens", "Of them right."),
            }
        for name, (field, about) in counters.items():
            yield self._counter(name, about, [getattr(s, field) for s in stats])
        success = CounterMetricFamily(
            "vllm:request_success", "Requests that ended, by reason.", labels=(*_LABELS, "finished_reason")
        )
        for reason, count in self.finished.items():
            success.add_metric((*self._labels, reason.value), count)
        yield success
        yield from self._roofline()
        step_tokens = Histogram(
            "vllm:iteration_tokens_total",
            "Tokens that a step generated, and of prompts that got their first.",
            _STEP_TOKENS,
        )
        for engine in engines:
            for size, times in engine.step_sizes.items():
                step_tokens.observe(size, times)
        yield step_tokens.family(self._labels)
        for value in vars(self).values():
            if isinstance(value, Histogram):
                yield value.family(self._labels)

    def _roofline(self) -> Iterator[Metric]:
        engines = self._engine.engines
        totals = [engine.totals for engine in engines]
        for name, field, about in _ROOFLINE:
            yield self._counter(f"miniserve:{name}", about, [getattr(each, field) for each in totals])
        bandwidths = [engine.info.bandwidth for engine in engines]
        if None not in bandwidths:
            known = [bandwidth or 0.0 for bandwidth in bandwidths]
            yield self._gauge("miniserve:memory_bandwidth_bytes_per_second", "Measured at the start.", known)
            shares = [share_of_bandwidth(engine.recent, engine.info.bandwidth) or 0.0 for engine in engines]
            yield self._gauge("miniserve:roofline_ratio", "Share of it that decode reached lately; 0 at rest.", shares)
        if any(each.timed_host for each in totals):
            idle = [each.timed_idle for each in totals]
            yield self._counter("miniserve:device_idle_seconds", "What the device waited for steps.", idle)
            hidden = [hidden_share(engine.recent) or 0.0 for engine in engines]
            yield self._gauge("miniserve:cpu_hidden_ratio", "Share of the host's work beside a busy device.", hidden)

    def _gauge(self, name: str, about: str, values: Sequence[float], **labels: object) -> Metric:
        family = GaugeMetricFamily(name, about, labels=(*_LABELS, *labels))
        for number, value in enumerate(values):
            family.add_metric((self._labels[0], f"{number}", *map(str, labels.values())), value)
        return family

    def _counter(self, name: str, about: str, values: Sequence[float], **labels: object) -> Metric:
        family = CounterMetricFamily(name, about, labels=(*_LABELS, *labels))
        for number, value in enumerate(values):
            family.add_metric((self._labels[0], f"{number}", *map(str, labels.values())), value)
        return family


@dataclass(slots=True)
class _Sequence:
    first_token: float = 0.0  # time.monotonic() seconds
    last_token: float = 0.0
    num_tokens: int = 0
    prefilled: bool = False
    finish: FinishReason | None = None


class RequestMetrics:
    """Watches the deltas of one prompt. `close` counts what has not finished by then as aborted."""

    def __init__(self, metrics: ServerMetrics, prompt_len: int, params: SamplingParams) -> None:
        self._metrics = metrics
        self._prompt_len = prompt_len
        self._params = params
        self.arrival = time.monotonic()
        self._unfinished = params.n
        self._most_tokens = 0
        self.sequences = [_Sequence() for _ in range(params.n)]

    def observe(self, delta: Completion) -> None:
        now = time.monotonic()
        sequence = self.sequences[delta.index]
        if not sequence.prefilled and delta.error is None:
            sequence.prefilled = True
            self._metrics.prompt_tokens += self._prompt_len
            self._metrics.cached_tokens += delta.num_cached_tokens
        if delta.token_ids:
            self._tokens(sequence, len(delta.token_ids), now)
        if delta.finish_reason is not None:
            self._finish(sequence, delta, delta.finish_reason, now)

    def close(self) -> None:
        """Idempotent."""
        if self._unfinished:
            self._metrics.finished[FinishReason.ABORT] += self._unfinished
            self._unfinished = 0

    def _tokens(self, sequence: _Sequence, count: int, now: float) -> None:
        """Tokens that come together share the time since the last ones; beside the first token the others took none."""
        metrics = self._metrics
        if sequence.num_tokens == 0:
            sequence.first_token = now
            metrics.ttft.observe(now - self.arrival)
            if count > 1:
                metrics.itl.observe(0.0, count - 1)
        else:
            metrics.itl.observe((now - sequence.last_token) / count, count)
        sequence.num_tokens += count
        sequence.last_token = now
        metrics.generation_tokens += count

    def _finish(self, sequence: _Sequence, delta: Completion, reason: FinishReason, now: float) -> None:
        metrics = self._metrics
        self._unfinished -= 1
        sequence.finish = reason
        metrics.finished[reason] += 1
        if delta.error is not None:
            return
        metrics.e2e.observe(now - self.arrival)
        metrics.prompt_len.observe(self._prompt_len)
        metrics.output_len.observe(sequence.num_tokens)
        metrics.preemptions.observe(delta.num_preemptions)
        if self._params.max_tokens is not None:
            metrics.max_tokens.observe(self._params.max_tokens)
        self._most_tokens = max(self._most_tokens, sequence.num_tokens)
        if self._unfinished == 0:
            metrics.n.observe(self._params.n)
            metrics.max_output_len.observe(self._most_tokens)
        if delta.first_scheduled_time > 0.0:
            metrics.queue.observe(max(delta.first_scheduled_time - self.arrival, 0.0))
            metrics.inference.observe(now - delta.first_scheduled_time)
        if sequence.num_tokens > 0:
            metrics.decode.observe(sequence.last_token - sequence.first_token)
            if delta.first_scheduled_time > 0.0:
                metrics.prefill.observe(max(sequence.first_token - delta.first_scheduled_time, 0.0))
        if sequence.num_tokens > 1:
            metrics.tpot.observe((sequence.last_token - sequence.first_token) / (sequence.num_tokens - 1))
