from __future__ import annotations

import pytest

from miniserve.config import SchedulerConfig
from miniserve.core import InvalidRequest
from miniserve.scheduler.limits import check_lengths


def check(prompt_len: int, max_tokens: int | None, model_len: int = 100, blocks: int = 100, size: int = 4) -> int:
    config = SchedulerConfig(
        num_blocks=blocks, block_size=size, max_num_seqs=8, max_num_batched_tokens=64, max_model_len=model_len
    )
    return check_lengths(prompt_len, max_tokens, config)


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "output_len"),
    [
        (10, 16, 16),
        (10, 90, 90),
        (10, 91, 90),  # clamped to what is left of the context
        (10, None, 90),
        (99, 1, 1),  # exactly at the limit
        (99, None, 1),
        (100, 0, 0),  # scoring a prompt needs no room for output
        (1, 0, 0),
    ],
)
def test_output_is_clamped_to_the_context(prompt_len: int, max_tokens: int | None, output_len: int) -> None:
    assert check(prompt_len, max_tokens) == output_len


@pytest.mark.parametrize(("prompt_len", "max_tokens"), [(100, 1), (100, None), (101, 0), (5000, 16)])
def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(prompt_len: int, max_tokens: int | None) -> None:
    with pytest.raises(
        InvalidRequest,
        match=rf"This model's maximum context length is 100 tokens. However, your prompt contains {prompt_len} input",
    ) as refused:
        check(prompt_len, max_tokens)
    assert (refused.value.param, refused.value.code) == ("input_tokens", "context_length_exceeded")


@pytest.mark.parametrize(
    ("prompt_len", "max_tokens", "param"), [(10, 31, "max_tokens"), (40, 1, "prompt"), (40, None, "prompt")]
)
def test_what_the_whole_pool_cannot_hold_is_refused_with_both_numbers(
    prompt_len: int, max_tokens: int | None, param: str
) -> None:
    with pytest.raises(InvalidRequest, match=r"up to 41 tokens of KV cache .* holds 40") as refused:
        check(prompt_len, max_tokens, blocks=10)
    assert refused.value.param == param


def test_the_pool_may_be_used_to_its_last_token() -> None:
    assert check(10, 30, blocks=10) == 30
    assert check(39, None, blocks=10) == 1
    assert check(10, None, blocks=10) == 30
    assert check(40, 0, blocks=10) == 0


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one token"):
        check(0, 5)
