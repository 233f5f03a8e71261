"""A request on its way through the scheduler."""

from __future__ import annotations

import sys
from dataclasses import InitVar, dataclass, field

from miniserve.core import Matcher, Request, RequestOutput, TokenLogprobs
from miniserve.scheduler.block_pool import ROOT, Chain
from miniserve.scheduler.ngram import NGramDrafter


@dataclass(slots=True, eq=False)
class Sequence:
    """One request's state. A running sequence holds a row and blocks. Lengths and positions in tokens.

    `token_ids` holds the tokens the scheduler knows: the prompt and the results so far. `num_computed` counts the
    positions whose KV launched steps compute; it runs ahead of the results. From `prefill_len` to `end` the sequence
    decodes: a step computes the last token sampled; the very last one is never computed. `limit` is the next position
    at which the scheduler must act: the end of its blocks, or `end`.
    """

    request: Request
    arrival: int
    max_tokens: InitVar[int]
    eos_token_ids: InitVar[frozenset[int]]
    matcher: Matcher | None = None

    request_id: str = field(init=False)
    order: tuple[int, int] = field(init=False)  # in the queue
    prompt_len: int = field(init=False)
    token_ids: list[int] = field(init=False)
    max_len: int = field(init=False)
    min_len: int = field(init=False)
    end: int = field(init=False)
    stop_ids: frozenset[int] = field(init=False)
    # Entries so far, until the first output returns them; the first prompt token has none.
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    drafter: NGramDrafter | None = None
    guesses_due: int = sys.maxsize  # limit for the next guesses, from how many of the last were right

    finished: bool = False
    row: int = -1  # in the runner's state; -1 unless running
    blocks: list[int] = field(default_factory=list)
    num_computed: int = 0
    limit: int = 0
    prefill_len: int = 0  # tokens to prefill: the prompt, after a preemption also the output
    num_registered: int = 0  # leading blocks in the prefix cache
    root: Chain = ROOT
    chain: Chain = ROOT  # their chain id
    ready_step: int = 0  # results of this many steps must arrive before it may run (again)

    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float = 0.0

    def __post_init__(self, max_tokens: int, eos_token_ids: frozenset[int]) -> None:
        request, params = self.request, self.request.params
        self.request_id = request.request_id
        self.order = request.priority, self.arrival
        self.prompt_len = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)
        self.max_len = self.prompt_len + max_tokens
        self.min_len = self.prompt_len + params.min_tokens
        self.end = self.prompt_len + max(max_tokens - 1, 0)
        self.stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self.stop_ids |= eos_token_ids
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        # No guesses with what depends on earlier tokens: behind a wrong guess it would count that guess. Nor with a
        # grammar, whose mask would be needed behind each guess.
        if not (params.penalised or params.bad_words or self.matcher is not None):
            self.drafter = NGramDrafter(self.token_ids)
        if request.cache_salt is not None:
            self.root = self.chain = request.cache_salt

    def output(self, new_token_ids: list[int]) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            new_token_ids=new_token_ids,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
            first_scheduled_time=self.first_scheduled_time,
        )
