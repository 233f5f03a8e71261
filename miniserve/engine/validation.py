"""What a request must satisfy before anything runs; the same for the server and the offline API."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from miniserve.core import EngineInfo, InvalidRequest, SamplingParams
from miniserve.scheduler.limits import check_lengths

MAX_LOGPROBS = 20


def check_request(prompt_token_ids: Sequence[int], params: SamplingParams, info: EngineInfo) -> SamplingParams:
    """Return the parameters with `max_tokens` settled: clamped to what fits, None meaning the rest of the context.

    Raises `InvalidRequest` naming the field for a prompt or parameters this engine cannot serve.
    """
    max_tokens = check_lengths(
        len(prompt_token_ids),
        params.max_tokens,
        max_model_len=info.max_model_len,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
    )
    check_vocabulary(prompt_token_ids, "prompt", info.vocab_size)
    check_vocabulary(params.stop_token_ids, "stop_token_ids", info.vocab_size)
    check_vocabulary(tuple(params.logit_bias or ()), "logit_bias", info.vocab_size)
    if params.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {params.min_tokens}, but with a prompt of {len(prompt_token_ids)} tokens at most "
            f"{max_tokens} tokens can be generated.",
            "min_tokens",
        )
    most = min(MAX_LOGPROBS, info.vocab_size)
    for name, value in (("logprobs", params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if value is not None and value > most:
            raise InvalidRequest(f"{name} must be at most {most}, not {value}.", name)
    return params if params.max_tokens == max_tokens else msgspec.structs.replace(params, max_tokens=max_tokens)


def check_vocabulary(token_ids: Sequence[int], param: str, vocab_size: int) -> None:
    """Raises `InvalidRequest` naming `param` for an id that the model does not have."""
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidRequest(
            f"{param} holds the token id {wrong}; the model's vocabulary has ids from 0 to {vocab_size - 1}.", param
        )
