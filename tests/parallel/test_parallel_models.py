"""Every family in parts: the logits of one process, and what all ranks hold has the same bits on all."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import CLASSES, DenseContext, load, random_settings, reference_model, run
from safetensors.torch import load_file, save_file
from thread_ranks import ThreadGroup, run_ranks

from miniserve.attention.layouts import LAYOUTS
from miniserve.core import UserError
from miniserve.models.config import load_model_config
from miniserve.models.description import ModelConfig
from miniserve.models.layers.norm import RMSNorm
from miniserve.models.loader import dummy_weights, load_weights
from miniserve.models.options import BuildOptions
from miniserve.models.registry import build_model, described_model, weight_bytes
from miniserve.parallel.group import Alone, Group
from miniserve.parallel.shard import Shard
from miniserve.runner.traffic import step_traffic

Step = list[tuple[int, torch.Tensor]]  # (sequence, its tokens)
CPU = torch.device("cpu")


def options(group: Group, **settings: Any) -> BuildOptions:
    settings = {"dtype": torch.float32, "kv_dtype": torch.float32} | settings
    return BuildOptions(device=CPU, group=group, **settings)


def case(architecture: str, number: int) -> dict[str, Any]:
    """Settings that no number of ranks divides."""
    settings = random_settings(architecture, number) | {"num_hidden_layers": 2, "max_window_layers": 1}
    return {name: value for name, value in settings.items() if value is not None or name == "q_lora_rank"}


@pytest.mark.parametrize("architecture", CLASSES)
def test_ranks_give_the_logits_of_one_process(architecture: str, tmp_path: Path) -> None:
    sparse = "Moe" in architecture or "Deepseek" in architecture
    for number in range(2):
        path, stacked = tmp_path / str(number), sparse and number == 1
        settings = case(architecture, number)
        reference = reference_model(architecture, settings)
        reference.save_pretrained(path, **({"save_original_format": False} if stacked else {}))
        config = load_model_config(path)
        steps = [[(0, torch.arange(9)), (1, torch.arange(30, 33))], [(0, torch.tensor([7])), (1, torch.tensor([50]))]]
        one, ctx = load(path), DenseContext()
        want = [run(one, ctx, chunks) for chunks in steps]
        for size, expert_parallel in ((2, number == 1), (3, sparse), (4, False)):
            if size > config.most_ranks(expert_parallel=expert_parallel):
                continue
            work = partial(_logits, config, path, steps, expert_parallel=expert_parallel)
            found = run_ranks(size, work)
            for step, whole in enumerate(want):
                logits = torch.cat([logits[step] for logits, _ in found], 1)
                torch.testing.assert_close(logits, whole, rtol=2e-4, atol=2e-4)
            _same_bits(found)
            if size == 3:  # in 16 bits a part is rounded before the sum
                _same_bits(run_ranks(size, partial(work, dtype=torch.bfloat16, kv_dtype=torch.bfloat16)))


def _same_bits(found: list[tuple[list[torch.Tensor], list[torch.Tensor]]]) -> None:
    """The residual stream is that of rank 0 on all ranks, after each half of a layer."""
    assert found[0][1]
    for _, streams in found[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(streams, found[0][1], strict=True))


def _logits(
    config: ModelConfig, path: Path, steps: list[Step], group: ThreadGroup, **settings: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A rank's logits of each step, and the residual stream after each half of a layer. settings: of `BuildOptions`."""
    model = build_model(config, options(group, **settings))
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


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM"])
def test_ranks_draw_the_dummy_weights_of_one_process(architecture: str, tmp_path: Path) -> None:
    settings = random_settings(architecture, 5) | {"num_attention_heads": 6, "num_key_value_heads": 6}
    reference_model(architecture, settings).save_pretrained(tmp_path)
    config = load_model_config(tmp_path)

    def logits(group: Group, expert_parallel: bool) -> torch.Tensor:
        model = build_model(config, options(group, expert_parallel=expert_parallel))
        dummy_weights(model, seed=5)
        return run(model, DenseContext(), [(0, torch.arange(9))])

    want = logits(Alone(), False)
    for expert_parallel in (False, True)[: 1 + (config.moe is not None)]:
        found = torch.cat(run_ranks(3, partial(logits, expert_parallel=expert_parallel)), 1)
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_what_is_wrong_with_a_checkpoint_is_named_on_each_rank_though_another_would_hold_it(tmp_path: Path) -> None:
    settings = random_settings("Qwen3MoeForCausalLM", 5) | {
        "num_experts": 6,
        "mlp_only_layers": [],
        "attention_bias": True,
    }
    reference_model("Qwen3MoeForCausalLM", settings).save_pretrained(tmp_path)
    config, file = load_model_config(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    expert, bias = "model.layers.0.mlp.experts.{}.up_proj.weight", "model.layers.0.self_attn.o_proj.bias"
    changes = {
        f"missing: {expert.format(0)}": {expert.format(0): None},
        f"not part of this architecture: {expert.format(6)}": {expert.format(6): tensors[expert.format(5)].clone()},
        f"{expert.format(1)} has shape": {expert.format(1): tensors[expert.format(1)][:-1].clone()},
        f"missing: {bias}": {bias: None},
    }
    for said, changed in changes.items():
        save_file({name: each for name, each in (tensors | changed).items() if each is not None}, file)
        for rank in range(3):
            model = build_model(config, options(Alone(rank, 3), expert_parallel=True))
            with pytest.raises(UserError, match=re.escape(said)):
                load_weights(model, tmp_path)
    save_file(tensors, file)
    whole = file.read_bytes()
    for torn in (whole[:-2], whole + b"xx"):
        file.write_bytes(torn)
        for rank in range(3):
            model = build_model(config, options(Alone(rank, 3), expert_parallel=True))
            with pytest.raises(UserError, match=re.escape("model.safetensors is not a readable safetensors file")):
                load_weights(model, tmp_path)
            assert all(parameter.is_meta for parameter in model.parameters()), "something was read"


@pytest.mark.parametrize(
    ("expert_parallel", "most"),
    [(False, 12), (True, 6)],
)
def test_more_ranks_than_parts_are_refused(expert_parallel: bool, most: int, tmp_path: Path) -> None:
    changed = {"num_attention_heads": 24, "num_key_value_heads": 24, "hidden_size": 96, "intermediate_size": 97}
    changed |= {"num_experts": 6, "moe_intermediate_size": 12, "mlp_only_layers": []}
    reference_model("Qwen3MoeForCausalLM", random_settings("Qwen3MoeForCausalLM", 5) | changed).save_pretrained(
        tmp_path
    )
    config = load_model_config(tmp_path)
    build_model(config, options(Alone(0, most), expert_parallel=expert_parallel))
    with pytest.raises(UserError, match=rf"can be shared by {most} ranks, not {most + 1}\."):
        build_model(config, options(Alone(0, most + 1), expert_parallel=expert_parallel))


def test_the_weights_and_reads_of_a_rank_are_counted(tmp_path: Path) -> None:
    settings = random_settings("Qwen3MoeForCausalLM", 5) | {"tie_word_embeddings": True, "num_experts": 7}
    reference_model("Qwen3MoeForCausalLM", settings).save_pretrained(tmp_path)
    config = load_model_config(tmp_path)
    layout = LAYOUTS["linear"](16)
    for expert_parallel in (False, True):
        models = [build_model(config, options(Alone(rank, 2), expert_parallel=expert_parallel)) for rank in (0, 1)]
        for rank, model in enumerate(models):
            counted = weight_bytes(
                described_model(config, torch.float32, shard=Shard(rank, 2), expert_parallel=expert_parallel), "cuda"
            )
            assert counted == sum(parameter.nbytes for parameter in model.parameters())
        reads = [step_traffic(model, layout, None) for model in models]
        one = step_traffic(build_model(config, options(Alone())), layout, None)
        assert sum(each.expert for each in reads) == pytest.approx(one.expert, rel=0.01)
        assert all(each.num_experts == 7 for each in reads)
        assert one.weights < sum(each.weights for each in reads) < 2 * one.weights
