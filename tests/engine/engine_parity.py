"""The whole engine against transformers, for one model: paged cache, chunked prefill, mixed batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from engine_real import BACKENDS, Setup, generate, make_engine, small_model, tokens
from models_support import CLASSES, LATENT, VOCAB

from miniserve.core import SamplingParams

NUMBERS = range(20)  # of `random_settings`: every head_dim with every kind of rope
NEW_TOKENS = 64
PROMPTS = (23, 9, 40)


def configurations(architectures: Sequence[str]) -> list[tuple[str, int]]:
    """A third of the numbers for each architecture, every head_dim, kind of rope and backend among them; three
    neighbours have all. `tests/models` compares the logits of every architecture with all numbers."""
    return [(name, number) for place, name in enumerate(architectures) for number in NUMBERS[place % 3 :: 3]]


def check_parity(architecture: str, number: int, path: Path) -> None:
    """Log-probabilities of every token and 64 greedy tokens, in every layout."""
    model = small_model(path, architecture, number, native_ops=number % 2 == 0)
    routed = {"experts_implementation": "eager"} if model.config.moe else {}  # the default one takes no odd widths
    reference = CLASSES[architecture][1].from_pretrained(path, dtype=torch.float32, **routed).eval()
    generator = torch.Generator().manual_seed(number)
    prompts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in PROMPTS]
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=VOCAB, prompt_logprobs=VOCAB)
    expected: dict[tuple[int, ...], torch.Tensor] = {}
    for layout in ("linear", "shuffled") if architecture not in LATENT else ("latent",):
        setup = Setup(backend=BACKENDS[number % len(BACKENDS)], layout=layout, max_num_batched_tokens=7)
        engine, _, _ = make_engine(model, setup)
        for prompt, outputs in zip(prompts, generate(engine, [(p, greedy) for p in prompts]), strict=True):
            found = tokens(outputs)
            assert len(found) == NEW_TOKENS
            whole = tuple(prompt + found[:-1])
            if whole not in expected:
                # One pass over our own continuation: equal arg-maxima all along mean equal greedy tokens.
                with torch.no_grad():
                    expected[whole] = reference(torch.tensor([whole])).logits[0]
            logits = expected[whole]
            assert logits[len(prompt) - 1 :].argmax(-1).tolist() == found
            entries = [e for output in outputs for e in (output.prompt_logprobs or [])]
            entries = entries[1:] + [e for output in outputs for e in (output.logprobs or [])]
            ours = torch.empty_like(logits)
            for row, entry in zip(ours, entries, strict=True):
                row[torch.tensor(entry.top_ids)] = torch.tensor(entry.top_logprobs)
            difference = (ours - logits.log_softmax(-1)).abs().max()
            assert difference <= 1e-4 * logits.abs().max()
