"""Continuous batching with a token budget: every step mixes decode rows, extends and prefills as they come.

The order within a step: decode rows first, so that they never starve; then the sequences in the middle of their
prefill; then admissions, by priority (the lowest number first) and then by arrival. A priority is for the queue alone:
no running sequence makes room for one that waits, but those of a high number may wait for as long as others come. A
prompt longer than a step leaves a quarter of each of its steps to prompts behind it that fit into a step, so that these
need not wait for all of it. They may also pass waiting long prompts, as long as rows and blocks for those remain: no
request waits for room because of a later one. `StepCost` may limit the tokens of chunks beside decode rows.

A sequence is admitted once there are blocks for all it has to prefill; only decode rows allocate later, a block each
time they cross a block boundary. When blocks run out the sequence that was admitted last is preempted: its blocks are
freed, and it returns to its place in the queue, to be computed again. So the sequence that was admitted
first always makes progress: it could run alone (`check_lengths`).

Steps in flight. `schedule` may be called before the results of launched steps came back through `update`. This is
correct because the device runs the plans in order, and each plan applies its stops, starts and block tables before it
computes:
- A decode row needs no result: its last token is on the device. The scheduler only counts positions (`num_computed`),
  so it knows in advance which row samples its last token by length and never schedules it again.
- A sequence that ends otherwise (stop token, abort) leaves at once: row and blocks are free for the next plan, although
  steps in flight may still compute that row. Those steps write before the next plan's steps read or write, so the
  blocks' next owner overwrites their data; the next plan stops the row before it starts it again; and the results of
  such a row are skipped, since steps record sequences, not rows.
- A preempted sequence leaves in the same way, but keeps the tokens still in flight: it is not admitted again before
  they arrive, so nothing is sampled twice, and it may end while it waits.
- A full block may be found by other sequences from the next plan on, even before the step that fills it is done: only
  later plans read it. The plan of that same step must not, or a row would read what another row writes in the same
  step; hence `cache_full` comes last in `schedule`. Tokens must be known (they are the key), so a block that a decode
  row fills is cached when the row crosses into the next block. No row ever writes into a registered block: rows write
  at their next position, which lies behind all their full blocks, and a matched block is full.

Speculation needs a step's tokens to guess the next ones, so it allows one step in flight. Every decoding sequence then
computes a run: its last token, as always, and guesses behind it. Guesses use what a step does not need: spare rows,
spare tokens of the budget, and blocks beyond those that keep running sequences from being preempted. KV of wrong
guesses lies behind `num_computed`, where the next run writes.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress, takewhile

import msgspec

from miniserve.config import SchedulerConfig
from miniserve.core import (
    Chunk,
    FinishReason,
    InvalidRequest,
    Matcher,
    PoolView,
    Request,
    RequestOutput,
    RowStart,
    SchedulerStats,
    Step,
    StepPlan,
    StepRecord,
    TokenLogprobs,
)
from miniserve.scheduler.block_pool import sample
from miniserve.scheduler.blocks import SequenceBlocks
from miniserve.scheduler.limits import check_lengths
from miniserve.scheduler.sequence import Sequence
from miniserve.scheduler.speculation import Speculation
from miniserve.scheduler.step_cost import StepCost, StepShape

_SHARE = 4  # a prompt of several steps leaves 1 / _SHARE of each to prompts that fit into one step


@dataclass(slots=True, eq=False, kw_only=True)
class PlannedStep(Step):
    """A step and its sequences: `sampling` aligns with the plan's sampling rows, `chunked` with its chunks."""

    sampling: list[Sequence]
    chunked: list[Sequence]
    shape: StepShape

    def matchers(self) -> list[tuple[int, Matcher]]:
        """Of the plan's masked entries, those whose sequences still run, with their matchers."""
        found = [(entry, self.sampling[entry]) for entry in self.plan.masked]
        return [(entry, seq.matcher) for entry, seq in found if seq.matcher is not None and not seq.finished]


class Scheduler:
    """Decides what each step computes. Every plan it returns must be launched, and every result must come back through
    `update`, in the same order; requests may be added and aborted at any time between the calls."""

    def __init__(self, config: SchedulerConfig, cost: StepCost | None = None) -> None:
        self._config = config
        self._cost = cost or StepCost(0.0)
        self._blocks = SequenceBlocks(config)
        self._pool = self._blocks.pool
        self._sequences: dict[str, Sequence] = {}  # all unfinished ones
        self._waiting: OrderedDict[tuple[int, int], Sequence] = OrderedDict()  # by (priority, arrival), in this order
        self._running: dict[int, Sequence] = {}  # in the order of admission
        self._prefilling: list[Sequence] = []  # running, partly prefilled: one, and perhaps one that passes it
        self._decoding: list[Sequence] = []  # running, and decoding; shared with plans in flight, so never mutated
        self._decode_rows: list[int] = []
        self._planned_rows: list[int] = []  # decode_rows of the last plan
        self._decoding_changed = False
        self._free_rows = list(range(config.max_num_seqs))[::-1]
        self._stops: list[int] = []  # rows to stop in the next plan
        self._in_flight: deque[PlannedStep] = deque()
        self._blocks_wanted = 0  # free blocks that the head of the queue needed when last tried
        self._num_arrivals = 0
        self._num_updated = 0
        self._stats = SchedulerStats()  # its totals; `stats` adds the gauges
        self._speculation = Speculation(config.num_draft_tokens, self._stats)

    # --- requests come and go -------------------------------------------------------------------------------------

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queue a request, with the matcher of its grammar if it has one. Raises `InvalidRequest` if it could never
        finish, or its id is in use."""
        max_tokens = check_lengths(len(request.prompt_token_ids), request.params.max_tokens, self._config)
        if request.request_id in self._sequences:
            raise InvalidRequest(f"A request with the id {request.request_id!r} is already running.", "request_id")
        self._num_arrivals += 1
        seq = Sequence(request, self._num_arrivals, max_tokens, self._config.eos_token_ids, matcher)
        self._sequences[request.request_id] = seq
        later = list(takewhile(lambda order: order > seq.order, reversed(self._waiting)))
        self._waiting[seq.order] = seq
        if later:
            self._blocks_wanted = 0  # it may be the head
        for order in reversed(later):
            self._waiting.move_to_end(order)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request; its row and blocks are free for the next step. Returns its last output, or None if there is no
        such unfinished request (it may have ended already)."""
        seq = self._sequences.get(request_id)
        return None if seq is None else self._last_output(seq, FinishReason.ABORT)

    def has_work(self) -> bool:
        """Whether requests are unfinished or steps are in flight."""
        return bool(self._sequences or self._in_flight)

    def stats(self) -> SchedulerStats:
        return msgspec.structs.replace(
            self._stats,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_cache_usage=1.0 - self._pool.num_free / self._config.num_blocks,
        )

    def pool_view(self, max_blocks: int) -> PoolView:
        """At most `max_blocks` blocks of the pool. Looks at these and once at each sequence, whatever it holds."""
        stride = -(-self._config.num_blocks // max_blocks)
        return PoolView(
            stride=stride,
            owners=[self._blocks.owner(block) for block in sample(self._config.num_blocks, stride)],
            num_tokens={seq.row: seq.num_computed for seq in self._running.values()},
        )

    # --- what the next step computes ------------------------------------------------------------------------------

    def schedule(self) -> PlannedStep | None:
        """Plan the next step; None if nothing can be computed before a request or a result arrives."""
        if self._config.num_draft_tokens and self._in_flight:
            raise RuntimeError("Speculation allows one step in flight.")
        preemptions = self._stats.num_preemptions
        self._advance_decoding()
        # At least 0: each of these sequences had a token of the last step's budget.
        budget = self._config.max_num_batched_tokens - len(self._decoding)
        shape = StepShape(len(self._decoding), sum(seq.num_computed for seq in self._decoding))
        starts: list[RowStart] = []
        chunks, chunked = self._schedule_chunks(budget, shape, starts)
        budget -= shape.tokens
        if not self._decoding and not chunks:
            return None
        for seq in chunked:
            self._blocks.cache_full(seq)
        decoding, decode_rows, runs = self._decoding, self._decode_rows, []
        if self._config.num_draft_tokens:
            spare_rows = min(budget, self._config.max_num_seqs - len(decoding) - len(chunks))
            runs, decode_rows = self._speculation.draft(decoding, spare_rows, self._find_room), []
            decoding = [seq for seq, run in zip(decoding, runs, strict=True) for _ in run.token_ids]
        same_rows, self._planned_rows = decode_rows is self._planned_rows, decode_rows
        sampling = decoding + [seq for seq, chunk in zip(chunked, chunks, strict=True) if chunk.samples]
        masked = [entry for entry, seq in enumerate(sampling) if seq.matcher is not None]
        plan = StepPlan(self._stops, starts, self._blocks.take_new(), decode_rows, chunks, runs, same_rows, masked)
        if runs:
            shape.rows, shape.context = len(decoding), sum(plan.run_positions) + len(decoding)
        self._stops = []
        record = StepRecord(preemptions=self._stats.num_preemptions - preemptions)
        step = PlannedStep(plan, record, sampling=sampling, chunked=chunked, shape=shape)
        self._in_flight.append(step)
        self._stats.num_steps += 1
        return step

    def _schedule_chunks(
        self, budget: int, shape: StepShape, starts: list[RowStart]
    ) -> tuple[list[Chunk], list[Sequence]]:
        """Chunks of at most `budget` tokens, and the sequence of each. Admissions are added to `starts`, chunks to
        `shape`."""
        chunks: list[Chunk] = []
        chunked: list[Sequence] = []

        def add(seq: Sequence, most: int) -> int:
            chunk = self._next_chunk(seq, most)
            shape.add_chunk(chunk.start, len(chunk.token_ids))
            chunks.append(chunk)
            chunked.append(seq)
            return len(chunk.token_ids)

        while (room := budget - shape.tokens) and self._cost.chunk_tokens(shape, 0):
            seq = self._prefilling[0] if self._prefilling else self._admit_first(starts)
            if seq is None:
                break
            room = min(room, max(1, self._cost.chunk_tokens(shape, seq.num_computed)))
            remaining = seq.prefill_len - seq.num_computed
            if remaining > room:
                is_long = remaining > self._config.max_num_batched_tokens
                end = shape.tokens + room // _SHARE
                while shape.tokens < end and (short := self._find_passing(starts, is_long)) is not None:
                    room -= add(short, end - shape.tokens)
            add(seq, room)
            if seq.num_computed < seq.prefill_len:
                break
        return chunks, chunked

    def _advance_decoding(self) -> None:
        """Decide which sequences decode in this step, add the blocks they need for it and count their token."""
        if self._decoding_changed:
            self._collect_decoding()
        # In the order of arrival: a victim comes later than the sequence it makes room for, so it has no new block yet.
        for seq in [seq for seq in self._decoding if seq.num_computed == seq.limit]:
            if seq.num_computed == seq.end:
                self._decoding_changed = True
            elif seq.row >= 0:
                self._grow(seq)
        if self._decoding_changed:
            self._collect_decoding()
        for seq in self._decoding:
            seq.num_computed += 1

    def _collect_decoding(self) -> None:
        self._decoding = [seq for seq in self._running.values() if seq.prefill_len <= seq.num_computed < seq.end]
        self._decode_rows = [seq.row for seq in self._decoding]
        self._decoding_changed = False

    def _grow(self, seq: Sequence) -> None:
        """Add the next block to a decoding sequence; if none is free, preempt the latest arrivals, perhaps itself."""
        while not self._pool.num_free:
            victim = self._running[next(reversed(self._running))]
            self._preempt(victim)
            if victim is seq:
                return
        self._blocks.grow(seq, 1)

    def _find_room(self, seq: Sequence, count: int) -> int:
        """How many of `count` guesses fit, using free blocks beyond those that running sequences may need next."""
        missing = min(self._blocks.missing(seq, seq.num_computed + count), self._pool.num_free - len(self._running))
        if missing > 0:
            self._blocks.grow(seq, missing)
        return min(count, seq.limit - seq.num_computed)

    def _admit_first(self, starts: list[RowStart]) -> Sequence | None:
        """Admit the head of the queue if there is a row, and room for all it has to prefill.

        One more block for each running sequence must stay free, or a preemption would soon follow.
        """
        if not self._waiting or not self._free_rows:
            return None
        seq = next(iter(self._waiting.values()))
        growth = len(self._running)
        if seq.ready_step > self._num_updated or self._pool.num_free < self._blocks_wanted + growth:
            return None
        hits = self._blocks.find_prefix(seq)
        num_blocks = self._blocks.missing(seq, len(seq.token_ids))
        self._blocks_wanted = num_blocks - len(hits) + self._pool.count_free(hits)
        if self._pool.num_free < self._blocks_wanted + growth:
            return None
        return self._admit(seq, hits, starts)

    def _find_passing(self, starts: list[RowStart], may_admit: bool) -> Sequence | None:
        """The next prompt to pass the long one that is partly prefilled: one that fits into a step, from behind prompts
        that do not. Rows and blocks for these must remain, with one more block for each."""
        if len(self._prefilling) > 1:
            return self._prefilling[1]
        if not may_admit:
            return None
        rows, blocks = len(self._free_rows), self._pool.num_free - len(self._running)
        for seq in self._waiting.values():
            rows -= 1
            blocks -= self._blocks.missing(seq, len(seq.token_ids)) + 1
            if rows < 0 or blocks < 0 or seq.ready_step > self._num_updated:
                return None
            if len(seq.token_ids) <= self._config.max_num_batched_tokens:
                return self._admit(seq, self._blocks.find_prefix(seq), starts)
        return None

    def _admit(self, seq: Sequence, hits: list[int], starts: list[RowStart]) -> Sequence:
        """Start a waiting sequence, for which there is room. `hits`: the cached blocks of its prefix."""
        self._blocks_wanted = 0
        del self._waiting[seq.order]
        self._running[seq.arrival] = seq
        self._prefilling.append(seq)
        seq.row = self._free_rows.pop()
        starts.append(RowStart(seq.row, seq.request, seq.token_ids[seq.prompt_len :]))
        seq.prefill_len = len(seq.token_ids)
        self._blocks.start(seq, hits)
        if seq.num_preemptions:
            return seq
        seq.first_scheduled_time = time.monotonic()
        if self._blocks.uses_cache(seq):
            seq.num_cached_tokens = seq.num_computed
            self._stats.prefix_cache_queries += seq.prompt_len
            self._stats.prefix_cache_hits += seq.num_cached_tokens
        return seq

    def _next_chunk(self, seq: Sequence, budget: int) -> Chunk:
        start = seq.num_computed
        seq.num_computed = end = min(start + budget, seq.prefill_len)
        complete = end == seq.prefill_len
        if complete:
            self._prefilling.remove(seq)
            self._decoding_changed = True
        # Prompt logprobs are handed out with the first token, so here token_ids is the prompt and the slice ends with
        # it.
        targets = [] if seq.prompt_logprobs is None else seq.token_ids[start + 1 : end + 1]
        return Chunk(seq.row, start, seq.token_ids[start:end], complete and seq.max_len > seq.prompt_len, targets)

    def _preempt(self, seq: Sequence) -> None:
        self._leave(seq)
        seq.num_preemptions += 1
        self._stats.num_preemptions += 1
        seq.ready_step = self._stats.num_steps
        passed = list(takewhile(lambda order: order < seq.order, self._waiting))
        self._waiting[seq.order] = seq
        for order in [seq.order, *reversed(passed)]:
            self._waiting.move_to_end(order, last=False)
        self._blocks_wanted = 0

    def _leave(self, seq: Sequence) -> None:
        """Stop running: row and blocks are free at once."""
        del self._running[seq.arrival]
        self._blocks.release(seq)
        self._stops.append(seq.row)
        self._free_rows.append(seq.row)
        seq.row = -1
        self._decoding_changed = True
        if seq in self._prefilling:
            self._prefilling.remove(seq)

    # --- results of a step ---------------------------------------------------------------------------------------

    def update(self, step: PlannedStep) -> list[RequestOutput]:
        """Process the result of the earliest step in flight; returns an output for each request that got a token or
        ended. Raises `RuntimeError` for a result that does not match the step."""
        if not self._in_flight or self._in_flight[0] is not step:
            raise RuntimeError("Results must come in the order of their plans.")
        self._in_flight.popleft()
        if len(step.token_ids) != len(step.sampling):
            raise RuntimeError(f"A step that samples {len(step.sampling)} tokens returned {len(step.token_ids)}.")
        self._num_updated += 1
        outputs = self._take_chunks(step)
        step_tokens = 0
        logprobs = step.logprobs or [None] * len(step.sampling)
        entries: Iterable[tuple[Sequence, int, TokenLogprobs | None]] = zip(
            step.sampling, step.token_ids, logprobs, strict=True
        )
        if runs := step.plan.draft_runs:
            entries = compress(entries, self._speculation.verify(runs, step.sampling, step.token_ids))
        latest: Sequence | None = None
        for seq, token_id, entry in entries:
            if seq.finished:
                continue
            matcher = seq.matcher
            if matcher is not None and (matcher.ended or matcher.error):  # as was found before this token was drawn
                output = self._last_output(seq, _grammar_end(matcher))
                output.error = matcher.error
                outputs.append(output)
                continue
            token_ids = seq.token_ids
            token_ids.append(token_id)
            step_tokens += 1 if len(token_ids) > seq.prompt_len + 1 else seq.prompt_len + 1
            if seq is latest:  # behind a right guess
                output.new_token_ids.append(token_id)
            else:
                output, latest = seq.output([token_id]), seq
                outputs.append(output)
            if entry is not None:
                output.logprobs = [*(output.logprobs or ()), entry]
            if seq.prompt_logprobs is not None:
                output.prompt_logprobs = seq.prompt_logprobs
                seq.prompt_logprobs = None
            if token_id in seq.stop_ids and len(token_ids) >= seq.min_len:
                self._stop(seq, token_id, output)
                continue
            if matcher is not None:
                matcher.accept(token_id)
                if matcher.ended or matcher.error:
                    output.grammar_ended, output.error = matcher.ended, matcher.error
                    self._finish(seq, output, _grammar_end(matcher))
                    continue
            if len(token_ids) == seq.max_len:
                self._finish(seq, output, FinishReason.LENGTH)
        self._stats.step_tokens = step_tokens
        return outputs

    def observe(self, step: PlannedStep, seconds: float) -> None:
        """Learn from how long a step took, including the device's idle time before it."""
        self._cost.observe(step.shape, seconds)

    def _take_chunks(self, step: PlannedStep) -> list[RequestOutput]:
        """Append prompt logprobs, and end requests that want no token."""
        outputs = []
        for seq, chunk in zip(step.chunked, step.plan.chunks, strict=True):
            if seq.finished:
                continue
            if seq.prompt_logprobs is not None:
                entries = step.prompt_logprobs.get(chunk.row, [])
                if len(entries) != len(chunk.logprob_targets):
                    raise RuntimeError(
                        f"A chunk with {len(chunk.logprob_targets)} logprob targets returned {len(entries)}."
                    )
                # A chunk computed again after a preemption returns entries that are known already.
                seq.prompt_logprobs += entries[len(seq.prompt_logprobs) - 1 - chunk.start :]
            if seq.max_len == seq.prompt_len == chunk.start + len(chunk.token_ids):
                outputs.append(self._last_output(seq, FinishReason.LENGTH))
        return outputs

    def _last_output(self, seq: Sequence, reason: FinishReason) -> RequestOutput:
        """End a request without a token."""
        output = seq.output([])
        if seq.prompt_logprobs is not None and len(seq.prompt_logprobs) == seq.prompt_len:
            output.prompt_logprobs = seq.prompt_logprobs
        self._finish(seq, output, reason)
        return output

    def _stop(self, seq: Sequence, token_id: int, output: RequestOutput) -> None:
        is_eos = token_id in self._config.eos_token_ids and not seq.request.params.ignore_eos
        output.stop_token_id = None if is_eos else token_id
        self._finish(seq, output, FinishReason.STOP)

    def _finish(self, seq: Sequence, output: RequestOutput, reason: FinishReason) -> None:
        output.finish_reason = reason
        seq.finished = True
        del self._sequences[seq.request_id]
        if seq.row >= 0:
            self._leave(seq)
        else:
            del self._waiting[seq.order]
            self._blocks_wanted = 0


def _grammar_end(matcher: Matcher) -> FinishReason:
    return FinishReason.STOP if matcher.error is None else FinishReason.REFUSED
