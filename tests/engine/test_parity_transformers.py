"""The whole engine gives transformers' log-probabilities and greedy tokens: models of plain attention and MLPs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_parity import check_parity, configurations
from models_support import DENSE

torch.set_num_threads(1)


@pytest.mark.parametrize(("architecture", "number"), configurations(DENSE))
def test_logprobs_and_greedy_tokens_equal_transformers(architecture: str, number: int, tmp_path: Path) -> None:
    check_parity(architecture, number, tmp_path)
