"""A runner for latent attention and routed experts, built the way the engine builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_support import random_settings, reference_model

from miniserve.config import EngineConfig
from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.runner.build import build_runner

torch.set_num_threads(1)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    settings = random_settings("DeepseekV3ForCausalLM", 3)
    reference_model("DeepseekV3ForCausalLM", settings).save_pretrained(tmp_path)
    return tmp_path


def test_the_latent_path_is_chosen_and_its_memory_counted(checkpoint: Path) -> None:
    sizes = {}
    config_of_model = load_model_config(checkpoint)
    assert config_of_model.latent is not None
    for kv_cache_dtype, itemsize in (("auto", 4), ("fp8", 1)):
        config = EngineConfig(device="cpu", max_num_seqs=2, kv_cache_dtype=kv_cache_dtype)
        _, info = build_runner(config, checkpoint, "small")
        assert info.kv_layout == "latent"
        assert info.attention[0].startswith("TORCH_MLA over the latent KV layout")
        latents = info.num_blocks * info.block_size * config_of_model.num_layers
        width = config_of_model.latent.kv_lora_rank + config_of_model.latent.rope_dim
        assert dict(info.memory)["KV cache"] == latents * width * itemsize
        sizes[kv_cache_dtype] = dict(info.memory)
    assert sizes["auto"]["weights"] == sizes["fp8"]["weights"]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"attention_backend": "CPU_ATTN"}, "it has no latent (MLA) attention"),
        ({"kv_layout": "shuffled"}, "this MLA model has one latent for all heads; use latent or auto"),
    ],
)
def test_what_cannot_hold_latents_is_refused(asked: dict[str, str], said: str, checkpoint: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_runner(EngineConfig(device="cpu", **asked), checkpoint, "small")  # type: ignore[arg-type]
    assert said in str(caught.value)
