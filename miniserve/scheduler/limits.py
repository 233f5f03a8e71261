"""Which requests can never run: a pure function, for both the API process and the scheduler."""

from __future__ import annotations

from miniserve.core import InvalidRequest


def check_lengths(
    prompt_len: int, max_tokens: int | None, *, max_model_len: int, num_blocks: int, block_size: int
) -> int:
    """Return the number of tokens the request may generate; all lengths in tokens.

    `max_tokens` is clamped to the rest of the context; None (no limit) also to what the KV cache holds.

    Raises `InvalidRequest` for a request that could not finish even if it ran alone.
    """
    if prompt_len < 1:
        raise InvalidRequest("The prompt must contain at least one token.", "prompt")
    least_output = 0 if max_tokens == 0 else 1
    if prompt_len + least_output > max_model_len:
        raise InvalidRequest(
            f"This model's maximum context length is {max_model_len} tokens. However, your prompt contains "
            f"{prompt_len} input tokens, which leaves no room for output. Shorten the prompt.",
            "prompt",
        )
    capacity = num_blocks * block_size
    room = max_model_len - prompt_len
    output_len = min(room, max(capacity - prompt_len, 1)) if max_tokens is None else min(room, max_tokens)
    if prompt_len + output_len > capacity:
        raise InvalidRequest(
            f"The request needs up to {prompt_len + output_len} tokens of KV cache ({prompt_len} of prompt and "
            f"{output_len} of output), but the whole cache holds {capacity}. Ask for less, or start the server with "
            "more KV cache memory.",
            "prompt" if prompt_len + least_output > capacity else "max_tokens",
        )
    return output_len
