"""A step's time on this device, learned from earlier steps, and how much prefill may run beside decode rows.

The time of a step of decode rows alone is modelled as a constant, a cost per row and a cost per cached token they read.
Chunks add a constant, a cost per token, a higher one for tokens beyond what the device computes while it reads the
weights, and a cost per key that a token attends to. Both sums are fitted by normalized least mean squares (Widrow and
Hoff 1960), so that they follow the current load. The ratio by which slow steps exceed the estimate is tracked too,
because the bound is meant for them.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

MIN_TOKENS = 64  # that chunks get whatever rows decode beside them, so that every prompt makes progress
UNKNOWN_TOKENS = 256  # that they get at most until a step with chunks has been observed
_TILE = 64  # of tokens in chunks: tile size of matrix products and graphs
_MOST_TILES = 1 << 12
_BENDS = (128, 256)  # tokens beyond which each may cost more
_SLOW = 0.97  # share of the steps with chunks that must keep the bound
_UNAVOIDABLE = 1.25  # times the cost of MIN_TOKENS that more tokens may take: they cost little beside a launch
_FOLLOW, _FOLLOW_SLOW = 0.2, 0.02  # the share of an error that one step corrects
_LARGEST_ERROR = 0.5  # limit of an error, in expected step times, so that an outlier changes little


@dataclass(slots=True)
class StepShape:
    """What a step computes: `rows` that decode, with `context` cached tokens in all; `tokens` in chunks, which attend
    to `keys` in all."""

    rows: int
    context: int
    tokens: int = 0
    keys: int = 0

    def add_chunk(self, start: int, tokens: int) -> None:
        """Add a chunk whose first token is at position `start` of its sequence."""
        self.tokens += tokens
        self.keys += tokens * start + tokens * tokens // 2


class StepCost:
    """Keeps steps with decode rows within `max_ratio` times their time without chunks; 0: no limit. If the shortest
    chunk already exceeds that, keeps them near its time."""

    def __init__(self, max_ratio: float) -> None:
        self._max_ratio = max_ratio
        self._decode: _Sum | None = None
        self._chunks: _Sum | None = None
        self._slow = 1.05  # a slow step's time as a multiple of the estimate

    def observe(self, shape: StepShape, seconds: float) -> None:
        """Learn from a step's time, which includes the device's wait for it. Steps without decode rows are ignored."""
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
            # The steps up and down balance where a share of _SLOW is below (stochastic approximation of a quantile,
            # Robbins and Monro 1951).
            step = _FOLLOW_SLOW * (_SLOW if seconds > self._slow * expected else _SLOW - 1.0)
            self._slow = max(1.0, self._slow + step)

    def chunk_tokens(self, shape: StepShape, start: int) -> int:
        """How many tokens of a prompt, from position `start` on, may join a step of this shape. 0 only if its chunks
        have MIN_TOKENS already."""
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
    """weights · features; the weights are never negative."""

    def __init__(self, weights: list[float]) -> None:
        self._weights = weights

    def of(self, features: Sequence[float]) -> float:
        return sum(w * f for w, f in zip(self._weights, features, strict=True))

    def follow(self, features: Sequence[float], error: float) -> None:
        """Make the smallest change to the weights that raises the sum by `error`."""
        scale = error / sum(feature * feature for feature in features)
        self._weights = [max(0.0, w + scale * f) for w, f in zip(self._weights, features, strict=True)]


# Features are scaled to similar sizes, or the weights of small ones would never be learned.
def _decode_features(shape: StepShape) -> Sequence[float]:
    return 1.0, shape.rows / 32, shape.context / 65536


def _chunk_features(tokens: int, keys: int) -> Sequence[float]:
    return (1.0, tokens / 256, keys / (1 << 20), *(max(0, tokens - bend) / 256 for bend in _BENDS))


def _limited(error: float, expected: float) -> float:
    limit = _LARGEST_ERROR * expected
    return min(max(error, -limit), limit)
