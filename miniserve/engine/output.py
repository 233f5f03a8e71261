"""From the engine's outputs to what a caller reads: one request with its n sequences, their texts and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy

import msgspec

from miniserve.core import Completion, FinishReason, Request, RequestOutput, SamplingParams, TokenLogprobs
from miniserve.engine.detokenizer import Detokenizer
from miniserve.engine.tokenizer import Tokenizer

_MOST_PENDING = 64  # deltas; to join each one with what waits already would cost more, the more waits


def fan_out(request_id: str, request: Request) -> list[Request]:
    """The engine's requests for one caller's request: one for each of its n sequences, whose ids begin with
    `request_id`.

    Sequence i draws with seed + i where a seed is given. Only the first computes the prompt's logprobs.
    """
    params = request.params
    if params.n == 1:
        return [msgspec.structs.replace(request, request_id=request_id)]
    requests = []
    for index in range(params.n):
        child = copy(params)  # which, unlike `replace`, does not check them again
        msgspec.structs.force_setattr(child, "n", 1)
        if params.seed is not None:  # stays a 64-bit integer
            msgspec.structs.force_setattr(child, "seed", (params.seed + index + 2**63) % 2**64 - 2**63)
        if index:
            msgspec.structs.force_setattr(child, "prompt_logprobs", None)
        requests.append(msgspec.structs.replace(request, request_id=f"{request_id}#{index}", params=child))
    return requests


def extend(output: RequestOutput, later: RequestOutput) -> None:
    """Take what a later step brought to the same sequence into an output that nobody has read yet."""
    output.new_token_ids += later.new_token_ids
    if later.logprobs is not None:
        output.logprobs = (output.logprobs or []) + later.logprobs
    if later.finish_reason is not None:  # of what is counted, the last one's figures are those of the whole sequence
        output.finish_reason, output.stop_token_id = later.finish_reason, later.stop_token_id
        output.grammar_ended, output.error = later.grammar_ended, later.error
        output.num_cached_tokens, output.num_preemptions = later.num_cached_tokens, later.num_preemptions


class OutputAssembler:
    """Turns the outputs of one caller's request into deltas.

    Every sequence's first delta has the prompt's logprobs where they are asked for, so the other sequences' deltas wait
    for those of the first.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self._include_stop = params.include_stop_str_in_output
        self._detokenizers: list[Detokenizer | None] = [  # None: the sequence has ended
            Detokenizer(tokenizer, params, prompt_token_ids) for _ in range(params.n)
        ]
        self._awaits_prompt_logprobs = params.prompt_logprobs is not None
        self._lack_prompt_logprobs = set(range(1, params.n)) if self._awaits_prompt_logprobs else set()
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        self._held: dict[int, Completion] = {}
        self._num_running = params.n

    @property
    def finished(self) -> bool:
        return self._num_running == 0

    def push(self, index: int, output: RequestOutput) -> tuple[list[Completion], bool]:
        """The deltas that sequence `index`'s output brings, and whether the sequence ended here at a stop string, so
        that the engine must be told to abort it (unless it ended by itself at the same token)."""
        detokenizer = self._detokenizers[index]
        if detokenizer is None:
            return [], False  # tokens that were on their way when the sequence met its stop string
        delta = self._decode(index, detokenizer, output)
        met_stop = False
        if delta.finish_reason is not None:
            self._detokenizers[index] = None
            self._num_running -= 1
            met_stop = delta.finish_reason is FinishReason.STOP and isinstance(delta.stop_reason, str)
        return self._release(delta), met_stop and output.finish_reason is None

    def fail(self, error: str) -> list[Completion]:
        """The last deltas of all unfinished sequences, which end with `error`; text held back is dropped."""
        deltas = list(self._held.values())
        self._held.clear()
        self._awaits_prompt_logprobs = False
        for index, detokenizer in enumerate(self._detokenizers):
            if detokenizer is not None:
                self._detokenizers[index] = None
                self._num_running -= 1
                reason = FinishReason.ERROR
                deltas.append(Completion(index=index, text="", token_ids=[], finish_reason=reason, error=error))
        return deltas

    def _decode(self, index: int, detokenizer: Detokenizer, output: RequestOutput) -> Completion:
        token_ids, finish_reason = output.new_token_ids, output.finish_reason
        # The token that ended the sequence belongs to its ids, but to its text only on demand.
        stopped = finish_reason is FinishReason.STOP and not output.grammar_ended
        hides_last = stopped and bool(token_ids) and not self._include_stop
        text, num_used, stop = detokenizer.push(token_ids[:-1] if hides_last else token_ids)
        if stop is None:
            num_used = len(token_ids)
            if finish_reason is not None:
                rest, _, stop = detokenizer.finish()
                text += rest
        return Completion(
            index=index,
            text=text,
            token_ids=token_ids[:num_used],
            logprobs=None if output.logprobs is None else output.logprobs[:num_used],
            prompt_logprobs=output.prompt_logprobs,
            finish_reason=finish_reason if stop is None else FinishReason.STOP,
            stop_reason=output.stop_token_id if stop is None else stop,
            num_cached_tokens=output.num_cached_tokens,
            num_preemptions=output.num_preemptions,
            first_scheduled_time=output.first_scheduled_time,
            error=output.error,
        )

    def _release(self, delta: Completion) -> list[Completion]:
        if delta.index == 0 and self._awaits_prompt_logprobs:
            self._awaits_prompt_logprobs = False
            self._prompt_logprobs = delta.prompt_logprobs
            held, self._held = self._held, {}
            return [delta, *(self._with_prompt_logprobs(held[index]) for index in sorted(held))]
        if self._awaits_prompt_logprobs:
            held_delta = self._held.get(delta.index)
            self._held[delta.index] = delta if held_delta is None else join((held_delta, delta))
            return []
        return [self._with_prompt_logprobs(delta) if self._lack_prompt_logprobs else delta]

    def _with_prompt_logprobs(self, delta: Completion) -> Completion:
        if delta.index in self._lack_prompt_logprobs:
            self._lack_prompt_logprobs.discard(delta.index)
            delta.prompt_logprobs = self._prompt_logprobs
        return delta


def join(deltas: Sequence[Completion]) -> Completion:
    """Consecutive deltas of one sequence as one."""
    if len(deltas) == 1:
        return deltas[0]
    logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return msgspec.structs.replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=[entry for entries in logprobs for entry in entries] if logprobs else None,
        prompt_logprobs=next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None),
    )


class CompletionStream:
    """The deltas of one request, of all its n sequences as they come, on their way from the engine's client to a
    reader.

    The client `put`s and `end`s. A delta that the reader is there for goes to `offer`, which says whether it was taken.
    Those that were not are merged, one per sequence, so that a slow reader holds back nobody and piles up nothing;
    then, and at the end, comes `notify`. Both are the reader's, called in the client's own turn: they must not raise,
    and should not take long. If the engine dies, each unfinished sequence gets a last delta with finish_reason `error`
    and the reason in `error`. `complete`: nothing comes any more but what `get` still has.
    """

    def __init__(self, abort: Callable[[], None]) -> None:
        self.offer: Callable[[Completion], bool] = _refuse
        self.notify: Callable[[], None] = _nobody
        self.complete = False
        self._pending: dict[int, list[Completion]] = {}  # by the sequence
        self._abort = abort

    def put(self, delta: Completion) -> None:
        if not self._pending and self.offer(delta):
            return
        pending = self._pending.setdefault(delta.index, [])
        pending.append(delta)
        if len(pending) == _MOST_PENDING:
            pending[:] = [join(pending)]
        self.notify()

    def end(self) -> None:
        self.complete, self._abort = True, _nobody
        self.notify()

    def get(self) -> Completion | None:
        """The next delta, or None where there is none now."""
        for index in self._pending:
            return join(self._pending.pop(index))
        return None

    def close(self) -> None:
        """Abort the request unless it has ended; what was not fetched is dropped. May be called again."""
        self.offer, self.notify, abort = _refuse, _nobody, self._abort
        self._pending.clear()
        self.complete, self._abort = True, _nobody
        abort()


def _refuse(delta: Completion) -> bool:
    """Where there is no reader yet, or none any more."""
    return False


def _nobody() -> None:
    """Has nobody to tell, and nothing to abort."""
