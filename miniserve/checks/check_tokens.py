"""`miniserve check`: compare the engine's tokens with those of transformers, whose models are the reference.

Greedy tokens of two correct implementations may differ where the two best logits are nearly equal. To tell a fault from
rounding, look at how far the chosen token's logit is below transformers' best one, and how far that leads its second.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from miniserve.checks.check_paths import AttentionPath
from miniserve.config import EngineConfig
from miniserve.core import SamplingParams
from miniserve.llm import LLM

PROMPTS = (
    "The capital of France is",
    "One, two, three, four, five, six, seven,",
    "def fibonacci(n):\n",
    "Once upon a time there was a girl who lived with her mother in a small house at the edge of a wood. " * 12,
)
# By how much of the logits' spread (largest less mean) a token may be below the best of transformers.
TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 4e-2}
FP8_TOLERANCE = 0.15


@dataclass(frozen=True, slots=True)
class Verdict:
    """diverges_at: index of the first generated token that transformers would not choose after the same tokens, None if
    there is none. At that token, gap: transformers' best logit minus the chosen token's; margin: its best minus its
    second best. worst: the largest gap of any token, as a share of the logits' spread there."""

    diverges_at: int | None
    gap: float
    margin: float
    worst: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt's answer on one path. allowed: limit of the verdict's worst gap."""

    path: str
    prompt_tokens: int
    tokens: int
    verdict: Verdict
    allowed: float

    @property
    def ok(self) -> bool:
        return self.verdict.worst <= self.allowed

    def sentence(self) -> str:
        """For people."""
        what, verdict = f"{self.path}: prompt of {self.prompt_tokens} tokens", self.verdict
        if verdict.diverges_at is None:
            return f"{what}: all {self.tokens} tokens match transformers"
        return (
            f"{what}: token {verdict.diverges_at} of {self.tokens} is the first that differs: its logit is "
            f"{verdict.gap:.3g} below transformers' best, which leads the second best by {verdict.margin:.3g}; the "
            f"largest gap of any token is {verdict.worst:.2%} of the logits' spread ({self.allowed:.2%} allowed)"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ok": self.ok}


@dataclass(frozen=True, slots=True)
class Answers:
    """What the engine generated over a path: (prompt, answer) in token ids, by which model in which dtype."""

    path: AttentionPath
    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    model_path: str
    dtype: str


def compare_paths(
    config: EngineConfig, paths: Sequence[AttentionPath], device: torch.device, max_tokens: int
) -> list[Comparison]:
    """Compare the engine's greedy answers to `PROMPTS` over each path, of `max_tokens` each, with transformers."""
    answers = [_generate(config, path, max_tokens) for path in paths]
    return compare(answers, device) if answers else []


def _generate(config: EngineConfig, path: AttentionPath, max_tokens: int) -> Answers:
    """The engine and its memory are freed when this returns."""
    print(f"generating over {path}", file=sys.stderr)
    chosen = {"attention_backend": path.backend, "kv_layout": path.layout, "kv_cache_dtype": path.kv_cache_dtype}
    engine = LLM(progress=False, **asdict(config) | chosen)
    longest = engine.info.max_model_len - max_tokens
    prompts = [engine.tokenizer.encode(prompt)[:longest] for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    found = engine.generate(prompts, params, progress=False)
    pairs = tuple((tuple(each.prompt_token_ids), tuple(each.outputs[0].token_ids)) for each in found)
    answers = Answers(path, pairs, engine.info.model_path, engine.info.dtype)
    del engine
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return answers


def compare(answers: Sequence[Answers], device: torch.device) -> list[Comparison]:
    """Compare each answer, token by token, with transformers' model. Equal answers are compared once."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    place, dtype = answers[0].model_path, answers[0].dtype
    model: Any = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, dtype), local_files_only=True)
    model.to(device).eval()
    judged = functools.cache(lambda prompt, answer: judge(model, prompt, answer, device))
    comparisons = []
    with torch.inference_mode():
        for each in answers:
            tolerance = FP8_TOLERANCE if each.path.kv_cache_dtype == "fp8" else TOLERANCE[dtype]
            for prompt, answer in each.pairs:
                verdict = judged(prompt, answer)
                comparisons.append(Comparison(str(each.path), len(prompt), len(answer), verdict, tolerance))
    return comparisons


def judge(model: Any, prompt: Sequence[int], answer: Sequence[int], device: torch.device) -> Verdict:
    """Compare an answer with what transformers' `model` predicts at each of its tokens."""
    ids = torch.tensor([[*prompt, *answer]], device=device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
    taken = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    best, second = logits.topk(2).values.unbind(1)
    gaps, margins = best - taken, best - second
    worst = float((gaps / (best - logits.mean(dim=1))).max())
    differs = (gaps > 0).nonzero()
    if not len(differs):
        return Verdict(None, 0.0, float(margins.min()), worst)
    at = int(differs[0])
    return Verdict(at, float(gaps[at]), float(margins[at]), worst)
