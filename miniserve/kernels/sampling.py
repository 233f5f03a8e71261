"""The draw of a step's tokens: rows' parameters, and the definition in PyTorch, which the kernels for GPUs
(`triton.sampling`) and CPUs (`native`) follow. All draw the same token for the same row, except where rounding decides
between two tokens.

At temperature 0 a row takes its most likely token, of equals the lowest id. Else the filters apply in vLLM's order:
temperature, min_p, top_k, top_p. min_p keeps tokens at least min_p times as likely as the most likely one. top_k keeps
exactly k, the lowest ids among equals. top_p keeps the most likely of the remaining tokens until their share of these
reaches top_p, and those as likely as the last one kept. The token is then the inverse of the CDF, in the order of the
ids, at one number in [0, 1).

That number depends only on the row's key and its number of output tokens: a row's stream is SplitMix64 (Steele, Lea and
Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014), started at the key and read at any index. So a
draw does not depend on the rest of the batch, and a preempted sequence continues its stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from miniserve.core import SamplingParams

TEMPERATURE, TOP_K, TOP_P, MIN_P, WANTS_LOGITS = range(5)  # columns of `numbers`
NUM_COLUMNS = 5
# Below this temperature a draw practically is the argmax, and dividing by it would lose all precision (vLLM's limit).
_GREEDY_BELOW = 1e-5
NUMBERS_PER_POSITION = 32  # of a row's stream; a draw reads the first

_NO_ID = 2**63 - 1  # larger than any
_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # torch has signed integers; products wrap to the same bits
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True, slots=True)
class RowParams:
    """The sampling parameters of each row. keys: int64 [max_num_seqs], of its stream of random numbers; prompt_lens:
    int64 [max_num_seqs]; numbers: float32 [max_num_seqs, NUM_COLUMNS]: temperature (0: the most likely token), top_k
    (0: all), top_p (1: all), min_p (0: all), and 1 where the sampler needs the row's logits."""

    keys: torch.Tensor
    prompt_lens: torch.Tensor
    numbers: torch.Tensor


def row_numbers(params: SamplingParams, vocab_size: int, *, wants_logits: bool) -> tuple[float, ...]:
    """A row of `RowParams.numbers`."""
    temperature = 0.0 if params.temperature < _GREEDY_BELOW else params.temperature
    top_k = params.top_k if 0 < params.top_k < vocab_size else 0
    return temperature, top_k, params.top_p, params.min_p, wants_logits


@dataclass(frozen=True, slots=True)
class RowMasks:
    """Which tokens may be drawn. bits: int32 [num_masks, words], contiguous: token i has bit i % 32 of word i // 32, of
    as many words as the vocabulary needs or more. places: int32 [batch], each entry's mask, negative for none."""

    bits: torch.Tensor
    places: torch.Tensor


class Draw(Protocol):
    def __call__(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        params: RowParams,
        num_outputs: torch.Tensor,
        masks: RowMasks | None = None,
    ) -> torch.Tensor:
        """A token for each entry, int64 [batch]. logits: contiguous [batch, vocab_size] of any float, in which
        forbidden tokens get -inf. rows: int64 [batch], may repeat; num_outputs: int64 [batch], output tokens before
        each draw."""
        ...


def uniform(keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """One float64 in [0, 1), a multiple of 2**-53, per row. keys, positions: int64 [num_rows]."""
    bits = (positions * NUMBERS_PER_POSITION + 1) * _GAMMA + keys
    bits = (bits ^ _shift_right(bits, 30)) * _MIX_1
    bits = (bits ^ _shift_right(bits, 27)) * _MIX_2
    return _shift_right(bits ^ _shift_right(bits, 31), 11).to(torch.float64) * 2.0**-53


def _shift_right(bits: torch.Tensor, count: int) -> torch.Tensor:
    """Logical shift: torch's shift of a signed integer repeats the sign bit."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def most_likely(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit and the lowest of the `ids` (of all columns, or of each row's) that have it; of a row
    with NaNs, these. logits: [R, n]."""
    best = logits.amax(-1, keepdim=True)
    tokens = torch.where((logits == best) | logits.isnan(), ids, torch.inf if ids.is_floating_point() else _NO_ID)
    return best[:, 0], tokens.amin(-1)


def forbid(logits: torch.Tensor, masks: RowMasks) -> None:
    """Make the logits of tokens that may not be drawn -inf, in place. logits: [batch, vocab_size]."""
    entries = (masks.places >= 0).nonzero().squeeze(1)
    words = masks.bits[masks.places[entries].long()]
    bits = words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device) & 1
    banned = bits.flatten(1)[:, : logits.shape[1]] == 0
    logits[entries] = logits[entries].masked_fill_(banned, float("-inf"))


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    params: RowParams,
    num_outputs: torch.Tensor,
    masks: RowMasks | None = None,
) -> torch.Tensor:
    """See `Draw`."""
    if masks is not None:
        forbid(logits, masks)
    logits, vocab_size = logits.float(), logits.shape[1]
    ids = torch.arange(vocab_size, device=logits.device)
    numbers = params.numbers[rows]
    temperature = numbers[:, TEMPERATURE, None]
    best, tokens = most_likely(logits, ids)
    drawn = (numbers[:, TEMPERATURE] > 0.0).nonzero().squeeze(1)
    if not len(drawn):
        return tokens
    logits, numbers = logits[drawn], numbers[drawn]
    weights = ((logits - best[drawn, None]) * (math.log2(math.e) / temperature[drawn])).exp2_().double()
    if (numbers[:, TOP_K] > 0).any() or (numbers[:, TOP_P] < 1).any() or (numbers[:, MIN_P] > 0).any():
        weights *= _kept(logits, weights, numbers)
    mass = weights.cumsum(-1)
    above = (mass > (uniform(params.keys[rows[drawn]], num_outputs[drawn]) * mass[:, -1])[:, None]) & (weights > 0)
    first = torch.where(above, ids, vocab_size).amin(-1)
    last = torch.where(weights > 0, ids, 0).amax(-1)  # rounding may have put the target beyond the sum
    tokens[drawn] = torch.minimum(first, last)
    return tokens


def _kept(logits: torch.Tensor, weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Which tokens the filters keep. weights: float64, the most likely token's is 1."""
    top_k, top_p, min_p = (numbers[:, column, None].double() for column in (TOP_K, TOP_P, MIN_P))
    values, order = logits.sort(dim=-1, descending=True, stable=True)
    sorted_weights = weights.gather(1, order)
    place = torch.arange(logits.shape[1], device=logits.device)
    kept = (sorted_weights >= min_p) & ((place < top_k) | (top_k == 0))
    mass = (sorted_weights * kept).cumsum(-1)
    ahead = mass - sorted_weights * kept
    ahead[:, 1:].masked_fill_(values[:, 1:] == values[:, :-1], 0.0)
    ahead = ahead.cummax(-1).values  # equal tokens have the same tokens ahead of them
    kept &= (ahead < top_p * mass[:, -1:]) | (top_p >= 1.0)
    return torch.zeros_like(kept).scatter_(1, order, kept)
