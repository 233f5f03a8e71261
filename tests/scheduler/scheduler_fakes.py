"""A device for the scheduler's tests: a paged KV memory, and a "model" that reads nothing else.

As in a real model, what a position writes depends on its token and on all that the memory holds at the row's earlier
slots, and the next token depends on all of it. So a wrong block table, a stale or doubly owned block, a block found
after another prefix than its own, a chunk in the wrong place or a lost token changes what comes out.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from scheduler_integrity import check_integrity

from miniserve.config import SchedulerConfig
from miniserve.core import FinishReason, Request, RequestOutput, SamplingParams, Step, StepPlan, TokenLogprobs
from miniserve.scheduler.scheduler import PlannedStep, Scheduler
from miniserve.scheduler.step_cost import StepCost

VOCAB = 7
POISON = -1


def make_config(**changes: object) -> SchedulerConfig:
    defaults: dict[str, object] = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 256,
    }
    return SchedulerConfig(**(defaults | changes))  # type: ignore[arg-type]


def make_request(request_id: str, prompt: list[int], **params: object) -> Request:
    return Request(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(**params))  # type: ignore[arg-type]


def stop_ids_of(request: Request, config: SchedulerConfig) -> set[int]:
    params = request.params
    return set(params.stop_token_ids) | (set() if params.ignore_eos else set(config.eos_token_ids))


def read(context: int, kv: int) -> int:
    """A context is the hash of all KV entries up to a position; 0 before the first."""
    return hash((context, kv))


def kv_of(context: int, token: int) -> int:
    return hash((context, token, 3))


def context_of(tokens: list[int]) -> int:
    """By definition, without a memory."""
    context = 0
    for token in tokens:
        context = read(context, kv_of(context, token))
    return context


def next_token(context: int, num_outputs: int, request: Request, config: SchedulerConfig) -> int:
    """What the model says after `context`; stop tokens are masked until min_tokens are out, as the sampler does."""
    token = hash((context, 17)) % VOCAB
    if num_outputs < request.params.min_tokens:
        masked = stop_ids_of(request, config)
        while token in masked:
            token = (token + 1) % VOCAB
    return token


def logprobs_at(context: int, token: int) -> TokenLogprobs:
    return TokenLogprobs(token, -float(hash((context, 5)) % 1000), 1, [], [])


def max_tokens_of(request: Request, config: SchedulerConfig) -> int:
    asked = request.params.max_tokens
    prompt_len = len(request.prompt_token_ids)
    if asked is None:
        return min(config.max_model_len, config.num_blocks * config.block_size) - prompt_len
    return min(asked, config.max_model_len - prompt_len)


@dataclass
class Expected:
    token_ids: list[int]
    finish_reason: FinishReason
    stop_token_id: int | None
    logprobs: list[TokenLogprobs] | None
    prompt_logprobs: list[TokenLogprobs | None] | None


def expected_of(request: Request, config: SchedulerConfig) -> Expected:
    """What the request yields by definition: no scheduler, no blocks, no batch."""
    prompt = request.prompt_token_ids
    tokens = list(prompt)
    reason, stop_token = FinishReason.LENGTH, None
    logprobs = []
    context = context_of(prompt)
    for count in range(max_tokens_of(request, config)):
        token = next_token(context, count, request, config)
        logprobs.append(logprobs_at(context, token))
        tokens.append(token)
        context = read(context, kv_of(context, token))
        if token in stop_ids_of(request, config):
            is_eos = token in config.eos_token_ids and not request.params.ignore_eos
            reason, stop_token = FinishReason.STOP, None if is_eos else token
            break
    prompt_logprobs = None
    if request.params.prompt_logprobs is not None:
        prompt_logprobs = [None, *(logprobs_at(context_of(prompt[:i]), prompt[i]) for i in range(1, len(prompt)))]
    return Expected(
        tokens[len(prompt) :],
        reason,
        stop_token,
        None if request.params.logprobs is None else logprobs,
        prompt_logprobs,
    )


@dataclass
class Row:
    request: Request
    token_ids: list[int]  # prompt, and output where it was preempted
    table: list[int] = field(default_factory=list)
    seq_len: int = 0
    num_outputs: int = 0
    last_token: int | None = None  # on the device: sampled, not yet computed
    sampled: dict[int, int] = field(default_factory=dict)  # the token last sampled for each position
    fresh: bool = True


class FakeRunner:
    """Applies plans as the contract in `core.StepPlan` says, and refuses everything it does not allow."""

    def __init__(self, config: SchedulerConfig, seed: int = 0) -> None:
        self.config = config
        self.memory = [POISON] * (config.num_blocks * config.block_size)
        self.rows: dict[int, Row] = {}
        self.random = random.Random(seed)
        self.first_starts: list[str] = []
        self.computed_tokens = 0

    def launch(self, step: Step) -> None:
        """The step has its result when this returns."""
        plan = step.plan
        assert 0 < plan.num_tokens <= self.config.max_num_batched_tokens
        self.computed_tokens += plan.num_tokens
        for row in plan.stops:
            del self.rows[row]
        for start in plan.starts:
            assert 0 <= start.row < self.config.max_num_seqs and start.row not in self.rows
            tokens = start.request.prompt_token_ids + start.output_token_ids
            self.rows[start.row] = Row(start.request, tokens, num_outputs=len(start.output_token_ids))
            if start.request.request_id not in self.first_starts:
                self.first_starts.append(start.request.request_id)
        chunk_starts = {chunk.row: chunk.start for chunk in plan.chunks}
        for row, index, blocks in plan.new_blocks:
            self._extend_table(self.rows[row], index, blocks, chunk_starts.get(row))
        self._check_everyone_gets_on(plan)
        self._compute(step, plan)

    def _extend_table(self, row: Row, index: int, blocks: list[int], chunk_start: int | None) -> None:
        assert index == len(row.table)
        row.table += blocks
        size = self.config.block_size
        num_cached = chunk_start // size if row.fresh and chunk_start is not None else 0
        for block in blocks[num_cached:]:
            self.memory[block * size : (block + 1) * size] = [POISON] * size

    def _check_everyone_gets_on(self, plan: StepPlan) -> None:
        """No running sequence waits for another one, but for a prompt that passes a long one and then has no share."""
        chunk_rows = [chunk.row for chunk in plan.chunks]
        decoding = plan.decode_rows + [run.row for run in plan.draft_runs]
        working = decoding + chunk_rows
        assert len(set(working)) == len(working)
        idle = 0
        for number, row in self.rows.items():
            if row.last_token is None:
                complete = not row.fresh and row.seq_len == len(row.token_ids)
                assert not (number in chunk_rows and complete)
                idle += number not in chunk_rows and not complete
            else:
                finished = row.num_outputs == max_tokens_of(row.request, self.config)
                finished = finished and not self.config.num_draft_tokens  # guesses count there, right or wrong
                assert (number in decoding) != finished
        assert idle <= (1 if chunk_rows else 0)

    def _compute(self, step: Step, plan: StepPlan) -> None:
        work: list[tuple[int, int, list[int]]] = []
        for number in plan.decode_rows:
            row = self.rows[number]
            assert row.last_token is not None
            work.append((number, row.seq_len, [row.last_token]))
        for run in plan.draft_runs:
            assert run.token_ids[0] == self.rows[run.row].sampled[run.start]
            assert run.start <= self.rows[run.row].seq_len
            work.append((run.row, run.start, run.token_ids))
        for chunk in plan.chunks:
            row = self.rows[chunk.row]
            assert chunk.start == row.seq_len or (row.fresh and chunk.start % self.config.block_size == 0)
            end = chunk.start + len(chunk.token_ids)
            assert chunk.token_ids and chunk.token_ids == row.token_ids[chunk.start : end]
            wanted = max_tokens_of(row.request, self.config) > 0
            assert chunk.samples == (end == len(row.token_ids) and wanted)
            row.fresh = False
            work.append((chunk.row, chunk.start, chunk.token_ids))
        # Rows of one step may not depend on each other: compute them in any order.
        self.random.shuffle(work)
        for number, start, tokens in work:
            self._write(number, start, tokens)
        step.prompt_logprobs = {
            chunk.row: self._prompt_logprobs(chunk.row, chunk.start, chunk.logprob_targets)
            for chunk in plan.chunks
            if chunk.logprob_targets
        }
        assert len(plan.sampling_rows) <= self.config.max_num_seqs
        if plan.draft_runs:
            ends = [(run.row, run.start + i) for run in plan.draft_runs for i in range(1, len(run.token_ids) + 1)]
        else:
            ends = [(number, self.rows[number].seq_len) for number in plan.decode_rows]
        ends += [(chunk.row, self.rows[chunk.row].seq_len) for chunk in plan.chunks if chunk.samples]
        assert [number for number, _ in ends] == plan.sampling_rows
        sampled = [self._sample(number, length) for number, length in ends]
        step.token_ids = [token for token, _ in sampled]
        if any(entry is not None for _, entry in sampled):
            step.logprobs = [entry for _, entry in sampled]

    def _slots(self, row: Row) -> list[int]:
        size = self.config.block_size
        return [row.table[i // size] * size + i % size for i in range(row.seq_len)]

    def _write(self, number: int, start: int, tokens: list[int]) -> None:
        row = self.rows[number]
        row.seq_len = start + len(tokens)
        slots = self._slots(row)[start:]
        written = {slot // self.config.block_size for slot in slots}
        for other, holder in self.rows.items():
            assert other == number or not written & set(holder.table), "a row writes into another one's block"
        context = self._read(number, start)
        for slot, token in zip(slots, tokens, strict=True):
            self.memory[slot] = kv_of(context, token)
            context = read(context, self.memory[slot])

    def _read(self, number: int, length: int) -> int:
        context = 0
        for slot in self._slots(self.rows[number])[:length]:
            assert self.memory[slot] != POISON, "a row reads what nobody wrote"
            context = read(context, self.memory[slot])
        return context

    def _sample(self, number: int, length: int) -> tuple[int, TokenLogprobs | None]:
        """The token that follows the row's first `length` ones."""
        row = self.rows[number]
        row.num_outputs = length - len(row.request.prompt_token_ids)
        context = self._read(number, length)
        token = next_token(context, row.num_outputs, row.request, self.config)
        row.num_outputs += 1
        row.last_token = row.sampled[length] = token
        return token, None if row.request.params.logprobs is None else logprobs_at(context, token)

    def _prompt_logprobs(self, number: int, start: int, targets: list[int]) -> list[TokenLogprobs]:
        row = self.rows[number]
        assert row.request.params.prompt_logprobs is not None
        assert targets == row.request.prompt_token_ids[start + 1 : row.seq_len + 1]
        return [logprobs_at(self._read(number, start + 1 + i), target) for i, target in enumerate(targets)]


@dataclass
class Oracle:
    """A drafter that knows the model, and lies now and then."""

    token_ids: list[int]
    share: float
    random: random.Random

    def draft(self, count: int) -> list[int]:
        context, guesses = context_of(self.token_ids), []
        for _ in range(self.random.randint(0, count)):
            token = hash((context, 17)) % VOCAB
            if self.random.random() >= self.share:
                token = (token + self.random.randrange(1, VOCAB)) % VOCAB
            guesses.append(token)
            context = read(context, kv_of(context, token))
        return guesses


class Driver:
    """The engine's loop in small: keeps up to `depth` steps in flight (1: each step's result is awaited)."""

    def __init__(
        self,
        config: SchedulerConfig,
        depth: int = 1,
        seed: int = 0,
        cost: StepCost | None = None,
        right_guesses: float | None = None,
    ) -> None:
        self.config = config
        self.depth = depth
        self.right_guesses = right_guesses
        self.random = random.Random(seed)
        self.scheduler = Scheduler(config, cost)
        self.runner = FakeRunner(config, seed)
        self.in_flight: deque[PlannedStep] = deque()
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.plans: list[StepPlan] = []
        self.prompt_lens: dict[str, int] = {}
        self.begun: set[str] = set()  # requests that got a token

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.prompt_lens[request.request_id] = len(request.prompt_token_ids)
        self.begun.discard(request.request_id)
        self.outputs[request.request_id] = []
        seq = self.scheduler._sequences[request.request_id]
        if self.right_guesses is not None and seq.drafter is not None:
            seq.drafter = Oracle(seq.token_ids, self.right_guesses, self.random)  # type: ignore[assignment]

    def abort(self, request_id: str) -> None:
        output = self.scheduler.abort(request_id)
        if output is not None:
            self.outputs[request_id].append(output)
        check_integrity(self.scheduler)

    def launch(self) -> StepPlan | None:
        step = self.scheduler.schedule()
        check_integrity(self.scheduler)
        if step is None:
            return None
        self.plans.append(step.plan)
        self.in_flight.append(step)
        self.runner.launch(step)
        return step.plan

    def collect(self) -> None:
        outputs = self.scheduler.update(self.in_flight.popleft())
        generated = sum(len(output.new_token_ids) for output in outputs)
        firsts = {output.request_id for output in outputs if output.new_token_ids} - self.begun
        self.begun |= firsts
        prompt_tokens = sum(self.prompt_lens[request_id] for request_id in firsts)
        assert self.scheduler.stats().step_tokens == prompt_tokens + generated
        for output in outputs:
            assert not any(earlier.finish_reason for earlier in self.outputs[output.request_id])
            self.outputs[output.request_id].append(output)
        check_integrity(self.scheduler)

    def turn(self) -> None:
        plan = self.launch()
        assert plan is not None or self.in_flight or not self.scheduler.has_work(), "the scheduler is stuck"
        while self.in_flight and (plan is None or len(self.in_flight) >= self.depth):
            self.collect()
            if plan is None:
                break

    def drain(self, max_turns: int = 10_000) -> None:
        for _ in range(max_turns):
            if not self.scheduler.has_work():
                return
            self.turn()
        raise AssertionError("requests do not end")

    def tokens_of(self, request_id: str) -> list[int]:
        return [token for output in self.outputs[request_id] for token in output.new_token_ids]

    def check_against_definition(self, request: Request) -> None:
        """Everything that came out for an unaborted request is what the definition says."""
        outputs = self.outputs[request.request_id]
        expected = expected_of(request, self.config)
        assert self.tokens_of(request.request_id) == expected.token_ids
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == (
            expected.finish_reason,
            expected.stop_token_id,
        )
        if expected.logprobs is None:
            assert all(output.logprobs is None for output in outputs)
        else:
            assert [entry for output in outputs for entry in output.logprobs or []] == expected.logprobs
        assert outputs[0].prompt_logprobs == expected.prompt_logprobs
        assert all(output.prompt_logprobs is None for output in outputs[1:])
