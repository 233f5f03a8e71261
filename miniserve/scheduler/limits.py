"""What a request must satisfy before anything runs: the same for the server, the offline API and the scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from miniserve.config import SchedulerConfig
from miniserve.core import EngineInfo, InvalidRequest, Request, SamplingParams

_MAX_LOGPROBS = 20


class ContextExceeded(InvalidRequest):
    """With the code and, by default, the field that clients know it by. limit: of the context. prompt_len: None where
    the prompt was not tokenized. max_tokens: what was asked for beside a prompt that is not too long alone. All in
    tokens."""

    def __init__(
        self,
        limit: int,
        reason: str,
        prompt_len: int | None = None,
        max_tokens: int | None = None,
        param: str = "input_tokens",
    ) -> None:
        message = f"This model's maximum context length is {limit} tokens. However, {reason}"
        super().__init__(message, param, "context_length_exceeded")
        self.limit, self.prompt_len, self.max_tokens = limit, prompt_len, max_tokens


def check_request(request: Request, info: EngineInfo) -> Request:
    """Return the request with its `max_tokens` resolved (see `check_lengths`).

    Raises `InvalidRequest` naming the field for a prompt or parameters this engine cannot serve.
    """
    params, prompt_len = request.params, len(request.prompt_token_ids)
    max_tokens = check_lengths(prompt_len, params.max_tokens, info)
    check_vocabulary(request.prompt_token_ids, "prompt", info.vocab_size)
    for name in ("stop_token_ids", "logit_bias", "logprob_token_ids", "allowed_token_ids"):
        check_vocabulary(tuple(getattr(params, name) or ()), name, info.vocab_size)
    for word in params.bad_words:
        check_vocabulary(word, "bad_words", info.vocab_size)
    _check_choice(params, info)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens}, but with a prompt of {prompt_len} tokens at most {max_tokens} tokens "
            "can be generated.",
            "min_tokens",
        )
    check_logprobs(params.logprobs, "logprobs", info.vocab_size)
    check_logprobs(params.prompt_logprobs, "prompt_logprobs", info.vocab_size)
    if params.max_tokens == max_tokens:
        return request
    return msgspec.structs.replace(request, params=msgspec.structs.replace(params, max_tokens=max_tokens))


def _check_choice(params: SamplingParams, info: EngineInfo) -> None:
    """Raises `InvalidRequest` where a step could have no token to draw, whatever was drawn before."""
    if params.allowed_token_ids is None and not params.bad_words:
        return
    forbidden = {word[-1] for word in params.bad_words}
    if params.min_tokens:
        forbidden.update(info.eos_token_ids, params.stop_token_ids)
    allowed = params.allowed_token_ids
    if len(forbidden) >= info.vocab_size if allowed is None else forbidden.issuperset(allowed):
        param = "bad_words" if params.bad_words else "allowed_token_ids"
        raise InvalidRequest(
            f"{param}: nothing can be generated, as bad_words, and stop tokens before min_tokens, leave none of the "
            "allowed tokens.",
            param,
        )


def check_lengths(prompt_len: int, max_tokens: int | None, limits: EngineInfo | SchedulerConfig) -> int:
    """Return the number of tokens the request may generate; all lengths in tokens.

    `max_tokens` is clamped to the rest of the context; None (no limit) also to what the KV cache holds.

    Raises `InvalidRequest` for a request that could not finish even if it ran alone.
    """
    if prompt_len < 1:
        raise InvalidRequest("The prompt must contain at least one token.", "prompt")
    least_output = 0 if max_tokens == 0 else 1
    room = limits.max_model_len - prompt_len
    if room < least_output:
        raise ContextExceeded(
            limits.max_model_len,
            f"your prompt contains {prompt_len} input tokens, which leaves no room for output. Please shorten the "
            "prompt.",
            prompt_len,
        )
    capacity = limits.num_blocks * limits.block_size
    output_len = min(room, max(capacity - prompt_len, 1)) if max_tokens is None else min(room, max_tokens)
    if prompt_len + output_len > capacity:
        raise InvalidRequest(
            f"The request needs up to {prompt_len + output_len} tokens of KV cache ({prompt_len} of prompt and "
            f"{output_len} of output), but the whole cache holds {capacity}. Ask for less, or start the server with "
            "more KV cache memory.",
            "prompt" if prompt_len + least_output > capacity else "max_tokens",
        )
    return output_len


def check_vocabulary(token_ids: Sequence[int], param: str, vocab_size: int) -> None:
    """Raises `InvalidRequest` naming `param` for an id that the model does not have."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"{param} holds the token id {wrong}; the model's vocabulary has ids from 0 to {vocab_size - 1}.", param
        )


def check_logprobs(value: int | None, param: str, vocab_size: int) -> None:
    """Raises `InvalidRequest` naming `param` for a number of log probabilities that is out of range."""
    most = min(_MAX_LOGPROBS, vocab_size)
    if value is not None and not 0 <= value <= most:
        raise InvalidRequest(f"{param} must be between 0 and {most}, not {value}.", param)
