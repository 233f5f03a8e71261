"""Cost of the scheduler and the step log per decode step, without model or device: `python -m benchmarks.scheduler`."""

from __future__ import annotations

import time
from collections import deque
from statistics import median, quantiles

from miniserve.config import SchedulerConfig
from miniserve.core import Request, RequestOutput, SamplingParams, Step, StepPlan, StepTraffic
from miniserve.engine.step_log import StepLog
from miniserve.scheduler.scheduler import PlannedStep, Scheduler

BLOCK_SIZE = 16
PROMPT_LEN = 100
WARMUP_STEPS = 200


def measure(num_requests: int, depth: int, num_steps: int, output_len: int | None = None) -> list[float]:
    """Seconds of `schedule` + `update`, step by step, for `num_requests` running requests with `depth` steps in flight
    (1: each result is awaited; 2: overlapped).

    Without `output_len` all of them decode throughout (steady state); with it a request ends after 1 to 2 × that many
    tokens and a new one takes its place (churn).
    """
    max_model_len = PROMPT_LEN + WARMUP_STEPS + num_steps + 64
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_requests * (max_model_len // BLOCK_SIZE + 2),
            block_size=BLOCK_SIZE,
            max_num_seqs=num_requests,
            max_num_batched_tokens=2048,
            max_model_len=max_model_len,
            eos_token_ids=frozenset({0}),
        )
    )
    arrivals = 0

    def add() -> None:
        nonlocal arrivals
        arrivals += 1
        max_tokens = None if output_len is None else output_len + arrivals * 37 % output_len
        prompt = [arrivals * 7919 + i for i in range(PROMPT_LEN + arrivals % BLOCK_SIZE)]
        params = SamplingParams(max_tokens=max_tokens)
        scheduler.add(Request(request_id=f"request-{arrivals}", prompt_token_ids=prompt, params=params))

    for _ in range(num_requests):
        add()
    in_flight: deque[PlannedStep] = deque()
    durations: list[float] = []
    while len(durations) < WARMUP_STEPS + num_steps:
        started = time.perf_counter()
        step = scheduler.schedule()
        scheduled = time.perf_counter()
        if step is not None:
            in_flight.append(step)
        outputs: list[RequestOutput] = []
        updated = scheduled
        if len(in_flight) >= depth or step is None:
            done = in_flight.popleft()
            done.token_ids = list(range(1000, 1000 + len(done.plan.sampling_rows)))
            collected = time.perf_counter()
            outputs = scheduler.update(done)
            updated = time.perf_counter() - collected + scheduled
        durations.append(updated - started)
        for output in outputs:
            if output.finish_reason is not None:
                add()
    return durations[WARMUP_STEPS:]


def measure_log(num_requests: int, num_steps: int) -> list[float]:
    """Seconds of the step log per step of `num_requests` rows, whose set changes every 20 steps."""
    traffic = StepTraffic(weights=10**9, expert=10**6, num_experts=128, top_k=8, kv=[(None, 4096), (1024, 4096)])
    log = StepLog(traffic, num_requests)
    durations = []
    for number in range(WARMUP_STEPS + num_steps):
        plan = StepPlan([], [], [], list(range(num_requests)), [], same_rows=number % 20 > 0)
        started = time.perf_counter()
        step, clock = Step(plan), log.clock
        record = step.record
        start, scheduled = clock(), clock()
        record.start, record.schedule, record.launch = start, scheduled - start, clock() - scheduled
        log.open(step)
        wait_start, collected = clock(), clock()
        record.bucket, record.device, record.idle = num_requests, 1e-3, 1e-5
        record.wait_start, record.wait = wait_start - start, collected - wait_start
        record.update = clock() - collected
        log.close(step)
        durations.append(time.perf_counter() - started)
    return durations[WARMUP_STEPS:]


def main() -> None:
    print("schedule + update, microseconds per step")
    print(f"{'requests':>8}  {'load':<12}  {'loop':<10}  {'median':>7}  {'p99':>7}")
    for num_requests in (1, 64, 256):
        for load, output_len in (("steady", None), ("churn", 128)):
            for loop, depth in (("plain", 1), ("overlapped", 2)):
                durations = [1e6 * duration for duration in measure(num_requests, depth, 2000, output_len)]
                p99 = quantiles(durations, n=100)[-1]
                print(f"{num_requests:>8}  {load:<12}  {loop:<10}  {median(durations):>7.1f}  {p99:>7.1f}")
        durations = [1e6 * duration for duration in measure_log(num_requests, 2000)]
        print(
            f"{num_requests:>8}  {'step log':<24}  {median(durations):>7.1f}  {quantiles(durations, n=100)[-1]:>7.1f}"
        )


if __name__ == "__main__":
    main()
