"""The step log against runners that count for themselves."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass, field

import pytest
from engine_fakes import FACTORY, TINY, FakeRunner

from miniserve.config import EngineConfig, SchedulerConfig
from miniserve.core import Request, SamplingParams, Step, StepPlan, StepTotals, StepTraffic
from miniserve.engine.client import AsyncEngine, EngineDead
from miniserve.engine.loop import EngineLoop
from miniserve.engine.roofline import describe, hidden_share, kv_bytes, share_of_bandwidth, weight_bytes
from miniserve.engine.step_log import RING_SIZE, StepLog
from miniserve.scheduler.scheduler import Scheduler

WINDOWS = StepTraffic(weights=1000, kv=[(None, 10), (7, 3), (12, 2)], bandwidth=1e6)


@dataclass
class CountingRunner(FakeRunner):
    """Knows each row's context from what it is given, and notes the bytes that each step reads."""

    expected: list[tuple[int, int, int]] = field(default_factory=list)  # decode rows, tokens, bytes of cache

    def launch(self, step: Step) -> None:
        super().launch(step)
        plan = step.plan
        rows = [*plan.decode_rows, *(chunk.row for chunk in plan.chunks)]
        read = sum(kv_bytes(WINDOWS, self._rows[row].num_computed) for row in rows)
        read += sum(kv_bytes(WINDOWS, position + 1) for position in plan.run_positions)
        self.expected.append((plan.num_decode_tokens, plan.num_tokens, read))


def run(
    runner: FakeRunner, traffic: StepTraffic | None, *, overlap: bool, num_blocks: int = 12, drafts: int = 0
) -> EngineLoop:
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=8,
        max_model_len=40,
        num_draft_tokens=drafts,
    )
    loop = EngineLoop(Scheduler(config), runner, StepLog(traffic, 4), overlap=overlap)
    for index in range(6):
        params = SamplingParams(max_tokens=14 + index)
        loop.add(Request(request_id=f"{index}", prompt_token_ids=list(range(3 + 2 * index)), params=params))
    while loop.has_work:
        loop.step()
    return loop


@pytest.mark.parametrize(("overlap", "drafts"), [(False, 0), (True, 0), (False, 3)])
def test_every_step_is_logged_with_what_it_read(overlap: bool, drafts: int) -> None:
    runner = CountingRunner(block_size=4)
    log = run(runner, WINDOWS, overlap=overlap, drafts=drafts).log
    records = log.records()
    assert [(record.rows, record.tokens, record.kv_bytes) for record in records] == runner.expected
    assert {record.kind for record in records} == {"prefill", "decode", "mixed"}
    for record in records:
        assert record.kind == ("prefill" if not record.rows else "mixed" if record.chunks else "decode")
        assert record.weight_bytes == 1000
        assert min(record.schedule, record.launch, record.wait, record.update) > 0
        assert record.wait_start >= record.schedule + record.launch
    assert [record.number for record in records] == list(range(len(records)))
    starts = [record.start for record in records]
    assert starts == sorted(starts)
    assert sum(record.preemptions for record in records) > 0
    decoding = [record for record in records if record.kind == "decode"]
    assert log.totals.decode_steps == len(decoding)
    assert log.totals.decode_rows == sum(record.rows for record in decoding)
    assert log.totals.kv_bytes == sum(record.kv_bytes or 0 for record in decoding)
    for kind in ("mixed", "prefill"):
        assert getattr(log.totals, f"{kind}_steps") == sum(record.kind == kind for record in records)
    assert log.totals.prefill_tokens == sum(record.tokens - record.rows for record in records)
    assert log.records(3) == records[-3:] and log.records(0) == []


def test_the_ring_is_bounded_and_the_sums_are_not() -> None:
    log = StepLog(None, 1)
    for _ in range(RING_SIZE + 10):
        step = Step(StepPlan([], [], [], [0], []))
        log.open(step)
        log.close(step)
    records = log.records()
    assert len(records) == RING_SIZE
    assert (records[0].number, records[-1].number) == (10, RING_SIZE + 9)
    assert (records[0].weight_bytes, records[0].kv_bytes) == (None, None)
    assert log.totals.decode_steps == RING_SIZE + 10


@dataclass
class TimedRunner(FakeRunner):
    """With a device's clock: each step takes 3 ms, 1 ms after the one before; graphs have four rows."""

    def collect(self, step: Step) -> None:
        super().collect(step)
        step.record.bucket, step.record.device, step.record.idle = 4, 0.003, 0.001


def test_the_devices_clock_is_believed_where_there_is_one() -> None:
    totals = run(TimedRunner(block_size=4), WINDOWS, overlap=True, num_blocks=64).log.totals
    assert totals.decode_seconds == pytest.approx(0.004 * totals.decode_steps)
    assert totals.padded_rows == 4 * totals.decode_steps - totals.decode_rows
    assert totals.timed_idle == pytest.approx(0.001 * totals.decode_steps)
    assert totals.timed_host > 0


def test_the_time_at_rest_is_not_idle() -> None:
    loop = run(TimedRunner(block_size=4), None, overlap=True)
    loop.add(Request(request_id="late", prompt_token_ids=[1, 2], params=SamplingParams(max_tokens=3)))
    while loop.has_work:
        loop.step()
    assert [record.idle for record in loop.log.records(3)] == [None, 0.001, 0.001]
    assert loop.log.records()[0].idle is None


def test_tokens_meet_the_expected_number_of_experts() -> None:
    sparse = StepTraffic(weights=100, expert=10, num_experts=128, top_k=8, kv=[])
    assert weight_bytes(sparse, 1) == 100 + 8 * 10
    assert weight_bytes(sparse, 8) == 100 + round(10 * 128 * (1 - (1 - 8 / 128) ** 8))
    assert weight_bytes(sparse, 100_000) == 100 + 128 * 10
    assert weight_bytes(StepTraffic(weights=100, kv=[]), 8) == 100
    assert kv_bytes(WINDOWS, 9) == 9 * 10 + 7 * 3 + 9 * 2


def test_the_line_says_how_near_the_limit_it_is() -> None:
    totals = StepTotals(
        decode_steps=10,
        decode_seconds=0.061,
        weight_bytes=106 * 10**9,
        kv_bytes=24 * 10**9,
        timed_host=0.05,
        timed_idle=0.001,
    )
    line = "step 6.1 ms · 71 % of 3.0 TB/s · weights 82 % KV 18 % · CPU hidden 98 %"
    assert describe(totals, 3.0e12) == line
    assert share_of_bandwidth(totals, 3.0e12) == pytest.approx(130e9 / 0.061 / 3.0e12)
    assert hidden_share(totals) == pytest.approx(0.98)
    assert describe(totals, None) == "step 6.1 ms · 2.1 TB/s read · weights 82 % KV 18 % · CPU hidden 98 %"
    slow = StepTotals(decode_steps=2, decode_seconds=0.6, weight_bytes=2 * 10**9)
    assert describe(slow, 1.5e10) == "step 300 ms · 22 % of 15.0 GB/s · weights 100 % KV 0 %"
    ranks = StepTotals(decode_steps=1, decode_seconds=0.02, weight_bytes=6 * 10**9, kv_bytes=10**9, sum_seconds=0.003)
    assert describe(ranks, 1.0e12) == "step 20 ms · 35 % of 1.0 TB/s · weights 60 % KV 10 % sums 30 %"
    assert describe(ranks, None) == "step 20 ms · 350.0 GB/s read · weights 86 % KV 14 %"
    assert describe(StepTotals(mixed_steps=3), 3.0e12) is None
    assert describe(StepTotals(decode_steps=1, decode_seconds=0.002), None) == "step 2 ms"
    assert share_of_bandwidth(StepTotals(), 1.0) is None and hidden_share(StepTotals()) is None


def test_a_period_is_the_difference_of_its_ends() -> None:
    early = StepTotals(decode_steps=3, decode_seconds=1.0, kv_bytes=5)
    late = StepTotals(decode_steps=7, decode_seconds=1.5, kv_bytes=9, mixed_steps=1)
    assert late.since(early) == StepTotals(decode_steps=4, decode_seconds=0.5, kv_bytes=4, mixed_steps=1)


def test_an_engine_that_dies_leaves_nobody_waiting_for_its_answers() -> None:
    async def body() -> None:
        engine = AsyncEngine(EngineConfig(), TINY, "fake?step_seconds=60", runner_factory=FACTORY)
        await engine.start()
        records, view, _ = await asyncio.gather(engine.steps(5), engine.pool_view(9), engine.steps(5))
        assert records == [] and view.owners == [-1] * 8 and view.stride == 8
        stream = engine.generate(
            Request(request_id="a", prompt_token_ids=[1, 2, 3], params=SamplingParams(max_tokens=5))
        )
        await asyncio.sleep(0.5)  # from now on it is busy with the first step
        readers = [asyncio.create_task(ask(5)) for ask in (engine.steps, engine.steps, engine.pool_view)]
        await asyncio.sleep(0.05)
        readers[0].cancel()
        assert engine._process is not None
        os.kill(engine._process.pid, signal.SIGKILL)
        for outcome in await asyncio.gather(*readers[1:], return_exceptions=True):
            assert isinstance(outcome, EngineDead)
        stream.close()
        with pytest.raises(EngineDead):
            await engine.steps(5)
        await engine.shutdown()

    asyncio.run(body())
