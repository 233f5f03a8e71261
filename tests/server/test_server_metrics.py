"""Prometheus metrics: vLLM's names, and figures that add up."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server_fakes import EOS, FakeEngine, RunningServer, running_server

from miniserve.core import Completion, FinishReason, SamplingParams
from miniserve.server.generation import Turns
from miniserve.server.metrics import Histogram, RequestMetrics, ServerMetrics, token_buckets

DASHBOARD = (  # what vLLM's Grafana board and the Kubernetes gateway read
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:num_requests_waiting_by_reason",
    "vllm:iteration_tokens_total_bucket",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_inference_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_max_num_generation_tokens_sum",
    "vllm:request_params_n_sum",
    "vllm:request_params_max_tokens_sum",
    "vllm:request_num_preemptions_sum",
)


class Samples:
    """All samples of a scrape, by name (summed over labels other than `le`, where there are any)."""

    def __init__(self, text: str) -> None:
        families = text_string_to_metric_families(text)
        self.all = [sample for family in families for sample in family.samples]

    def __getitem__(self, name: str) -> float:
        found = [sample.value for sample in self.all if sample.name == name]
        assert found, name
        return sum(found)


def scrape(server: RunningServer) -> Samples:
    return Samples(httpx.get(f"{server.root}/metrics").text)


@pytest.fixture
def server() -> Iterator[RunningServer]:
    with running_server() as server:
        yield server


def test_the_invariants(server: RunningServer) -> None:
    lengths, max_tokens, n = [3, 20, 7], 6, 2
    body = {"prompt": [[9] * length for length in lengths], "n": n, "max_tokens": max_tokens}
    for streams in (False, True):
        httpx.post(f"{server.url}/completions", json={**body, "stream": streams}).read()
    samples = scrape(server)
    requests = 2 * len(lengths) * n
    assert samples["vllm:prompt_tokens_total"] == 2 * sum(lengths) * n
    assert samples["vllm:prompt_tokens_cached_total"] == 2 * (16 + 32), "what each of a prompt's sequences found"
    assert samples["vllm:generation_tokens_total"] == requests * max_tokens
    assert samples["vllm:request_success_total"] == requests
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_decode_time_seconds",
                 "request_generation_tokens", "request_time_per_output_token_seconds"):  # fmt: skip
        assert samples[f"vllm:{name}_count"] == requests, name
    assert samples["vllm:inter_token_latency_seconds_count"] == requests * (max_tokens - 1)
    assert samples["vllm:request_generation_tokens_sum"] == requests * max_tokens
    assert samples["vllm:request_max_num_generation_tokens_count"] == 2 * len(lengths)
    assert samples["vllm:request_params_n_count"] == 2 * len(lengths)
    assert samples["vllm:request_params_n_sum"] == requests
    assert samples["vllm:num_requests_running"] == samples["vllm:kv_cache_usage_perc"] == 0
    assert samples["vllm:prefix_cache_queries_total"] == 7
    assert samples["vllm:iteration_tokens_total_count"] == 5
    assert samples["vllm:iteration_tokens_total_sum"] == 3 * 1 + 2 * 300


def test_the_names_and_labels_that_dashboards_read(server: RunningServer) -> None:
    httpx.post(f"{server.url}/completions", json={"prompt": "x", "max_tokens": 2})
    samples = scrape(server).all
    assert set(DASHBOARD) <= {sample.name for sample in samples}
    assert all(sample.labels["model_name"] == "tiny/fake" and sample.labels["engine"] == "0" for sample in samples)
    (cache,) = [sample for sample in samples if sample.name == "vllm:cache_config_info"]
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"]) == ("16", "64")
    assert cache.labels["kv_cache_size_tokens"] == "1024"
    reasons = {sample.labels["finished_reason"] for sample in samples if sample.name == "vllm:request_success_total"}
    assert reasons == {"stop", "length", "abort", "error", "refused"}
    itl = [sample.labels["le"] for sample in samples if sample.name == "vllm:inter_token_latency_seconds_bucket"]
    assert itl[:4] == ["0.001", "0.0025", "0.005", "0.01"]
    assert itl[-1] == "+Inf"


def test_ends_are_counted_by_their_reason() -> None:
    def count(server: RunningServer, reason: str) -> float:
        (value,) = [
            sample.value
            for sample in scrape(server).all
            if sample.name == "vllm:request_success_total" and sample.labels["finished_reason"] == reason
        ]
        return value

    with running_server(FakeEngine(script=[5, EOS])) as server:
        httpx.post(f"{server.url}/completions", json={"prompt": "x", "max_tokens": 9})
        assert (count(server, "stop"), count(server, "length")) == (1, 0)
    with running_server(FakeEngine(fail_after=1)) as server:
        httpx.post(f"{server.url}/completions", json={"prompt": "x", "n": 2, "max_tokens": 9})
        assert count(server, "error") + count(server, "abort") == 2


def test_refused_requests_leave_no_trace(server: RunningServer) -> None:
    httpx.post(f"{server.url}/completions", json={"prompt": [[9] * 300]})
    httpx.post(f"{server.url}/completions", json={"prompt": [[5000]]})
    samples = scrape(server)
    assert samples["vllm:prompt_tokens_total"] == samples["vllm:request_success_total"] == 0


def test_head_and_formats_and_no_redirect(server: RunningServer) -> None:
    head = httpx.head(f"{server.root}/metrics")
    assert (head.status_code, head.content) == (200, b"")
    assert httpx.get(f"{server.root}/metrics").headers["content-type"].startswith("text/plain; version=")
    accept = {"accept": "application/openmetrics-text; version=1.0.0"}
    text = httpx.get(f"{server.root}/metrics", headers=accept)
    assert text.headers["content-type"].startswith("application/openmetrics-text")
    assert text.text.endswith("# EOF\n")


def test_a_histogram_counts_values_up_to_its_bounds() -> None:
    histogram = Histogram("h", "about", (1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 3)):
        histogram.observe(value, times)
    values = {tuple(sample.labels.values()): sample.value for sample in histogram.family(("m", "0")).samples}
    assert values["m", "0", "1.0"] == 3
    assert values["m", "0", "2.0"] == 4
    assert values["m", "0", "+Inf"] == 7
    sums = [sample.value for sample in histogram.family(("m", "0")).samples if sample.name == "h_sum"]
    assert sums == [0.5 + 2.0 + 1.5 + 27.0]


def test_token_buckets_reach_the_context_length() -> None:
    assert token_buckets(256) == (1, 2, 5, 10, 20, 50, 100, 200)
    assert token_buckets(1) == (1,)


def test_tokens_that_come_together_share_the_time_since_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("miniserve.server.metrics.time.monotonic", lambda: now)
    metrics = ServerMetrics(FakeEngine(), Turns(1, 1, 1), "m")  # type: ignore[arg-type]
    record = RequestMetrics(metrics, 5, SamplingParams(max_tokens=9))
    for seconds, num_tokens in ((0.5, 2), (0.6, 4), (1.0, 1)):
        now += seconds
        last = num_tokens == 1
        record.observe(
            Completion(
                index=0,
                text="",
                token_ids=[1] * num_tokens,
                finish_reason=FinishReason.LENGTH if last else None,
                first_scheduled_time=100.1,
            )
        )
    record.close()

    def total(histogram: Histogram) -> tuple[float, float]:
        values = {sample.name.rsplit("_", 1)[1]: sample.value for sample in histogram.family(("m", "0")).samples}
        return round(values["sum"], 9), values["count"]

    assert total(metrics.ttft) == (0.5, 1)
    assert total(metrics.itl) == (1.6, 6)
    assert total(metrics.queue) == (0.1, 1)
    assert total(metrics.prefill) == (0.4, 1)
    assert total(metrics.decode) == (1.6, 1)
    assert total(metrics.inference) == (2.0, 1)
    assert total(metrics.e2e) == (2.1, 1)
    assert total(metrics.tpot) == (round(1.6 / 6, 9), 1)
    assert metrics.finished[FinishReason.ABORT] == 0
