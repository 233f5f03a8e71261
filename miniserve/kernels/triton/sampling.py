# mypy: allow-untyped-defs, disable-error-code="no-untyped-call"
"""Draws a step's tokens from its logits as `kernels.sampling` defines it, on the device and without a sort.

The Gumbel-max trick would need a random number for every token of the vocabulary; by inversion of the CDF a CPU draws
the same token from the same number.

Three kernels, of which only the first reads all logits. It applies the masks and reduces every block of 64 logits to
its maximum and the sum of its weights. The second has one program per row: it draws from these sums for a row without
filters, or else finds which blocks can hold a token that the filters keep. k blocks have a maximum at or above the k-th
largest of all maxima, so no token below that is among the k largest; for a nucleus the same holds with the maxima's
weights for the count. The third reads only these blocks, and finds the bound of a filter by bisection over the ordered
bits of a float, which is exact after as many halvings as there are bits (as in RTop-K, Xie et al., 2024). Sums are
taken block by block in an order that depends only on the row, so that a row's token does not depend on its batch.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl

from miniserve.kernels import sampling
from miniserve.kernels.sampling import RowMasks, RowParams
from miniserve.kernels.step_tensors import RowState
from miniserve.kernels.triton.pdl import launch_options, start, wait

_BLOCK = 64
_TILE = 4096  # logits that one program reads at once
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of a float32 converted from one of these

_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _LEFT = (
    tl.constexpr(column)
    for column in (sampling.TEMPERATURE, sampling.TOP_K, sampling.TOP_P, sampling.MIN_P, sampling.WANTS_LOGITS)
)
_COLUMNS = tl.constexpr(sampling.NUM_COLUMNS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3e38)  # stands in for the maximum of a row of -inf, from which nothing can be subtracted
_NO_WEIGHT = tl.constexpr(2e-38)  # relative to the best token's 1; a smaller weight is never drawn
_ORDER_OF_MINUS_INF = tl.constexpr(-0x7F800001)
_NUMBERS_PER_POSITION = tl.constexpr(sampling.NUMBERS_PER_POSITION)
_GAMMA, _MIX_1, _MIX_2 = (tl.constexpr(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@triton.jit
def _uniform(key, position):
    """As `sampling.uniform`: one float64 in [0, 1)."""
    bits = (position * _NUMBERS_PER_POSITION + 1).to(tl.uint64) * _GAMMA + key.to(tl.uint64)
    bits = (bits ^ (bits >> 30)) * _MIX_1
    bits = (bits ^ (bits >> 27)) * _MIX_2
    return ((bits ^ (bits >> 31)) >> 11).to(tl.float64) * (2.0**-53)


@triton.jit
def _order(x):
    """int32 that sort as the float32 `x` do."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # the sum turns -0.0 into 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(key, SHIFT: tl.constexpr):
    """The smallest float32 whose `_order` has the bits of `key` (int64) above the lowest SHIFT."""
    bits = tl.maximum(key << SHIFT, _ORDER_OF_MINUS_INF).to(tl.int32)  # below that are NaNs
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _first_above(weights, target, SIZE: tl.constexpr):
    """The first index at which the running sum of the float64 `weights` exceeds the target, never one of weight 0; the
    last of weight > 0 if rounding puts the target beyond the sum."""
    places = tl.arange(0, SIZE)
    found = (tl.cumsum(weights, 0) > target) & (weights > 0.0)
    last = tl.max(tl.where(weights > 0.0, places, 0), axis=0)
    return tl.minimum(tl.min(tl.where(found, places, SIZE), axis=0), last)


@triton.jit
def _hand_over(token, index, row, vocab_size, last_ptr, outputs_ptr, tokens_ptr, ADVANCE: tl.constexpr):
    token = tl.minimum(token, vocab_size - 1).to(tl.int64)  # only a row of NaNs could point beyond
    tl.store(tokens_ptr + index, token)
    if ADVANCE:
        tl.store(last_ptr + row, token)
        tl.store(outputs_ptr + row, tl.load(outputs_ptr + row) + 1)


@triton.jit
def _number(keys_ptr, outputs_ptr, index, row, ADVANCE: tl.constexpr):
    """The random number of the token to draw. outputs_ptr: per row if ADVANCE, else per entry."""
    place = row if ADVANCE else index
    return _uniform(tl.load(keys_ptr + row), tl.load(outputs_ptr + place))


@triton.jit(do_not_specialize=["width"])  # which is a tokenizer's, and known when its first mask comes
def _summarise_kernel(
    logits_ptr, rows_ptr, numbers_ptr, left_ptr, bits_ptr, places_ptr, maxima_ptr, sums_ptr, vocab_size, num_blocks,
    width,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, LEAVE: tl.constexpr, LEFT_ONLY: tl.constexpr, MASKED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    start(PDL)
    wait(PDL)
    index = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + index)
    if row < 0:
        return
    blocks = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    ids = blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    raw = tl.load(logits_ptr + index * vocab_size + ids, mask=ids < vocab_size, other=float("-inf"))
    numbers_ptr += row * _COLUMNS
    if LEAVE:
        leave = tl.load(numbers_ptr + _LEFT) != 0.0
        if leave:
            tl.store(left_ptr + index * vocab_size + ids, raw, mask=ids < vocab_size)
            return
    if LEFT_ONLY:
        drawn = tl.load(numbers_ptr + _LEFT) == 0.0
        if drawn:
            return
    logits = raw.to(tl.float32)
    if MASKED:
        place = tl.load(places_ptr + index)
        words = blocks[:, None] * (BLOCK // 32) + tl.arange(0, BLOCK // 32)[None, :]
        real = (place >= 0) & (words * 32 < vocab_size)
        bits = tl.load(bits_ptr + place * width + words, mask=real, other=-1)[:, :, None]
        allowed = tl.reshape((bits >> tl.arange(0, 32)[None, None, :]) & 1, (BLOCKS, BLOCK))
        logits = tl.where(allowed != 0, logits, float("-inf"))
        tl.store(logits_ptr + index * vocab_size + ids, logits, mask=(place >= 0) & (ids < vocab_size))
    maxima = tl.max(logits, axis=1)
    tl.store(maxima_ptr + index * num_blocks + blocks, maxima, mask=blocks < num_blocks)
    temperature = tl.load(numbers_ptr + _TEMPERATURE)
    if temperature > 0.0:
        weights = tl.exp2((logits - tl.maximum(maxima, _LOWEST)[:, None]) * (_LOG2_E / temperature))
        tl.store(sums_ptr + index * num_blocks + blocks, tl.sum(weights, axis=1), mask=blocks < num_blocks)


@triton.jit
def _floor(order, top, total, best, scale, top_k, top_p, min_p, vocab_size):
    """Lower bound on `_order >> 16` of every token the filters keep. order: `_order >> 16` of the blocks' maxima; top:
    their weights."""
    # After min_p the sum for top_p is not known yet, and min_p keeps few tokens anyway.
    nucleus = (top_k == 0.0) & (min_p == 0.0)
    need = tl.where(nucleus, top_p * total, top_k)
    measure = tl.where(nucleus, top, 1.0)
    bottom, most = tl.min(order, axis=0) - 1, tl.max(order, axis=0)
    low, high = bottom, tl.where(need > 0.0, most, bottom)
    while low < high:
        middle = (low + high + 1) >> 1
        enough = tl.sum(tl.where(order >= middle, measure, 0.0), axis=0) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    low = tl.where(low > bottom, low, _ORDER_OF_MINUS_INF >> 16)
    # Tokens that weigh less than an even share of what top_p cuts off are outside; half of it allows for rounding.
    share = tl.where(nucleus, 0.5 * (1.0 - top_p) / vocab_size * total, min_p)
    low = tl.maximum(low, (_order(best + tl.log2(tl.maximum(share, _NO_WEIGHT)) / scale) >> 16) - 1)
    return tl.minimum(low, most)


@triton.jit
def _draw_kernel(
    logits_ptr, rows_ptr, keys_ptr, numbers_ptr, last_ptr, outputs_ptr, tokens_ptr, maxima_ptr, sums_ptr,
    chosen_ptr, num_chosen_ptr, floors_ptr, totals_ptr, vocab_size, num_blocks,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, ADVANCE: tl.constexpr, LEAVE: tl.constexpr, LEFT_ONLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The token of a row without filters. For other rows: `chosen`, the blocks that can hold a token that the filters
    keep, in order; `floors`, see `_floor`; `totals`, the maximum and the sum of all weights."""
    start(PDL)
    wait(PDL)
    index = tl.program_id(0).to(tl.int64)
    tl.store(num_chosen_ptr + index, 0)
    row = tl.load(rows_ptr + index)
    if row < 0:
        return
    numbers_ptr += row * _COLUMNS
    if LEAVE:
        leave = tl.load(numbers_ptr + _LEFT) != 0.0
        if leave:
            return
    if LEFT_ONLY:
        drawn = tl.load(numbers_ptr + _LEFT) == 0.0
        if drawn:
            return
    logits_ptr += index * vocab_size
    place, inside = tl.arange(0, SIZE), tl.arange(0, BLOCK)
    real = place < num_blocks
    maxima = tl.load(maxima_ptr + index * num_blocks + place, mask=real, other=float("-inf"))
    best = tl.max(maxima, axis=0)
    temperature = tl.load(numbers_ptr + _TEMPERATURE)
    if temperature == 0.0:
        ids = tl.min(tl.where(maxima == best, place, SIZE), axis=0) * BLOCK + inside
        logits = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        token = tl.min(tl.where(logits == best, ids, vocab_size), axis=0)
        _hand_over(token, index, row, vocab_size, last_ptr, outputs_ptr, tokens_ptr, ADVANCE)
        return
    scale, best = _LOG2_E / temperature, tl.maximum(best, _LOWEST)
    top = tl.exp2((maxima - best) * scale)
    sums = tl.load(sums_ptr + index * num_blocks + place, mask=real, other=0.0)
    mass = (sums * top).to(tl.float64)
    total = tl.sum(mass, axis=0)
    top_k, top_p = tl.load(numbers_ptr + _TOP_K), tl.load(numbers_ptr + _TOP_P)
    min_p = tl.load(numbers_ptr + _MIN_P)
    if (top_k == 0.0) & (top_p >= 1.0) & (min_p == 0.0):
        target = _number(keys_ptr, outputs_ptr, index, row, ADVANCE) * total
        block = _first_above(mass, target, SIZE)
        ids = block * BLOCK + inside
        logits = tl.load(logits_ptr + ids, mask=ids < vocab_size, other=float("-inf")).to(tl.float32)
        target -= tl.sum(tl.where(place < block, mass, 0.0), axis=0)
        token = block * BLOCK + _first_above(tl.exp2((logits - best) * scale).to(tl.float64), target, BLOCK)
        _hand_over(token, index, row, vocab_size, last_ptr, outputs_ptr, tokens_ptr, ADVANCE)
        return
    order = _order(maxima) >> 16
    low = _floor(order, top, total.to(tl.float32), best, scale, top_k, top_p, min_p, vocab_size)
    taken = real & (order >= low)
    tl.store(chosen_ptr + index * num_blocks + tl.cumsum(taken.to(tl.int32), 0) - 1, place, mask=taken)
    tl.store(num_chosen_ptr + index, tl.sum(taken.to(tl.int32), axis=0))
    tl.store(floors_ptr + index, low)
    tl.store(totals_ptr + index * 2, best.to(tl.float64))
    tl.store(totals_ptr + index * 2 + 1, total)


@triton.jit
def _tile(logits_ptr, chosen_ptr, first, num_chosen, vocab_size, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Ids and logits of the chosen blocks from the first-th element on; beyond the last block -inf."""
    place = first + tl.arange(0, TILE)
    real = place < num_chosen * BLOCK
    ids = tl.load(chosen_ptr + place // BLOCK, mask=real, other=0) * BLOCK + place % BLOCK
    logits = tl.load(logits_ptr + ids, mask=real & (ids < vocab_size), other=float("-inf"))
    return ids, logits.to(tl.float32)


@triton.jit
def _weights(logits, best, scale, min_p):
    weights = tl.exp2((logits - best) * scale)
    return tl.where(weights >= min_p, weights, 0.0)


@triton.jit
def _lowest_bar(
    logits_ptr, chosen_ptr, num_chosen, vocab_size, best, scale, min_p, low, high, need,
    COUNT: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The highest key in low … high such that tokens at or above its `_value` number (COUNT) or weigh at least `need`;
    `low` if there is none."""
    while low < high:
        middle = (low + high + 1) >> 1
        bar = _value(middle, SHIFT)
        found = tl.zeros((), tl.float64)
        for first in range(0, num_chosen * BLOCK, TILE):
            _, logits = _tile(logits_ptr, chosen_ptr, first, num_chosen, vocab_size, BLOCK, TILE)
            measure = 1.0 if COUNT else _weights(logits, best, scale, min_p)
            found += tl.sum(tl.where(logits >= bar, measure, 0.0), axis=0).to(tl.float64)
        low = tl.where(found >= need, middle, low)
        high = tl.where(found >= need, high, middle - 1)
    return low


@triton.jit
def _first_surplus(
    logits_ptr, chosen_ptr, num_chosen, vocab_size, low, top_k,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The first of the ids at the bound `low` that no longer fit top_k; vocab_size if all fit."""
    bar, above = _value(low, SHIFT), _value(low + 1, SHIFT)
    room = top_k.to(tl.int32)
    for first in range(0, num_chosen * BLOCK, TILE):
        _, logits = _tile(logits_ptr, chosen_ptr, first, num_chosen, vocab_size, BLOCK, TILE)
        room -= tl.sum((logits >= above).to(tl.int32), axis=0)
    surplus = vocab_size
    for first in range(0, num_chosen * BLOCK, TILE):
        ids, logits = _tile(logits_ptr, chosen_ptr, first, num_chosen, vocab_size, BLOCK, TILE)
        equal = ((logits >= bar) != (logits >= above)).to(tl.int32)
        too_many = (equal > 0) & (tl.cumsum(equal, 0) > room)
        surplus = tl.minimum(surplus, tl.min(tl.where(too_many, ids, vocab_size), axis=0))
        room -= tl.sum(equal, axis=0)
    return surplus


@triton.jit
def _kept(
    logits_ptr, chosen_ptr, first, num_chosen, vocab_size, best, scale, min_p, low, surplus,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Ids and float64 weights of a tile, 0 where a filter has cut the token off."""
    ids, logits = _tile(logits_ptr, chosen_ptr, first, num_chosen, vocab_size, BLOCK, TILE)
    inside = (logits >= _value(low + 1, SHIFT)) | ((logits >= _value(low, SHIFT)) & (ids < surplus))
    return ids, tl.where(inside, _weights(logits, best, scale, min_p), 0.0).to(tl.float64)


@triton.jit
def _filtered_draw_kernel(
    logits_ptr, rows_ptr, keys_ptr, numbers_ptr, last_ptr, outputs_ptr, tokens_ptr,
    chosen_ptr, num_chosen_ptr, floors_ptr, totals_ptr, vocab_size, num_blocks,
    SHIFT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, ADVANCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """SHIFT: how many of a float32's lowest bits are 0 in the logits' dtype."""
    start(PDL)
    wait(PDL)
    index = tl.program_id(0).to(tl.int64)
    num_chosen = tl.load(num_chosen_ptr + index)
    if num_chosen == 0:
        return
    row = tl.load(rows_ptr + index)
    logits_ptr += index * vocab_size
    chosen_ptr += index * num_blocks
    numbers_ptr += row * _COLUMNS
    scale = _LOG2_E / tl.load(numbers_ptr + _TEMPERATURE)
    top_k, top_p = tl.load(numbers_ptr + _TOP_K), tl.load(numbers_ptr + _TOP_P)
    min_p = tl.load(numbers_ptr + _MIN_P)
    best = tl.load(totals_ptr + index * 2).to(tl.float32)
    total = tl.load(totals_ptr + index * 2 + 1)
    low = tl.load(floors_ptr + index).to(tl.int64) << (16 - SHIFT)
    high = (_order(best) >> SHIFT).to(tl.int64)
    surplus = vocab_size
    if top_k > 0.0:
        low = _lowest_bar(
            logits_ptr, chosen_ptr, num_chosen, vocab_size, best, scale, min_p, low, high, top_k.to(tl.float64),
            True, SHIFT, BLOCK, TILE,
        )  # fmt: skip
        surplus = _first_surplus(logits_ptr, chosen_ptr, num_chosen, vocab_size, low, top_k, SHIFT, BLOCK, TILE)
    if top_p < 1.0:
        if (top_k > 0.0) | (min_p > 0.0):
            total = tl.zeros((), tl.float64)
            for first in range(0, num_chosen * BLOCK, TILE):
                _, weights = _kept(
                    logits_ptr, chosen_ptr, first, num_chosen, vocab_size, best, scale, min_p, low, surplus,
                    SHIFT, BLOCK, TILE,
                )  # fmt: skip
                total += tl.sum(weights, axis=0)
        bar = _lowest_bar(
            logits_ptr, chosen_ptr, num_chosen, vocab_size, best, scale, min_p, low, high, top_p * total,
            False, SHIFT, BLOCK, TILE,
        )  # fmt: skip
        surplus = tl.where(bar > low, vocab_size, surplus)
        low = bar
    total = tl.zeros((), tl.float64)
    for first in range(0, num_chosen * BLOCK, TILE):
        _, weights = _kept(
            logits_ptr, chosen_ptr, first, num_chosen, vocab_size, best, scale, min_p, low, surplus, SHIFT, BLOCK, TILE
        )
        total += tl.sum(weights, axis=0)
    target = _number(keys_ptr, outputs_ptr, index, row, ADVANCE) * total
    token, last, seen = vocab_size, 0, tl.zeros((), tl.float64)
    for first in range(0, num_chosen * BLOCK, TILE):
        ids, weights = _kept(
            logits_ptr, chosen_ptr, first, num_chosen, vocab_size, best, scale, min_p, low, surplus, SHIFT, BLOCK, TILE
        )
        found = (seen + tl.cumsum(weights, 0) > target) & (weights > 0.0)
        token = tl.minimum(token, tl.min(tl.where(found, ids, vocab_size), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weights > 0.0, ids, 0), axis=0))
        seen += tl.sum(weights, axis=0)
    token = tl.minimum(token, last)  # rounding may have put the target beyond the sum
    _hand_over(token, index, row, vocab_size, last_ptr, outputs_ptr, tokens_ptr, ADVANCE)


def sample(
    logits: torch.Tensor,
    rows: torch.Tensor,
    params: RowParams,
    tokens: torch.Tensor,
    state: RowState | None = None,
    *,
    num_outputs: torch.Tensor | None = None,
    undrawn: torch.Tensor | None = None,
    left_only: bool = False,
    masks: RowMasks | None = None,
) -> None:
    """Draw a token from each of the logits, [batch, vocab_size] of any float and contiguous, into `tokens` int64
    [batch]. rows: int64 [batch], whose parameters are `params`; nothing is done where it is negative.

    With `state` a token becomes its row's last one; else `num_outputs`, int64 [batch], says how many output tokens come
    before each, and rows may repeat. With `undrawn`, shaped and typed as the logits, no token is drawn for rows that
    want their logits: these are copied there. `left_only` draws for these rows alone, from what was copied. With
    `masks` the logits of forbidden tokens become -inf.
    """
    batch, vocab_size = logits.shape
    num_blocks = triton.cdiv(vocab_size, _BLOCK)
    device = logits.device

    def scratch(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device=device)

    maxima, sums = scratch(num_blocks, dtype=torch.float32), scratch(num_blocks, dtype=torch.float32)
    chosen = (
        scratch(num_blocks, dtype=torch.int32),
        scratch(dtype=torch.int32),
        scratch(dtype=torch.int32),
        scratch(2, dtype=torch.float64),
    )
    advance = state is not None
    outputs = num_outputs if state is None else state.num_outputs
    last = tokens if state is None else state.last_tokens
    row = (rows, params.keys, params.numbers, last, outputs, tokens)
    bits, places = (None, None) if masks is None else (masks.bits, masks.places)
    width = 0 if bits is None else bits.shape[1]
    options = launch_options(device)
    programs = triton.cdiv(num_blocks, _TILE // _BLOCK)
    _summarise_kernel[(batch, programs)](
        logits, rows, params.numbers, undrawn, bits, places, maxima, sums, vocab_size, num_blocks, width,
        BLOCK=_BLOCK, BLOCKS=_TILE // _BLOCK, LEAVE=undrawn is not None, LEFT_ONLY=left_only, MASKED=masks is not None,
        num_warps=4, **options,
    )  # fmt: skip
    _draw_kernel[(batch,)](
        logits, *row, maxima, sums, *chosen, vocab_size, num_blocks, BLOCK=_BLOCK,
        SIZE=triton.next_power_of_2(num_blocks), ADVANCE=advance, LEAVE=undrawn is not None, LEFT_ONLY=left_only,
        num_warps=8, **options,
    )  # fmt: skip
    _filtered_draw_kernel[(batch,)](
        logits, *row, *chosen, vocab_size, num_blocks, SHIFT=_ZERO_BITS.get(logits.dtype, 0), BLOCK=_BLOCK,
        TILE=_TILE, ADVANCE=advance, num_warps=8, **options,
    )  # fmt: skip


def draw(
    logits: torch.Tensor,
    rows: torch.Tensor,
    params: RowParams,
    num_outputs: torch.Tensor,
    masks: RowMasks | None = None,
) -> torch.Tensor:
    """See `sampling.Draw`; nothing is drawn for a negative row."""
    tokens = torch.empty_like(rows)
    sample(logits, rows, params, tokens, num_outputs=num_outputs, masks=masks)
    return tokens


def compile_draw(vocab_size: int, dtype: torch.dtype, params: RowParams) -> None:
    """Compile the kernels for logits in the model's dtype and for edited ones, so that no request waits for that."""
    padding = torch.full((1,), -1, dtype=torch.int64, device=params.keys.device)
    masks = RowMasks(torch.zeros(1, -(-vocab_size // 32), dtype=torch.int32, device=padding.device), padding.int())
    for kind, given in product({dtype, torch.float32}, (None, masks)):
        draw(torch.zeros(1, vocab_size, dtype=kind, device=padding.device), padding, params, padding, given)
