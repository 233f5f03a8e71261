"""The vocabulary of the engine: what rooms say to each other. Imports nothing from above and no torch.

What crosses the process boundary is a msgspec struct; what stays inside one process is a dataclass.
"""

from __future__ import annotations

import enum
import functools
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, get_type_hints

import msgspec

MAX_BAD_WORD = 32  # tokens


class UserError(Exception):
    """Something the user asked for cannot be done; `str(error)` says so with its remedy. The CLI exits 2 with it."""


def summary(error: Exception) -> str:
    """The error's kind and first line: what a library raises may be pages long."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class InvalidRequest(ValueError):
    """A request that is refused. The server answers 400 with `str(error)`, `param`, the field at fault, and `code`, a
    word that programs may test for."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


_field_types: Any = functools.cache(get_type_hints)


def check_types(instance: object) -> None:
    """Hold every field to its annotation: True is no number, "5" neither. Raises `InvalidRequest`."""
    for name, kind in _field_types(type(instance)).items():
        try:
            msgspec.convert(getattr(instance, name), kind)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"{name}: {str(error).replace('`', '').replace('null', 'None')}.", name) from None


class FinishReason(enum.StrEnum):
    STOP = "stop"  # an EOS token, a stop token or a stop string
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"  # the client went away
    ERROR = "error"  # the engine failed; RequestOutput.error says why
    REFUSED = "refused"  # on the way it turned out that the request cannot be followed; likewise


class Reasoning(msgspec.Struct, frozen=True):
    """An output may begin with reasoning: with `begin`, unless the prompt `is_open`, that is ends with it. What follows
    `end`, or an output that begins otherwise, is the answer proper."""

    begin: str
    end: str
    is_open: bool


class Grammar(msgspec.Struct, frozen=True):
    """What the output must be. `text` is, by `kind`: a JSON schema; a regular expression that all of the output must
    match; a JSON list of strings to choose from; a grammar (Lark, or llama.cpp's GBNF); or, for structural_tag, JSON:

    {"tags": [{"begin": str, "schema": {...}, "end": str}], "triggers": [str], "at_least_one": bool,
    "stop_after_first": bool}, the last three of which may be left out. The output is free text until a tag's `begin`
    appears; then comes JSON by its schema, then its `end`, then free text again or, with `stop_after_first`, nothing.
    With `triggers`, of which each `begin` starts with one, a tag must follow as soon as a trigger appears.
    `at_least_one`: the output starts with a tag. For calls it is what `engine/tool_grammar.py` makes.
    """

    kind: Literal["json_schema", "regex", "choice", "grammar", "structural_tag", "calls"]
    text: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen and when generation stops.

    temperature 0 is greedy. top_k 0 or -1, top_p 1 and min_p 0 turn the filter off. `logprobs` is the number of
    alternatives beside the chosen token (0: the chosen token alone; None: no logprobs); `prompt_logprobs` likewise for
    the prompt. `logprob_token_ids`: whatever `logprobs` counts, the alternatives are these, in this order, instead of
    the most likely. `allowed_token_ids`: no other is drawn; None allows all. `bad_words`: sequences of tokens that the
    output never holds. `max_tokens` None means up to the context limit. `seed` makes the tokens depend on the prompt
    and these parameters alone. `grammar`: what the output must be; EOS comes where it may end (not before `min_tokens`
    and, with `ignore_eos`, not at all), and where nothing else may follow the request ends. Stop strings and the
    grammar count outside `reasoning`. `shown_special_tokens` are ids that `skip_special_tokens` does not hide. Raises
    `InvalidRequest` naming the field for a value of the wrong type or out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    n: int = 1
    logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    grammar: Grammar | None = None
    shown_special_tokens: tuple[int, ...] = ()
    reasoning: Reasoning | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):  # as OpenAI takes it; a tuple of its characters would not be meant
            msgspec.structs.force_setattr(self, "stop", (self.stop,))
        check_types(self)
        _check(math.isfinite(self.temperature) and 0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        _check(self.top_k >= -1, "top_k", "-1 or 0 (off) or a positive integer")
        _check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        _check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        # Much smaller ones would make logits infinite.
        _check(0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty", "between 0.01 and 100")
        _check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "between -2 and 2")
        _check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "between -2 and 2")
        _check(self.seed is None or -(2**63) <= self.seed < 2**63, "seed", "a 64-bit integer")
        _check(self.min_tokens >= 0, "min_tokens", "0 or more")
        _check(self.max_tokens is None or self.max_tokens >= 0, "max_tokens", "0 or more")
        _check(self.max_tokens is None or self.min_tokens <= self.max_tokens, "min_tokens", "at most max_tokens")
        _check(1 <= self.n <= 128, "n", "between 1 and 128")
        _check(self.logprobs is None or self.logprobs >= 0, "logprobs", "0 or more")
        _check(self.prompt_logprobs is None or self.prompt_logprobs >= 0, "prompt_logprobs", "0 or more")
        _check(all(s for s in self.stop), "stop", "made of non-empty strings")
        # Each is looked for after every token, by the process that serves all requests.
        _check(len(self.stop) <= 256, "stop", "at most 256 strings")
        # Each of a request's sequences has these for itself.
        _check(len(self.stop_token_ids) <= 1024, "stop_token_ids", "at most 1024 ids")
        _check(len(self.logit_bias or {}) <= 1024, "logit_bias", "a map of at most 1024 token ids")
        allowed = self.allowed_token_ids
        _check(allowed is None or 1 <= len(allowed) <= 8192, "allowed_token_ids", "1 to 8192 ids")
        _check(len(self.bad_words) <= 512, "bad_words", "at most 512 sequences of tokens")
        longest = f"made of sequences of 1 to {MAX_BAD_WORD} tokens"
        _check(all(1 <= len(word) <= MAX_BAD_WORD for word in self.bad_words), "bad_words", longest)
        num_asked = len(self.logprob_token_ids)
        _check(num_asked == len(set(self.logprob_token_ids)) <= 128, "logprob_token_ids", "at most 128 different ids")
        if num_asked and (self.logprobs is None or self.max_tokens == 0):
            raise InvalidRequest("logprob_token_ids needs logprobs, and tokens to generate.", "logprob_token_ids")
        for token_id, bias in (self.logit_bias or {}).items():
            if not (token_id >= 0 and -100.0 <= bias <= 100.0):
                raise InvalidRequest(
                    f"logit_bias must map token ids to numbers between -100 and 100, not {token_id} to {bias}.",
                    "logit_bias",
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether a token's logits depend on which tokens came before, beyond what the model makes of them."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


def _check(good: bool, param: str, rule: str) -> None:
    if not good:
        raise InvalidRequest(f"{param} must be {rule}.", param)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and what to generate from it. In the engine it is one sequence: a client's `n > 1` arrives there as n
    requests. Of those that wait, lower `priority` comes first. `cache_salt`: only requests with the same one (or all
    without) share cached prefixes."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Natural-log probabilities at one position, from the raw logits in float32, finite (clamped at -9999).

    `top_ids`/`top_logprobs` hold the k best, best first, as asked, or those of `logprob_token_ids`; the chosen token
    has the same float there.
    """

    token_id: int
    logprob: float
    rank: int  # 1 for the most likely token
    top_ids: list[int]
    top_logprobs: list[float]


class RequestOutput(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What one step brought to one request. The last one of a request, and only that, has a `finish_reason`.

    `prompt_logprobs` comes once, with the first token (or alone where max_tokens is 0): one entry per prompt token, the
    first None. `stop_token_id` is the stop token that ended it (None for EOS and length). An EOS or stop token is part
    of `new_token_ids`. `first_scheduled_time`: in seconds of `time.monotonic()`.
    """

    request_id: str
    new_token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    grammar_ended: bool = False  # it stopped because nothing may follow its last token, which is none of those
    error: str | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float = 0.0


class SchedulerStats(msgspec.Struct, kw_only=True):
    """Gauges are of now; counters are totals since the start."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0  # share of blocks that running requests hold, 0..1
    num_preemptions: int = 0
    prefix_cache_queries: int = 0  # prompt tokens looked up
    prefix_cache_hits: int = 0  # prompt tokens found
    num_steps: int = 0
    step_tokens: int = 0  # generated by the last step with a result, with the prompts whose first token is among them
    num_drafts: int = 0  # runs with draft tokens, of speculation
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0  # draft tokens that became output


class PoolView(msgspec.Struct, kw_only=True, frozen=True):
    """Who holds the KV cache's blocks, by one of every `stride` of them. `owners`: the row of the running sequence that
    holds the block, or one of the three below. `num_tokens`: of each running sequence, by its row."""

    stride: int
    owners: list[int]
    num_tokens: dict[int, int]

    FREE: ClassVar[int] = -1
    KEPT: ClassVar[int] = -2  # free, but may still be found as a prefix
    SHARED: ClassVar[int] = -3  # held by several


# --- one step: scheduler -> runner -> scheduler -------------------------------------------------------------------


class RowStart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence takes a row of the runner's persistent state. `output_token_ids` is not empty after a preemption."""

    row: int
    request: Request
    output_token_ids: list[int]


class Chunk(msgspec.Struct, frozen=True, array_like=True):
    """Prefill (start 0) or extend: compute `token_ids` at positions start, start+1, … of a row. `samples`: its last
    position yields the next token. `logprob_targets` are the tokens that follow each position, where the request asks
    for prompt logprobs (shorter than token_ids by one when the chunk ends the prompt), else empty."""

    row: int
    start: int
    token_ids: list[int]
    samples: bool
    logprob_targets: list[int] = []


class DraftRun(msgspec.Struct, frozen=True, array_like=True):
    """What a decoding row computes under speculation: its last token and guesses at those after it, at positions start,
    start+1, … Each position yields a token; it counts where all guesses up to it were right. `token_ids` is never
    empty; every position is a decode row of attention of its own."""

    row: int
    start: int
    token_ids: list[int]


class StepPlan(msgspec.Struct, frozen=True, array_like=True):
    """One step's work, in differences against the runner's persistent state. To be applied in the order of the fields.

    `new_blocks` holds (row, index in the row's block table, block ids). A decode row computes one token: the last one
    sampled for that row, which may still be on the device, at position seq_len. Under speculation there are
    `draft_runs` instead of `decode_rows`. Results come in the order `decode_rows`, the draft runs' tokens, then the
    chunks that sample. A plan may consist of stops alone. `same_rows`: decode_rows are those of the plan before, which
    holds for most steps and saves looking at them (and sending them to other ranks); False says nothing. `masked`:
    which of `sampling_rows` (their indices, ascending) have a grammar.
    """

    stops: list[int]
    starts: list[RowStart]
    new_blocks: list[tuple[int, int, list[int]]]
    decode_rows: list[int]
    chunks: list[Chunk]
    draft_runs: list[DraftRun] = []
    same_rows: bool = False
    masked: list[int] = []

    @property
    def num_decode_tokens(self) -> int:
        return len(self.decode_rows) + sum(len(run.token_ids) for run in self.draft_runs)

    @property
    def run_positions(self) -> list[int]:
        """Of each token of the draft runs."""
        return [position for run in self.draft_runs for position in range(run.start, run.start + len(run.token_ids))]

    @property
    def num_tokens(self) -> int:
        return self.num_decode_tokens + sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def sampling_rows(self) -> list[int]:
        """The row of each token that the step yields; a draft run's row comes once for each of its tokens."""
        drafted = [run.row for run in self.draft_runs for _ in run.token_ids]
        return self.decode_rows + drafted + [chunk.row for chunk in self.chunks if chunk.samples]


class StepRecord(msgspec.Struct, array_like=True, gc=False):
    """What a step was and how long it took, as the host and the device saw it; filled as the step goes. Times in
    seconds; `start` is of the loop's clock while the step runs, and then Unix time.

    The host schedules, launches, later waits for the step from `wait_start` (seconds after `start`) on, and takes its
    results in (`update`).
    """

    number: int = 0
    start: float = 0.0
    kind: str = "decode"  # prefill: chunks alone; mixed: both
    rows: int = 0  # that decode, with those of guesses
    chunks: int = 0
    tokens: int = 0  # of all rows and chunks
    bucket: int = 0  # rows of the graph that runs it, 0 for none
    preemptions: int = 0  # requests that had to leave for this step
    schedule: float = 0.0
    launch: float = 0.0
    wait_start: float = 0.0
    wait: float = 0.0
    update: float = 0.0
    device: float | None = None  # how long it ran, None where no clock of the device says
    idle: float | None = None  # how long the device waited for it after the step before; likewise
    weight_bytes: int | None = None  # None where no model says
    kv_bytes: int | None = None


@dataclass(slots=True, eq=False)
class Step:
    """A step in flight, filled as it goes: the scheduler plans it, the runner launches it and collects its result, the
    loop notes in `record` what each took.

    `token_ids` and `logprobs` align with `StepPlan.sampling_rows` (an entry is None where the request asked for no
    logprobs; the list where no row asked). `prompt_logprobs` maps a row to the entries of this step's chunk, one per
    logprob target.
    """

    plan: StepPlan
    record: StepRecord = field(default_factory=StepRecord)
    on_device: Any = None  # the runner's, between launch and collect
    after_rest: bool = False  # there was nothing to do before it, so the device's idle time says nothing
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] | None = None
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class TokenMasks(msgspec.Struct, frozen=True):
    """The tokens that grammars allow: for each of `entries`, indices into `StepPlan.sampling_rows`, a mask of one bit
    for each token id, id i in bit i % 32 of word i // 32. `bits`: the masks one after the other, in little-endian
    words, as many as the vocabulary (or the tokenizer's, if that is larger) needs."""

    entries: list[int]
    bits: bytearray


class Matcher(Protocol):
    """How far a sequence has come in its grammar. `ended`: nothing may follow. `error`: why it cannot go on."""

    ended: bool
    error: str | None

    def accept(self, token_id: int) -> None:
        """The sequence goes on with this token."""
        ...


class Runner(Protocol):
    """Owns the device. `launch` enqueues a step and, on an asynchronous device, returns at once; `collect` waits for it
    and puts its result into the step. Steps are collected in the order they were launched; at most two are in flight.

    Of a plan with masked rows `launch` enqueues all but the choice of these rows' tokens, which may depend on results
    that are still to be collected; `sample` enqueues that. Masked rows without an entry in `masks` get any token."""

    def launch(self, step: Step) -> None: ...

    def sample(self, step: Step, masks: TokenMasks) -> None: ...

    def collect(self, step: Step) -> None: ...

    def check(self) -> None:
        """Raises if no further step can run, as far as can be known between two steps."""
        ...


# --- engine -> API process ----------------------------------------------------------------------------------------


class StepTraffic(msgspec.Struct, kw_only=True, frozen=True):
    """What a step reads of the device's memory, in bytes.

    weights: read in every step. expert: one routed expert's weights, over all layers that have them, of `num_experts`
    of which a token takes `top_k` (all three 0 without experts). kv: pairs of a window in tokens (None: all of the
    context) and the bytes of one cached token in all layers with that window. bandwidth: bytes a second that the device
    was measured to move when the engine started, None where it could not be. sums: seconds that a step's sums over
    ranks take at least, by the time that one of a single row was measured to take; 0 where there are none or their time
    is not known.
    """

    weights: int
    expert: int = 0
    num_experts: int = 0
    top_k: int = 0
    kv: list[tuple[int | None, int]]
    bandwidth: float | None = None
    sums: float = 0.0


class StepTotals(msgspec.Struct, kw_only=True, array_like=True):
    """Sums over steps since the engine started, times in seconds, bytes as modelled by `StepTraffic`.

    All fields are of steps of decode rows alone, but for the last six: mixed steps have decode rows and chunks, prefill
    steps chunks alone; prefill_tokens are of both. Rows are also those of guesses. `padded_rows` filled graphs up.
    `timed_host` and `timed_idle`: what the host did, and the device waited, for the steps whose wait a clock of the
    device measured.
    """

    decode_steps: int = 0
    decode_seconds: float = 0.0
    decode_rows: int = 0
    padded_rows: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    sum_seconds: float = 0.0
    timed_host: float = 0.0
    timed_idle: float = 0.0
    mixed_steps: int = 0
    mixed_seconds: float = 0.0
    mixed_rows: int = 0  # that decoded
    prefill_steps: int = 0
    prefill_seconds: float = 0.0
    prefill_tokens: int = 0

    @property
    def num_steps(self) -> int:
        return self.decode_steps + self.mixed_steps + self.prefill_steps

    def since(self, earlier: StepTotals) -> StepTotals:
        """What came after `earlier`."""
        return StepTotals(**{name: getattr(self, name) - getattr(earlier, name) for name in self.__struct_fields__})


class EngineInfo(msgspec.Struct, kw_only=True, frozen=True):
    """What was settled when the engine started. Memory in bytes."""

    model: str  # as the user named it
    model_path: str
    architecture: str
    dtype: str
    device: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int
    num_blocks: int
    kv_layout: str
    enable_prefix_caching: bool
    async_scheduling: bool
    speculative: str | None = None  # as asked for
    tensor_parallel_size: int = 1  # ranks; memory, attention and traffic are those of the first
    enable_expert_parallel: bool = False
    eos_token_ids: list[int]
    memory: list[tuple[str, int]]  # rows of the memory plan: (what, bytes)
    attention: list[str]  # the chosen path and why, a sentence a line
    traffic: StepTraffic | None = None  # what a step reads, where the runner knows

    @property
    def bandwidth(self) -> float | None:  # bytes a second
        return None if self.traffic is None else self.traffic.bandwidth


class Completion(msgspec.Struct, kw_only=True, gc=False):
    """One of a request's n sequences: all of it, or a piece of it (a delta), of which only the last has a
    `finish_reason`.

    `token_ids` include the EOS or stop token that ended it, `text` does not show it. Text that may begin a stop string
    or is half a character comes with a later delta than its `token_ids` and `logprobs`. `stop_reason` is the stop
    string or stop token id that ended it, None for EOS and length. `prompt_logprobs` come with the first delta.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float = 0.0
    error: str | None = None
