"""What training a model with routed experts adds: the same sums as the model's own forward, and balance."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, PreTrainedModel

from tools import tiny_models

torch.set_num_threads(1)


class Ends:
    eos_token_id, pad_token_id = 2046, 2047


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    return tiny_models.build_deepseek(Ends())  # type: ignore[arg-type]


def test_the_trained_model_is_what_transformers_loads(model: PreTrainedModel, tmp_path: Path) -> None:
    trained = copy.deepcopy(model).eval()
    for number, layer in enumerate(tiny_models.routed_layers(trained)):
        torch.nn.init.normal_(layer.gate.e_score_correction_bias, std=0.1 + number)
    ids = torch.randint(2048, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = trained(ids).logits
    trained.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(loaded, DeepseekV3ForCausalLM)
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_it_has_the_latent_of_the_large_models_and_fits_ten_megabytes(model: PreTrainedModel) -> None:
    assert 2 * sum(p.numel() for p in model.parameters()) < 9.9e6
    config = model.config
    assert (config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads) == (512, 64, 16)


def test_biases_move_towards_experts_that_got_few_tokens(model: PreTrainedModel) -> None:
    trained = copy.deepcopy(model)
    layers = list(tiny_models.routed_layers(trained))
    assert len(layers) == 3
    ids = torch.randint(2048, (4, 64), generator=torch.Generator().manual_seed(1))
    trained(ids)
    loads = [layer.experts.load.clone() for layer in layers]
    assert all(load.sum() == 2 * ids.numel() for load in loads)
    tiny_models.balance_experts(trained, 0.5)
    for layer, load in zip(layers, loads, strict=True):
        bias = layer.gate.e_score_correction_bias
        assert bias.tolist() == [0.5 if count < 64 else -0.5 if count > 64 else 0.0 for count in load.tolist()]
        assert not layer.experts.load.any()


def test_converting_keeps_the_biases_in_float32(model: PreTrainedModel) -> None:
    trained = copy.deepcopy(model)
    for layer in tiny_models.routed_layers(trained):
        layer.gate.e_score_correction_bias.fill_(0.1)
    tiny_models.convert(trained, torch.bfloat16)
    biases = [layer.gate.e_score_correction_bias for layer in tiny_models.routed_layers(trained)]
    assert all(bias.dtype == torch.float32 and bias.tolist() == torch.full((8,), 0.1).tolist() for bias in biases)
    assert trained.lm_head.weight.dtype == torch.bfloat16
