"""What a step takes on this device, learned from those that ran; and from it, how much prefill its decode rows bear.

A step of decode rows alone takes a constant, something for each row and something for each cached token that they read.
Chunks add a constant, something for each of their tokens, more for those beyond what the device computes while it reads
the weights, and something for each key that a token attends to. The weights of both sums follow what is seen by
normalized least mean squares (Widrow and Hoff 1960), so that they hold where the engine works now; and how far slow
steps go beyond what was expected is followed, too, because the bound is meant for them.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

MIN_TOKENS = 64  # that chunks get whatever rows decode beside them, so that every prompt gets on
UNKNOWN_TOKENS = 256  # that they get at most before a step with chunks has been seen
_TILE = 64  # of tokens in chunks: matrix products and graphs take them by so many at once
_MOST_TILES = 1 << 12
_BENDS = (128, 256)  # tokens beyond which one may cost more than before
_SLOW = 0.97  # the bound is for so many of the steps with chunks, not for their mean
_UNAVOIDABLE = 1.25  # times what MIN_TOKENS take: more tokens may take that much, for they cost little beside a launch
_FOLLOW, _FOLLOW_SLOW = 0.2, 0.02  # the share of an error that is put right at once
_LARGEST_ERROR = 0.5  # in steps as expected, so that one odd step moves little


@dataclass(slots=True)
class StepShape:
    """What a step computes: `rows` that decode, with `context` tokens cached for them; `tokens` in chunks, which attend
    to `keys` in all."""

    rows: int
    context: int
    tokens: int = 0
    keys: int = 0

    def add_chunk(self, start: int, tokens: int) -> None:
        """A chunk whose first token is at position `start` of its sequence."""
        self.tokens += tokens
        self.keys += tokens * start + tokens * tokens // 2


class StepCost:
    """Keeps steps with decode rows within `max_ratio` times what they would take without chunks; 0: does not. Where
    the shortest chunk is beyond that already, keeps them near what it takes."""

    def __init__(self, max_ratio: float) -> None:
        self._max_ratio = max_ratio
        self._decode: _Sum | None = None
        self._chunks: _Sum | None = None
        self._slow = 1.05  # how many times as long as expected a slow step takes

    def observe(self, shape: StepShape, seconds: float) -> None:
        """A step took so long, counting the device's wait for it. One without decode rows says nothing here."""
        if not shape.rows or seconds <= 0.0:
            return
        rows = _decode_features(shape)
        if shape.tokens == 0:
            self._decode = self._decode or _Sum([seconds, 0.0, 0.0])
            expected = self._decode.of(rows)
            self._decode.follow(rows, _FOLLOW * _limited(seconds - expected, expected))
        elif self._decode is not None:
            alone, chunks = self._decode.of(rows), _chunk_features(shape.tokens, shape.keys)
            if self._chunks is None:
                self._chunks = _Sum([0.0, max(0.0, seconds - alone) / chunks[1], *(0.0 for _ in chunks[2:])])
            expected = alone + self._chunks.of(chunks)
            self._chunks.follow(chunks, _FOLLOW * _limited(seconds - expected, expected))
            # Up and down by steps that hold each other where a share of _SLOW is below (stochastic approximation of
            # a quantile, Robbins and Monro 1951).
            step = _FOLLOW_SLOW * (_SLOW if seconds > self._slow * expected else _SLOW - 1.0)
            self._slow = max(1.0, self._slow + step)

    def chunk_tokens(self, shape: StepShape, start: int) -> int:
        """How many tokens of a prompt, from position `start` on, may join a step of that shape; may be 0, but not while
        the chunks that it has are shorter than MIN_TOKENS."""
        if not shape.rows or not self._max_ratio:
            return sys.maxsize
        least = max(0, MIN_TOKENS - shape.tokens)
        if self._decode is None or self._chunks is None:
            return max(least, UNKNOWN_TOKENS - shape.tokens)
        added = self._chunks
        room = (self._max_ratio / self._slow - 1.0) * self._decode.of(_decode_features(shape))
        room = max(room, _UNAVOIDABLE * added.of(_chunk_features(MIN_TOKENS, MIN_TOKENS * start)))

        def cost(tiles: int) -> float:
            tokens = tiles * _TILE - shape.tokens
            return added.of(_chunk_features(tiles * _TILE, shape.keys + tokens * start + tokens * tokens // 2))

        first = -(-shape.tokens // _TILE)
        tiles = bisect_right(range(first, _MOST_TILES), room, key=cost) + first - 1
        return max(least, tiles * _TILE - shape.tokens)


class _Sum:
    """weights · features, whose weights are never negative."""

    def __init__(self, weights: list[float]) -> None:
        self._weights = weights

    def of(self, features: Sequence[float]) -> float:
        return sum(w * f for w, f in zip(self._weights, features, strict=True))

    def follow(self, features: Sequence[float], error: float) -> None:
        """Change the weights by the least that makes the sum greater by `error`."""
        scale = error / sum(feature * feature for feature in features)
        self._weights = [max(0.0, w + scale * f) for w, f in zip(self._weights, features, strict=True)]


# Features are counted in units that make them alike in size, or the weights of small ones would never be learned.
def _decode_features(shape: StepShape) -> Sequence[float]:
    return 1.0, shape.rows / 32, shape.context / 65536


def _chunk_features(tokens: int, keys: int) -> Sequence[float]:
    return (1.0, tokens / 256, keys / (1 << 20), *(max(0, tokens - bend) / 256 for bend in _BENDS))


def _limited(error: float, expected: float) -> float:
    limit = _LARGEST_ERROR * expected
    return min(max(error, -limit), limit)
