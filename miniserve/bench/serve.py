"""`miniserve bench serve`: load an OpenAI-compatible server with random prompts and measure what its clients see."""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import httpx

from miniserve.bench.client import RequestRecord, send
from miniserve.bench.connections import ConnectionPool
from miniserve.bench.decode_steps import DecodeSteps, ask_server
from miniserve.bench.report import header
from miniserve.bench.stats import Summary, rates, summarize
from miniserve.bench.workload import (
    WORDS,
    WORDS_TEXT,
    Sample,
    ServeConfig,
    poisson_arrivals,
    text_samples,
    token_samples,
)
from miniserve.core import UserError
from miniserve.server.serve import loop_factory


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSummary:
    """A measurement without its requests one by one; tokens, throughput and latencies are of those that succeeded.

    `duration` reaches from the first request's start to the last one's end. `failures`: how often each error happened,
    the commonest first. `throughput`: see `stats.rates`. `latency`: one sample a request for ttft, tpot and e2e, one a
    gap between chunks for itl. `client_cpu` is the share of one core that this client used: near 1, the client limits
    the measurement. `lag`: the most seconds by which a request was sent later than its arrival time. `steps`: what a
    miniserve server counted meanwhile. Times in seconds.
    """

    duration: float
    completed: int
    failures: dict[str, int]
    input_tokens: int
    output_tokens: int
    tokens_per_chunk: float | None
    throughput: dict[str, float]
    latency: dict[str, Summary | None]
    client_cpu: float
    lag: float
    steps: DecodeSteps | None

    def to_json(self) -> dict[str, Any]:
        return {
            "duration_s": self.duration,
            "completed": self.completed,
            "failed": sum(self.failures.values()),
            "failures": self.failures,
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "tokens_per_chunk": self.tokens_per_chunk,
            "throughput": self.throughput,
            "latency_s": {name: summary and asdict(summary) for name, summary in self.latency.items()},
            "steps": self.steps and self.steps.to_json(),
            "time_shares": self.steps and self.steps.shares(self.duration),
            "client": {"cpu_share": self.client_cpu, "max_lag_s": self.lag},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeResult:
    """`records` in the order of the prompts."""

    config: ServeConfig
    model: str
    server: dict[str, Any]
    records: list[RequestRecord]
    summary: ServeSummary

    @property
    def completed(self) -> list[RequestRecord]:
        return [record for record in self.records if record.error is None]

    def to_json(self) -> dict[str, Any]:
        """Everything: settings, summary, and each request as it was measured."""
        config = asdict(self.config)
        config["api_key"] = None if self.config.api_key is None else "***"
        return {
            **header("serve"),
            "model": self.model,
            "server": self.server,
            "config": config,
            **self.summary.to_json(),
            "requests": [asdict(record) | {"tpot": record.tpot} for record in self.records],
        }


def _summary(
    records: list[RequestRecord], duration: float, client_cpu: float, lag: float, steps: DecodeSteps | None
) -> ServeSummary:
    completed = [record for record in records if record.error is None]
    chunks = sum(record.num_chunks for record in completed)
    tokens_in = sum(record.prompt_tokens for record in completed)
    tokens_out = sum(record.completion_tokens for record in completed)
    return ServeSummary(
        completed=len(completed),
        failures=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        duration=duration,
        input_tokens=tokens_in,
        output_tokens=tokens_out,
        tokens_per_chunk=tokens_out / chunks if chunks else None,
        throughput=rates(duration, len(completed), tokens_in, tokens_out),
        latency={
            "ttft": summarize([record.ttft for record in completed]),
            "tpot": summarize([record.tpot for record in completed if record.tpot is not None]),
            "itl": summarize([gap for record in completed for gap in record.itl]),
            "e2e": summarize([record.e2e for record in completed]),
        },
        client_cpu=client_cpu,
        lag=lag,
        steps=steps,
    )


def run(config: ServeConfig, on_done: Callable[[RequestRecord], None] = lambda record: None) -> ServeResult:
    """Measure; `on_done` is called with each measured request as it ends.

    Raises `UserError` if the server cannot be reached, or fails while warming up.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(_run(config, on_done))


async def _run(config: ServeConfig, on_done: Callable[[RequestRecord], None]) -> ServeResult:
    headers = {"Authorization": f"Bearer {config.api_key}"} if config.api_key else {}
    with closing(ConnectionPool(config.root, config.api_key, config.timeout)) as pool:
        # For what is asked beside the load: without a proxy, as the load, and without connections that may have ended.
        unkept = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(
            base_url=config.root, headers=headers, timeout=config.timeout, limits=unkept, trust_env=False
        ) as client:
            load = replace(config, model=config.model or await _first_model(client, config.root))
            server = await _server_version(client)
            samples = await _samples(client, load)
            await _warm_up(pool, load, samples[: load.warmup])
            before = await ask_server(client)
            # Keep the garbage collector from walking existing objects, which would delay every request's timestamps.
            gc.collect()
            gc.freeze()
            try:
                cpu, start = time.process_time(), time.perf_counter()
                records, lag = await _measure(pool, load, samples[load.warmup :], start, on_done)
                duration, cpu = time.perf_counter() - start, time.process_time() - cpu
            finally:
                gc.unfreeze()
            after = await ask_server(client)
    steps = None if before is None or after is None else after.since(before)
    summary = _summary(records, duration, cpu / duration, lag, steps)
    return ServeResult(config=config, model=str(load.model), server=server, records=records, summary=summary)


async def _measure(
    pool: ConnectionPool,
    config: ServeConfig,
    samples: list[Sample],
    start: float,
    on_done: Callable[[RequestRecord], None],
) -> tuple[list[RequestRecord], float]:
    """The records in the order of the samples, and the worst lateness in seconds."""
    records: dict[int, RequestRecord] = {}

    async def one(index: int, sample: Sample) -> None:
        records[index] = await send(pool, config, sample, start)
        on_done(records[index])

    async def work(queue: Iterable[tuple[int, Sample]]) -> None:
        for index, sample in queue:
            await one(index, sample)

    lag = 0.0
    queue = iter(enumerate(samples))  # shared: each worker takes the next sample
    async with asyncio.TaskGroup() as group:
        if config.request_rate is None:
            for _ in range(min(config.concurrency or 1, len(samples))):
                group.create_task(work(queue))
        else:
            arrivals = poisson_arrivals(config.request_rate, config.seed)
            for (index, sample), arrival in zip(queue, arrivals, strict=False):
                await asyncio.sleep(arrival - (time.perf_counter() - start))
                lag = max(lag, time.perf_counter() - start - arrival)
                group.create_task(one(index, sample))
    return [records[index] for index in range(len(samples))], lag


async def _warm_up(pool: ConnectionPool, config: ServeConfig, samples: list[Sample]) -> None:
    now = time.perf_counter()
    for record in await asyncio.gather(*(send(pool, config, sample, now) for sample in samples)):
        if record.error is not None:
            raise UserError(f"The warm-up request to {config.root} failed: {record.error}. Check --url and --model.")


async def _first_model(client: httpx.AsyncClient, root: str) -> str:
    url = f"{root}/v1/models"
    try:
        response = await client.get("/v1/models")
    except httpx.HTTPError as error:
        raise UserError(f"Cannot reach {url} ({error or type(error).__name__}); is the server running?") from error
    if response.status_code in (401, 403):
        raise UserError(f"{url} answered {response.status_code}; pass the server's key as --api-key.")
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{url} lists no model (HTTP {response.status_code}); pass its name as --model.") from error


async def _server_version(client: httpx.AsyncClient) -> dict[str, Any]:
    """The server's description of itself, for the record; empty if it has none."""
    try:
        answer = (await client.get("/version")).json()
    except (httpx.HTTPError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}


async def _samples(client: httpx.AsyncClient, config: ServeConfig) -> list[Sample]:
    """Prompts for the warm-up, then for the measurement. Token ids where the endpoint takes them."""
    count = config.warmup + config.num_prompts
    text_ids = None if config.vocab_size is not None else await _tokenize(client, config.model, WORDS_TEXT)
    if config.sends_text:
        tokens_per_word = len(text_ids) / len(WORDS) if text_ids else 1.0
        return text_samples(count, config.shape, tokens_per_word, config.seed)
    ids = range(config.vocab_size) if config.vocab_size is not None else sorted(set(text_ids or ()))
    if not ids:
        raise UserError(
            f"{config.root}/tokenize returns no token ids for {config.model}; is that the model's name? If the server "
            "has no such endpoint, pass --vocab-size, or --prompt-type text."
        )
    return token_samples(count, config.shape, ids, config.seed)


async def _tokenize(client: httpx.AsyncClient, model: str | None, text: str) -> list[int] | None:
    """Token ids of a text as vLLM and miniserve give them, or None where the server has no such endpoint."""
    try:
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        response = await client.post("/tokenize", json=body)
        tokens = response.json()["tokens"] if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return None
    return tokens if isinstance(tokens, list) and all(isinstance(token, int) for token in tokens) else None
