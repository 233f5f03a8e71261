"""What the roofline is made of: bytes of a step, the memory's speed, the device's clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from models_support import random_settings, reference_model

from miniserve.attention.layouts import LAYOUTS
from miniserve.core import StepTraffic
from miniserve.models.config import load_model_config
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model
from miniserve.runner import traffic
from miniserve.runner.device_timer import DeviceTimer


def described(path: Path, architecture: str, tied: bool = False, **more: object) -> tuple[StepTraffic, torch.nn.Module]:
    """What we say of a random checkpoint, and transformers' own model of it."""
    settings = random_settings(architecture, 1)
    settings |= {"tie_word_embeddings": tied, **more}
    reference = reference_model(architecture, settings, seed=1)
    reference.save_pretrained(path)
    model = build_model(
        load_model_config(path),
        BuildOptions(dtype=torch.float32, kv_dtype=torch.float32, device=torch.device("cpu"), max_model_len=32),
    )
    layout = LAYOUTS["latent" if model.config.latent is not None else "linear"](16)
    return traffic.step_traffic(model, layout, 5.0), reference


@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_read_once_but_a_table_of_look_ups(tmp_path: Path, tied: bool) -> None:
    told, reference = described(tmp_path, "Qwen3ForCausalLM", tied)
    sizes = {name: parameter.nbytes for name, parameter in reference.named_parameters()}
    assert ("lm_head.weight" in sizes) != tied
    assert told.weights == sum(sizes.values()) - (0 if tied else sizes["model.embed_tokens.weight"])
    assert (told.expert, told.num_experts, told.top_k, told.bandwidth) == (0, 0, 0, 5.0)
    config = reference.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    assert told.kv == [(None, token)]


def test_experts_are_counted_apart(tmp_path: Path) -> None:
    told, reference = described(tmp_path, "Qwen3MoeForCausalLM", decoder_sparse_step=1, mlp_only_layers=[])
    config = reference.config
    sizes = {name: parameter.nbytes for name, parameter in reference.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    assert experts > 0
    assert told.expert * config.num_experts == experts
    assert (told.num_experts, told.top_k) == (config.num_experts, config.num_experts_per_tok)
    # The router is float32, as it is here in the checkpoint.
    assert told.weights == sum(sizes.values()) - experts - sizes["model.embed_tokens.weight"]


def test_latents_are_what_latent_attention_reads(tmp_path: Path) -> None:
    told, reference = described(tmp_path, "DeepseekV2ForCausalLM")
    config = reference.config
    assert told.kv == [(None, config.num_hidden_layers * (config.kv_lora_rank + config.qk_rope_head_dim) * 4)]


def test_layers_with_a_window_are_told_apart(tmp_path: Path) -> None:
    settings = random_settings("MistralForCausalLM", 1)
    settings["sliding_window"] = 9
    reference_model("MistralForCausalLM", settings, seed=1).save_pretrained(tmp_path)
    model = build_model(
        load_model_config(tmp_path),
        BuildOptions(dtype=torch.float32, kv_dtype=torch.bfloat16, device=torch.device("cpu")),
    )
    ((window, size),) = traffic.step_traffic(model, LAYOUTS["linear"](16), None).kv
    assert window == 9
    assert size == sum(2 * spec.num_kv_heads * spec.head_dim * 2 for spec in model.attention_specs)


def test_this_machines_memory_has_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = traffic.measure_bandwidth(torch.device("cpu"))
    assert speed is not None and 1e8 < speed < 1e13

    def refuse() -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(traffic, "_cpu_bandwidth", refuse)
    assert traffic.measure_bandwidth(torch.device("cpu")) is None


@dataclass
class Event:
    """Of a device whose clock the test turns, in milliseconds."""

    clock: list[float]
    at: list[float] = field(default_factory=list)

    def record(self) -> None:
        self.at.append(self.clock[0])

    def synchronize(self) -> None: ...

    def elapsed_time(self, end_event: Event) -> float:
        return end_event.at[-1] - self.at[-1]


def test_a_step_is_read_while_two_later_ones_are_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(clock))
    timer = DeviceTimer()
    steps = []
    for number in range(12):
        clock[0] += 2.0  # the device waits
        timer.start()
        clock[0] += 10.0 + number
        steps.append(timer.end())
        if number >= 1:
            ran, idle = steps[number - 1].seconds()
            assert ran == pytest.approx((10.0 + number - 1) / 1000)
            assert idle == (None if number == 1 else pytest.approx(0.002))
