"""Rotary tables equal transformers' at real sizes, for every rope type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CLASSES, DenseContext, load, random_settings, reference_model, run
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from miniserve.models.description import RopeConfig
from miniserve.models.layers.ops import Ops, rope
from miniserve.models.layers.rotary import RotaryEmbedding

torch.set_num_threads(1)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 2.0},
        YARN,
        YARN | {"truncate": False},
        YARN | {"attention_factor": 1.25},
        YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0},
        YARN | {"factor": 1.0},
        LLAMA3,
        LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0},
    ],
    ids=lambda parameters: "-".join(str(value) for value in parameters.values()),
)
@pytest.mark.parametrize("theta", [10000.0, 1000000.0])
def test_table_equals_transformers(parameters: dict[str, Any], head_dim: int, theta: float) -> None:
    config = CLASSES["LlamaForCausalLM"][0](
        head_dim=head_dim, max_position_embeddings=131072, rope_parameters=parameters | {"rope_theta": theta}
    )
    positions = torch.cat([torch.arange(0, 300), torch.tensor([4095, 8192, 32767, 32768, 65535])])
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = RotaryEmbedding(
        RopeConfig(theta=theta, **parameters), head_dim, max_positions=65536, device=torch.device("cpu")
    )(positions)
    expected = torch.cat([cos[0, :, : head_dim // 2], sin[0, :, : head_dim // 2]], -1)
    # At position p a frequency's last bit, 6e-8 of it, is p times that in radians.
    allowed = 1e-6 + 2e-7 * positions[:, None]
    assert ((ours - expected).abs() <= allowed).all()


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    rotary = RotaryEmbedding(RopeConfig(), 64, max_positions=100, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 64, generator=generator).expand(100, 2, 64) for _ in range(2))
    cos_sin = rotary(torch.arange(100))
    q, k = rope(q, cos_sin), rope(k, cos_sin)
    torch.testing.assert_close(q.norm(dim=-1), q[:1].norm(dim=-1).expand(100, 2))
    near, far = (q[7] * k[3]).sum(-1), (q[96] * k[92]).sum(-1)
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "DeepseekV3ForCausalLM"])
def test_angles_are_looked_up_before_embeddings(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the look-up of embeddings, kernels that start before others are done take them for settled."""
    reference_model(architecture, random_settings(architecture, 0)).save_pretrained(tmp_path)
    tables: list[torch.Tensor] = []

    def look_up(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        tables.append(table)
        return functional.embedding(ids, table)

    monkeypatch.setattr(Ops, "look_up", staticmethod(look_up))
    model = load(tmp_path)
    run(model, DenseContext(), [(0, torch.tensor([1, 2]))])
    assert [table is model.model.rotary_emb.table for table in tables] == [True, False]
