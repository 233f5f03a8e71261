"""Every family in parts: the logits of one process, and what all ranks hold has the same bits on all."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CLASSES, DenseContext, load, random_settings, reference_model, run
from thread_ranks import ThreadGroup, run_ranks

from miniserve.models.config import load_model_config
from miniserve.models.description import ModelConfig
from miniserve.models.layers.norm import RMSNorm
from miniserve.models.loader import load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model

Step = list[tuple[int, torch.Tensor]]  # (sequence, its tokens)
CPU = torch.device("cpu")


def options(group: ThreadGroup, **settings: Any) -> BuildOptions:
    return BuildOptions(dtype=torch.float32, kv_dtype=torch.float32, device=CPU, group=group, **settings)


def case(architecture: str, number: int) -> dict[str, Any]:
    """Settings that no number of ranks divides."""
    settings = random_settings(architecture, number) | {"num_hidden_layers": 2, "max_window_layers": 1}
    return {name: value for name, value in settings.items() if value is not None or name == "q_lora_rank"}


@pytest.mark.parametrize("architecture", CLASSES)
def test_ranks_give_the_logits_of_one_process(architecture: str, tmp_path: Path) -> None:
    sparse = "Moe" in architecture or "Deepseek" in architecture
    for number in range(3):
        path, stacked = tmp_path / str(number), sparse and number == 1
        settings = case(architecture, number)
        reference = reference_model(architecture, settings)
        reference.save_pretrained(path, **({"save_original_format": False} if stacked else {}))
        config = load_model_config(path)
        steps = [[(0, torch.arange(9)), (1, torch.arange(30, 33))], [(0, torch.tensor([7])), (1, torch.tensor([50]))]]
        one, ctx = load(path), DenseContext()
        want = [run(one, ctx, chunks) for chunks in steps]
        sizes = [size for size in (2, 3, 4) if size <= config.num_heads]
        for size, expert_parallel in product(sizes, (False, True)):
            if expert_parallel and (config.moe is None or config.moe.num_experts < size):
                continue
            work = partial(_logits, config, path, steps, expert_parallel=expert_parallel)
            found = run_ranks(size, work)
            for step, whole in enumerate(want):
                logits = torch.cat([logits[step] for logits, _ in found], 1)
                torch.testing.assert_close(logits, whole, rtol=2e-4, atol=2e-4)
            assert found[0][1]
            for _, streams in found[1:]:
                assert all(torch.equal(mine, first) for mine, first in zip(streams, found[0][1], strict=True))


def _logits(
    config: ModelConfig, path: Path, steps: list[Step], group: ThreadGroup, *, expert_parallel: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A rank's logits of each step, and the residual stream after each half of a layer."""
    model = build_model(config, options(group, expert_parallel=expert_parallel))
    load_weights(model, path)
    streams: list[torch.Tensor] = []
    for module in model.modules():
        if isinstance(module, RMSNorm):
            _record(module, streams)
    context = DenseContext()
    return [run(model, context, chunks) for chunks in steps], streams


def _record(norm: RMSNorm, streams: list[torch.Tensor]) -> None:
    add = norm.add

    def recorded(x: Any, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed, stream = add(x, residual)
        streams.append(stream.clone())
        return normed, stream

    norm.add = recorded  # type: ignore[method-assign]
