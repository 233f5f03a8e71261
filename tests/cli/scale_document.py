"""The table of docs/SCALE.md that says which models fit on which GPUs, made by `explain`. Run as a program, it renews
it."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path

from known_models import MODELS

from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.checks.explanation import explain
from miniserve.config import EngineConfig
from miniserve.models.config import describe_model

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "SCALE.md"
DEVICES = ("h100", "h200", "mi300x", "mi355x")
SERVED = ("Llama-3.1-8B", "Llama-3.1-70B", "DeepSeek-V2-Lite", "Qwen3-235B-A22B-FP8", "Qwen3-235B-A22B", "DeepSeek-V3")
_HOST = 8  # GPUs


def fit_table() -> str:
    places = [f"{name.upper()}, {NAMED_PLATFORMS[name].memory / 2**30:.0f} GiB" for name in DEVICES]
    rows = [f"| model | {' | '.join(places)} |", "|---|" + "---|" * len(DEVICES)]
    rows += [f"| {name} | {' | '.join(_fit(name, device) for device in DEVICES)} |" for name in SERVED]
    return "\n".join(rows)


def _fit(name: str, device: str) -> str:
    """The fewest GPUs, as a power of 2, and the tokens that their cache has room for."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODELS[name]))
        model = describe_model(Path(directory), name)
    assert not model.missing, name
    for count in (1, 2, 4, 8, 16):
        memory = explain(name, model, EngineConfig(tensor_parallel_size=count), device).memory
        if memory.tokens:
            return f"{count} GPUs, of several hosts" if count > _HOST else _tokens(count, memory.tokens)
    raise AssertionError(name)


def _tokens(count: int, tokens: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}, {tokens / 1000:,.0f}k tokens"


def renewed(text: str) -> str:
    """The document with its table as `explain` has it."""
    marks = "<!-- fits: generated -->", "<!-- /fits -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*{re.escape(marks[1])}", re.DOTALL)
    assert pattern.search(text)
    return pattern.sub(lambda _: f"{marks[0]}\n{fit_table()}\n{marks[1]}", text)


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
