"""A request on its way through the scheduler."""

from __future__ import annotations

import sys

from miniserve.core import Matcher, Request, RequestOutput, TokenLogprobs
from miniserve.scheduler.block_pool import ROOT, Chain
from miniserve.scheduler.ngram import NGramDrafter


class Sequence:
    """One request's state. A running sequence holds a row and blocks. Lengths and positions in tokens.

    `token_ids` holds the tokens the scheduler knows: the prompt and the results so far. `num_computed` counts the
    positions whose KV launched steps compute; it runs ahead of the results. From `prefill_len` to `end` the sequence
    decodes: a step computes the last token sampled; the very last one is never computed. `limit` is the next position
    at which the scheduler must act: the end of its blocks, or `end`.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "chain",
        "drafter",
        "end",
        "finished",
        "first_scheduled_time",
        "guesses_due",
        "limit",
        "matcher",
        "max_len",
        "min_len",
        "num_cached_tokens",
        "num_computed",
        "num_preemptions",
        "num_registered",
        "order",
        "prefill_len",
        "prompt_len",
        "prompt_logprobs",
        "ready_step",
        "request",
        "request_id",
        "root",
        "row",
        "stop_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: Request,
        arrival: int,
        max_tokens: int,
        eos_token_ids: frozenset[int],
        matcher: Matcher | None = None,
    ) -> None:
        params = request.params
        self.request = request
        self.request_id = request.request_id
        self.arrival = arrival
        self.order = request.priority, arrival  # in the queue
        self.prompt_len = len(request.prompt_token_ids)
        self.token_ids = list(request.prompt_token_ids)
        self.max_len = self.prompt_len + max_tokens
        self.min_len = self.prompt_len + params.min_tokens
        self.end = self.prompt_len + max(max_tokens - 1, 0)
        self.stop_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            self.stop_ids |= eos_token_ids
        # Entries so far, until the first output returns them; the first prompt token has none.
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None if params.prompt_logprobs is None else [None]

        # No guesses with what depends on earlier tokens: behind a wrong guess it would count that guess. Nor with a
        # grammar, whose mask would be needed behind each guess.
        unguessable = params.penalised or params.bad_words or matcher is not None
        self.drafter = None if unguessable else NGramDrafter(self.token_ids)
        self.guesses_due = sys.maxsize  # limit for the next guesses, from how many of the last were right

        self.matcher = matcher
        self.finished = False
        self.row = -1  # in the runner's state; -1 unless running
        self.blocks: list[int] = []
        self.num_computed = 0
        self.limit = 0
        self.prefill_len = 0  # tokens to prefill: the prompt, after a preemption also the output
        self.num_registered = 0  # leading blocks in the prefix cache
        self.root: Chain = ROOT if request.cache_salt is None else request.cache_salt
        self.chain = self.root  # their chain id
        self.ready_step = 0  # results of this many steps must arrive before it may run (again)

        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.first_scheduled_time = 0.0

    def output(self, new_token_ids: list[int]) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            new_token_ids=new_token_ids,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
            first_scheduled_time=self.first_scheduled_time,
        )
