"""The memory plan counts what a step has at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.registry import described_model
from miniserve.runner.build import _activation_bytes
from miniserve.runner.memory import available_bytes
from tools.quantise import KINDS, quantise

ASSETS = Path(__file__).parents[2] / "miniserve" / "assets"
H200, CPU = NAMED_PLATFORMS["h200"], NAMED_PLATFORMS["cpu"]


def test_what_experts_give_is_counted_in_float32() -> None:
    config = load_model_config(ASSETS / "tiny-deepseek")
    assert config.moe is not None
    tokens, moe = 512, replace(config.moe, top_k=6)
    config = replace(config, hidden_size=2048, moe=moe)
    model = described_model(config, torch.bfloat16, H200)
    # Beside the residual stream and what is normed of it: results in float32, and the middle in 16 bits.
    least = tokens * (2 * 2048 * 2 + 6 * 2048 * 4 + 6 * moe.intermediate_size * 2)
    assert least <= _activation_bytes(model, tokens, 1)
    fewer = described_model(replace(config, moe=replace(moe, top_k=5)), torch.bfloat16, H200)
    apart = _activation_bytes(model, tokens, 1) - _activation_bytes(fewer, tokens, 1)
    assert tokens * (2048 * 4 + moe.intermediate_size * 2) <= apart < 2 * tokens * 2048 * 4


def test_a_weight_that_is_widened_for_a_step_is_counted(tmp_path: Path) -> None:
    """Where kernels read codes; a CPU has widened them before, and counts them as weights."""
    quantise(KINDS["fp8-block"], ASSETS / "tiny-qwen3", tmp_path)
    plain, scaled = (load_model_config(path) for path in (ASSETS / "tiny-qwen3", tmp_path))
    largest = 2 * plain.intermediate_size * plain.hidden_size * 2
    for platform, more in ((H200, largest), (CPU, 0)):
        one, other = (described_model(config, torch.bfloat16, platform) for config in (plain, scaled))
        assert _activation_bytes(other, 512, 4) - _activation_bytes(one, 512, 4) == more


def test_a_cpu_has_no_gpu_memory_to_share() -> None:
    assert available_bytes(torch.device("cpu"), None) > 0
    with pytest.raises(UserError, match="--gpu-memory-utilization means nothing on a CPU"):
        available_bytes(torch.device("cpu"), 0.9)
