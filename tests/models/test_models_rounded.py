"""What rounding activations to 8 bits costs the built-in model's score, where its weights are in 8 bits: as GPUs do it
in large steps, of prompts alone or of all that is computed."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from models_support import DenseContext, load, run
from tokenizers import Tokenizer

from miniserve.models.decoder import CausalLM
from miniserve.models.layers.aiter_linear import rounded_groups
from miniserve.models.layers.linear import Linear, LinearMethod
from tools.quantise import CODES, KINDS, quantise
from tools.tiny_data import completion_prompt, problems

MODEL = Path(__file__).parents[2] / "miniserve" / "assets" / "tiny-qwen3"
PROBLEMS = 32


@cache
def documents() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Prompts of held-out problems, and their answers, in tokens."""
    tokenizer, found = Tokenizer.from_file(str(MODEL / "tokenizer.json")), []
    for problem in problems("test", 1, PROBLEMS):
        prompt = completion_prompt(problem)
        first, both = (tokenizer.encode(text).ids for text in (prompt, f"{prompt} {problem.answer}"))
        assert both[: len(first)] == first
        found.append((torch.tensor(first), torch.tensor(both[len(first) :])))
    return found


class Rounding(LinearMethod):
    """What `method` multiplies is rounded first, while `on`: by groups of 128 values, or all of a row."""

    on = True

    def __init__(self, method: LinearMethod, grain: str) -> None:
        self._method, self._grain = method, grain

    def apply(self, layer: Linear, x: torch.Tensor) -> torch.Tensor:
        if self.on and self._grain == "blocks":
            codes, scale = rounded_groups(x, CODES)
            x = codes.float() * scale.repeat_interleave(128, 1)
        elif self.on:
            scale = x.abs().amax(1, keepdim=True).clamp(min=1e-10) / 448.0
            x = (x / scale).to(CODES).float() * scale
        return self._method.apply(layer, x)


def answers(model: CausalLM, *, rounds_answers: bool) -> list[torch.Tensor]:
    """The logits of each token of each answer."""
    context, pairs = DenseContext(), documents()
    Rounding.on = True
    first = run(model, context, [(row, prompt) for row, (prompt, _) in enumerate(pairs)])
    Rounding.on = rounds_answers
    rest = run(model, context, [(row, answer) for row, (_, answer) in enumerate(pairs)])
    begun = first.split([len(prompt) for prompt, _ in pairs])
    going = rest.split([len(answer) for _, answer in pairs])
    return [torch.cat([one[-1:], other[:-1]]) for one, other in zip(begun, going, strict=True)]


def score(logits: list[torch.Tensor]) -> int:
    """How many problems are solved: each token of the answer is the likeliest."""
    right = [each.argmax(1).equal(answer) for each, (_, answer) in zip(logits, documents(), strict=True)]
    return sum(right)


@pytest.mark.parametrize("kind", ["fp8-block", "compressed-dynamic", "quark-kv"])
def test_rounded_activations_keep_the_score(kind: str, tmp_path: Path) -> None:
    quantise(KINDS[kind], MODEL, tmp_path)
    model = load(tmp_path)
    unrounded = answers(model, rounds_answers=False)
    for layer in model.modules():
        if isinstance(layer, Linear) and layer.weights.form is not None:
            layer.method = Rounding(layer.method, layer.weights.form.grain)
    plain = score(answers(load(MODEL), rounds_answers=False))
    assert plain > 0.9 * PROBLEMS
    for everything, off in ((False, 0.02), (True, 0.04)):
        rounded = answers(model, rounds_answers=everything)
        assert score(rounded) >= 0.99 * plain
        got, want = torch.cat(rounded), torch.cat(unrounded)
        assert 1e-3 < (got - want).norm() / want.norm() < off
