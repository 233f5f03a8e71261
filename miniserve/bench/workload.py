"""What a server is loaded with: settings, and random prompts and arrival times drawn from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from miniserve.core import UserError

# Short everyday words: with the space before it each is one token in most large vocabularies.
WORDS_TEXT = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use an each which she do how their if will up other about out many "
    "then them these so some her would make like him into time has look two more write go see number no way could "
    "people my than first water been call who oil its now find long down day did get come made may part"
)
WORDS = tuple(WORDS_TEXT.split())
Endpoint = Literal["completions", "chat"]
PromptType = Literal["auto", "ids", "text"]
_LONGEST = 2**24  # above every model's context; longer prompts would take minutes to draw, and then be refused


@dataclass(frozen=True, slots=True)
class Sample:
    """One request to be sent: token ids or text, and how many tokens to ask for."""

    prompt: list[int] | str
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Lengths in tokens. range_ratio r: each length is drawn uniformly from len·(1-r) … len·(1+r); 0 fixes it."""

    input_len: int = 128
    output_len: int = 128
    range_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not (1 <= self.input_len <= _LONGEST and 1 <= self.output_len <= _LONGEST):
            raise UserError(f"--input-len and --output-len must be 1 or more, and at most {_LONGEST}.")
        if not 0.0 <= self.range_ratio < 1.0:
            raise UserError("--range-ratio must be at least 0 and below 1, for example 0.2.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What is to be measured. Either `concurrency` requests are kept in flight (16 where neither is chosen), or
    `request_rate` requests a second arrive as a Poisson process whatever the server does. `timeout` is the most seconds
    without a byte from the server. Raises `UserError` for settings that conflict.
    """

    url: str = "http://127.0.0.1:8000"
    shape: Shape = Shape()
    model: str | None = None
    endpoint: Endpoint = "completions"
    api_key: str | None = None
    num_prompts: int = 100
    concurrency: int | None = None
    request_rate: float | None = None
    warmup: int = 1
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    prompt_type: PromptType = "auto"
    vocab_size: int | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if self.num_prompts < 1 or self.warmup < 0:
            raise UserError("--num-prompts must be 1 or more and --warmup 0 or more.")
        if self.concurrency is None and self.request_rate is None:
            object.__setattr__(self, "concurrency", 16)
        if self.concurrency is not None and self.request_rate is not None:
            raise UserError("Choose one of --concurrency (closed loop) and --request-rate (open loop).")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError("--concurrency must be 1 or more.")
        if self.request_rate is not None and not (self.request_rate > 0 and math.isfinite(self.request_rate)):
            raise UserError("--request-rate must be a positive number of requests a second.")
        if self.endpoint == "chat" and self.prompt_type == "ids":
            raise UserError("The chat endpoint takes text; use --prompt-type text or --endpoint completions.")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError("--vocab-size must be 1 or more.")
        if self.vocab_size is not None and self.sends_text:
            raise UserError("--vocab-size is for prompts of token ids; leave it out for text prompts.")
        if not self.timeout > 0:
            raise UserError("--timeout must be a positive number of seconds.")

    @property
    def sends_text(self) -> bool:
        return self.endpoint == "chat" or self.prompt_type == "text"

    @property
    def root(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")


def _draw(length: int, ratio: float, rng: random.Random) -> int:
    return max(1, rng.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))


def token_prompts(count: int, shape: Shape, ids: Sequence[int], seed: int) -> list[tuple[list[int], int]]:
    """(prompt, output length) pairs of ids drawn from `ids`: a whole vocabulary, `range(vocab_size)`, or known ids."""
    rng = random.Random(seed)
    drawn = []
    for _ in range(count):
        prompt = rng.choices(ids, k=_draw(shape.input_len, shape.range_ratio, rng))
        drawn.append((prompt, _draw(shape.output_len, shape.range_ratio, rng)))
    return drawn


def token_samples(count: int, shape: Shape, ids: Sequence[int], seed: int) -> list[Sample]:
    """`token_prompts` as requests."""
    return [Sample(prompt, output_len) for prompt, output_len in token_prompts(count, shape, ids, seed)]


def text_samples(count: int, shape: Shape, tokens_per_word: float, seed: int) -> list[Sample]:
    """Prompts of random words, about `input_len` tokens long; the server's usage gives the exact number."""
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        words = max(1, round(_draw(shape.input_len, shape.range_ratio, rng) / tokens_per_word))
        text = " ".join(rng.choices(WORDS, k=words))
        samples.append(Sample(text, _draw(shape.output_len, shape.range_ratio, rng)))
    return samples


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds after the start at which requests arrive: a Poisson process of `rate` requests a second."""
    rng = random.Random(seed)
    now = 0.0
    while True:
        yield now
        now += rng.expovariate(rate)
