"""What a step takes on this device, learned from those that ran; and from it, how much prefill its decode rows bear.

A step of decode rows alone takes a constant, something for each row and something for each cached token that they read.
Chunks add a constant (no graph runs such steps), something for each of their tokens and something for each key that a
token attends to. The weights of both sums follow what is seen by normalized least mean squares (Widrow and Hoff 1960),
so that they hold where the engine works now. What chunks add is followed faster upwards than downwards: the bound is
meant for the slowest steps, not for the average.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

MIN_TOKENS = 64  # that chunks get whatever rows decode beside them, so that every prompt gets on
UNKNOWN_TOKENS = 256  # that they get at most before a step with chunks has been seen
_TILE = 64  # of tokens in chunks: matrix products and graphs take them by so many at once
_UNAVOIDABLE = 1.25  # times what MIN_TOKENS take: more tokens may take that much, for they cost little beside a launch
_FOLLOW, _FOLLOW_UP, _FOLLOW_DOWN = 0.2, 0.4, 0.1  # the share of an error that is put right at once
_LARGEST_ERROR = 0.5  # in steps as expected, so that one odd step moves little

Features = tuple[float, float, float]


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
            self._chunks = self._chunks or _Sum([0.0, max(0.0, seconds - alone) / chunks[1], 0.0])
            expected = alone + self._chunks.of(chunks)
            error = _limited(seconds - expected, expected)
            self._chunks.follow(chunks, (_FOLLOW_UP if error > 0.0 else _FOLLOW_DOWN) * error)

    def chunk_tokens(self, shape: StepShape, start: int) -> int:
        """How many tokens of a prompt, from position `start` on, may join a step of that shape; may be 0, but not while
        the chunks that it has are shorter than MIN_TOKENS."""
        if not shape.rows or not self._max_ratio:
            return sys.maxsize
        least = max(0, MIN_TOKENS - shape.tokens)
        if self._decode is None or self._chunks is None:
            return max(least, UNKNOWN_TOKENS - shape.tokens)
        room = (self._max_ratio - 1.0) * self._decode.of(_decode_features(shape))
        shortest = self._chunks.of(_chunk_features(MIN_TOKENS, MIN_TOKENS * start))
        room = max(room, _UNAVOIDABLE * shortest) - self._chunks.of(_chunk_features(shape.tokens, shape.keys))
        if room <= 0.0:
            return least
        # n tokens take n (token + start key) + n² key / 2.
        _, token, key = (weight / unit for weight, unit in zip(self._chunks.weights, _CHUNK_UNITS, strict=True))
        slope = token + start * key
        most = int(2.0 * room / max(slope + math.sqrt(slope * slope + 2.0 * key * room), 1e-12))
        return max(least, (shape.tokens + most) // _TILE * _TILE - shape.tokens)


class _Sum:
    """weights · features, whose weights are never negative."""

    def __init__(self, weights: list[float]) -> None:
        self.weights = weights

    def of(self, features: Features) -> float:
        a, b, c = self.weights
        return a * features[0] + b * features[1] + c * features[2]

    def follow(self, features: Features, error: float) -> None:
        """Change the weights by the least that makes the sum greater by `error`."""
        scale = error / sum(feature * feature for feature in features)
        self.weights = [max(0.0, w + scale * f) for w, f in zip(self.weights, features, strict=True)]


# Features are counted in units that make them alike in size, or the weights of small ones would never be learned.
_DECODE_UNITS = (1.0, 32.0, 65536.0)
_CHUNK_UNITS = (1.0, 256.0, float(1 << 20))


def _decode_features(shape: StepShape) -> Features:
    return 1.0, shape.rows / _DECODE_UNITS[1], shape.context / _DECODE_UNITS[2]


def _chunk_features(tokens: int, keys: int) -> Features:
    return 1.0, tokens / _CHUNK_UNITS[1], keys / _CHUNK_UNITS[2]


def _limited(error: float, expected: float) -> float:
    limit = _LARGEST_ERROR * expected
    return min(max(error, -limit), limit)
