"""The kernels that draw a step's tokens, against the filters in float64 and against the CPU's sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import check_counts, check_inverse_cdf, reference_distribution
from triton_support import DEVICE, DTYPES, NATIVE, on_gpu

from miniserve.kernels.sampling import NUM_COLUMNS, RowParams, draw, uniform
from miniserve.kernels.step_tensors import RowState
from miniserve.kernels.triton.sampling import sample

Options = dict[str, Any]


def row_params(options: list[Options], first_key: int = 0) -> RowParams:
    """Row i asks for the i-th of `options`, of which what is left out filters nothing."""
    numbers = [
        [o.get("temperature", 1.0), o.get("top_k", 0), o.get("top_p", 1.0), o.get("min_p", 0.0), o.get("left", 0.0)]
        for o in options
    ]
    keys = torch.arange(first_key, first_key + len(options), dtype=torch.int64) * 7919 - 3
    columns = torch.zeros(len(options), NUM_COLUMNS, device=DEVICE)
    columns[:, :5] = torch.tensor(numbers, dtype=torch.float32)
    return RowParams(keys.to(DEVICE), torch.ones_like(keys, device=DEVICE), columns)


def integers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def drawn(logits: torch.Tensor, params: RowParams, position: int = 3) -> list[int]:
    """A token for each of the logits, [batch, vocab_size], whose rows are 0, 1, …"""
    batch = len(logits)
    tokens = torch.full((batch,), -1, dtype=torch.int64, device=DEVICE)
    positions = torch.full_like(tokens, position)
    sample(logits.to(DEVICE).contiguous(), torch.arange(batch, device=DEVICE), params, tokens, num_outputs=positions)
    return tokens.tolist()


def random_logits(seed: int, vocab_size: int, dtype: torch.dtype) -> torch.Tensor:
    """[vocab_size], a third of it -inf; float16 has many equals."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=vocab_size) * 3
    logits[generator.integers(0, vocab_size, vocab_size // 3)] = -np.inf
    return torch.from_numpy(logits).to(dtype)


# Away from round numbers: at 0.5 of two equal tokens the last bit of a sum would decide.
SETTINGS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.31, 1.0, 1.9, 40.0]),
        "top_k": st.sampled_from([0, 0, 1, 2, 7, 40]),
        "top_p": st.sampled_from([1.0, 0.9173, 0.2237, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.0, 0.013, 0.293]),
    }
)


@settings(max_examples=400 if NATIVE else 18, deadline=None, derandomize=True)
@given(
    options=SETTINGS,
    vocab_size=st.sampled_from([41, 64, 129, 700]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 2**31 - 1),
)
def test_a_token_is_the_inverse_cdf_of_what_the_filters_leave(
    options: Options, vocab_size: int, dtype: torch.dtype, seed: int
) -> None:
    logits = random_logits(seed, vocab_size, dtype)
    params = row_params([options], first_key=seed)
    number = uniform(params.keys, torch.full_like(params.keys, 3)).item()
    token = drawn(logits[None], params)[0]
    check_inverse_cdf(token, number, reference_distribution(logits.float().numpy(), **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_tiles_of_a_longer_vocabulary(dtype: torch.dtype) -> None:
    """A flat row, of which no filter here can leave out a block unseen."""
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.3
    options = [{}, {"top_p": 0.9173}, {"top_k": 700}, {"top_k": 4000, "top_p": 0.8131}, {"min_p": 0.213}]
    params = row_params(options)
    numbers = uniform(params.keys, torch.full_like(params.keys, 3)).tolist()
    for row, token in enumerate(drawn(logits.repeat(len(options), 1), params)):
        check_inverse_cdf(token, numbers[row], reference_distribution(logits.float().numpy(), **options[row]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"temperature": 0.6, "top_k": 20, "top_p": 0.95}, marks=on_gpu),
        pytest.param({"temperature": 1.3, "top_p": 0.8, "min_p": 0.02}, marks=on_gpu),
        pytest.param({"top_p": 0.5}, marks=on_gpu),
        pytest.param({"top_k": 5}, marks=on_gpu),
    ],
)
def test_draws_follow_the_distribution(options: Options) -> None:
    vocab_size, num_draws = 24, 50_000 if NATIVE else 60
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(5)) * 2
    tokens = drawn(logits.repeat(num_draws, 1), row_params([options] * num_draws))
    check_counts(np.bincount(tokens, minlength=vocab_size), reference_distribution(logits.numpy(), **options))


def test_top_k_takes_exactly_k_of_equal_tokens_and_top_p_all() -> None:
    logits = torch.zeros(300, dtype=torch.float16)
    logits[:20] = -0.0  # equal to the other zeros
    some = [{"top_k": 4}, {"top_p": 0.3}, {"top_k": 50, "top_p": 0.3}, {"top_k": 2}, {"min_p": 0.5}] * 2
    params = row_params(some)
    numbers = uniform(params.keys, torch.full_like(params.keys, 3)).tolist()
    rows = logits.repeat(len(some), 1)
    rows[1:5, [7, 8, 9, 200]] = 9.0
    for row, token in enumerate(drawn(rows, params)):
        check_inverse_cdf(token, numbers[row], reference_distribution(rows[row].float().numpy(), **some[row]))


def test_temperature_0_takes_the_lowest_of_the_most_likely() -> None:
    logits = torch.zeros(3, 9001)
    logits[0, [5, 300, 9000]] = 1.0
    logits[1, [127, 128]] = 4.0
    filters = {"temperature": 0.0, "top_k": 7, "top_p": 0.5, "min_p": 0.1}
    assert drawn(logits, row_params([{"temperature": 0.0}, filters, filters])) == [5, 127, 0]


def test_the_end_of_a_step_in_a_graph() -> None:
    """Padding, rows in any order, and one whose logits are left to the host."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    params = row_params([{}, {"top_k": 3}, {"left": 1.0}, {"temperature": 0.0}])
    state = RowState(integers(0), integers(0), integers(9, 8, 7, 6), integers(0, 4, 2, 1))
    tokens, left = integers(-1, -1, -1, -1), torch.zeros_like(logits)
    sample(logits, integers(3, -1, 2, 1), params, tokens, state, undrawn=left)
    assert tokens[1:3].tolist() == [-1, -1]
    assert tokens[0] == logits[0].argmax()
    assert tokens[3].item() == drawn(logits[[0, 3]], params, position=4)[1]
    assert state.last_tokens.tolist() == [9, tokens[3].item(), 7, tokens[0].item()]
    assert state.num_outputs.tolist() == [0, 5, 2, 2]
    assert torch.equal(left[2], logits[2])
    assert not left[[0, 1, 3]].any()


def test_a_row_that_repeats_draws_by_the_positions_it_is_given() -> None:
    logits = torch.zeros(1, 500, device=DEVICE)
    params = row_params([{}, {"top_k": 400}])
    tokens = integers(*[-1] * 6)
    sample(logits.repeat(6, 1), integers(1, 0, 1, 1, 0, 1), params, tokens, num_outputs=integers(0, 5, 1, 2, 6, 0))
    alone = {
        (row, position): drawn(logits.repeat(2, 1), params, position)[row] for row in (0, 1) for position in (0, 1, 5)
    }
    assert tokens[[0, 1, 2]].tolist() == [alone[1, 0], alone[0, 5], alone[1, 1]]
    assert tokens[5] == tokens[0]
    assert len(set(tokens.tolist())) == 5


def test_a_row_is_drawn_alike_alone_and_in_any_batch() -> None:
    options = [{}, {"top_k": 9}, {"temperature": 0.0}, {"top_p": 0.8}, {"top_k": 90, "top_p": 0.9, "min_p": 0.01}]
    logits = torch.randn(5, 700, generator=torch.Generator().manual_seed(3)) * 2
    params = row_params(options)
    together = drawn(logits, params)
    for row in range(5):
        tokens = integers(-1)
        sample(logits[row : row + 1].to(DEVICE), integers(row), params, tokens, num_outputs=integers(3))
        assert tokens.tolist() == [together[row]]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_broken_rows_stay_in_the_vocabulary() -> None:
    every = [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.0}, {"temperature": 1e-5}]
    for fill in (float("-inf"), float("nan"), 3e38, float("inf")):
        logits = torch.full((len(every), 70), fill)
        logits[:, 69] = float("-inf")
        assert all(0 <= token < 70 for token in drawn(logits, row_params(every)))
    logits = torch.tensor([3e38, -3e38, 0.0, 1.0]).repeat(len(every), 1)
    assert drawn(logits, row_params(every)) == [0] * len(every)


@pytest.mark.gpu
@pytest.mark.skipif(not NATIVE, reason="no GPU on this machine")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 50},
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 5000},
        {"min_p": 0.05},
    ],
)
def test_a_gpu_draws_what_a_cpu_draws(options: Options, dtype: torch.dtype) -> None:
    batch = 64
    logits = (torch.randn(batch, 151936, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    params = row_params([options] * batch)
    on_cpu = RowParams(params.keys.cpu(), params.prompt_lens.cpu(), params.numbers.cpu())
    got = drawn(logits, params)
    wanted = draw(logits, torch.arange(batch), on_cpu, torch.full((batch,), 3)).tolist()
    # Where two tokens meet within float32's rounding of the number, either is right.
    assert sum(a != b for a, b in zip(got, wanted, strict=True)) <= 1
