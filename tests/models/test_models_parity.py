"""Every architecture gives transformers' logits and transformers' greedy tokens, on random small configurations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_support import CLASSES, LENGTH, VOCAB, DenseContext, load, random_settings, reference_model, run

torch.set_num_threads(1)
CONFIGURATIONS = 24
PROMPTS = (23, 9)
NEW_TOKENS = 24


@pytest.mark.parametrize("number", range(CONFIGURATIONS))
@pytest.mark.parametrize("architecture", CLASSES)
def test_logits_and_greedy_tokens_equal_transformers(architecture: str, number: int, tmp_path: Path) -> None:
    reference = reference_model(architecture, random_settings(architecture, number), seed=number)
    reference.save_pretrained(tmp_path, max_shard_size="50KB" if number % 2 else "1GB")
    model = load(tmp_path)
    generator = torch.Generator().manual_seed(number)
    prompts = [torch.randint(VOCAB, (length,), generator=generator) for length in PROMPTS]

    ctx = DenseContext()
    logits = list(run(model, ctx, list(enumerate(prompts))).split(PROMPTS))
    tokens = [[int(part[-1].argmax())] for part in logits]
    for _ in range(NEW_TOKENS - 1):
        step = run(model, ctx, [(i, torch.tensor(row[-1:])) for i, row in enumerate(tokens)])
        for i, row in enumerate(tokens):
            logits[i] = torch.cat([logits[i], step[i : i + 1]])
            row.append(int(step[i].argmax()))

    for i, prompt in enumerate(prompts):
        # One pass of the reference over our own continuation: equal arg-maxima all along mean equal greedy tokens.
        with torch.no_grad():
            expected = reference(torch.cat([prompt, torch.tensor(tokens[i][:-1])])[None]).logits[0]
        assert (logits[i] - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert expected[len(prompt) - 1 :].argmax(-1).tolist() == tokens[i]


@pytest.mark.parametrize("architecture", CLASSES)
def test_chunked_prefill_mixed_with_decode_gives_the_same_logits(architecture: str, tmp_path: Path) -> None:
    settings = random_settings(architecture, 7)
    if architecture != "LlamaForCausalLM":
        settings |= {"sliding_window": 6, "use_sliding_window": True, "max_window_layers": 1}
    reference_model(architecture, settings).save_pretrained(tmp_path)
    model = load(tmp_path)
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    whole = [run(model, DenseContext(), [(0, row)]) for row in ids]

    ctx = DenseContext()
    pieces: list[list[torch.Tensor]] = [[], []]
    for first, second in ((1, 20), (7, 1), (30, 13), (26, 30)):
        start = [ctx.lengths.get(i, 0) for i in (0, 1)]
        counts = (first, second)
        step = run(model, ctx, [(i, ids[i, start[i] : start[i] + counts[i]]) for i in (0, 1)])
        for i, part in enumerate(step.split(counts)):
            pieces[i].append(part)
    for i in (0, 1):
        torch.testing.assert_close(torch.cat(pieces[i]), whole[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", CLASSES)
def test_half_precision_is_as_near_to_float32_as_transformers(
    architecture: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = reference_model(architecture, random_settings(architecture, 3))
    reference.save_pretrained(tmp_path)
    ids = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = reference(ids[None]).logits[0]
        theirs = reference.to(dtype)(ids[None]).logits[0].float()
    ours = run(load(tmp_path, dtype), DenseContext(), [(0, ids)])
    assert (ours - exact).norm() <= 1.2 * (theirs - exact).norm()
