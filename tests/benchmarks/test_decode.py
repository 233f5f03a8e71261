"""One rank of many in the benchmark of decode steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import miniserve
from benchmarks import decode
from benchmarks.decode import one_rank, uniform_routing
from miniserve.config import EngineConfig
from miniserve.models.description import MoEConfig
from miniserve.models.layers.norm import Residual, RMSNorm
from miniserve.models.layers.ops import Ops
from miniserve.models.layers.routing import Router
from miniserve.parallel.group import Alone
from miniserve.runner import ranks

MODEL = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"
# Qwen3-235B-A22B with its heads and the width of its experts, which 8 ranks cut within a block of 128: 1536 / 8 = 192.
SHAPE: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "torch_dtype": "bfloat16",
    "vocab_size": 1001,
    "max_position_embeddings": 512,
    "head_dim": 128,
    "hidden_size": 256,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 16,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
}
MOE = MoEConfig(num_experts=16, top_k=4, intermediate_size=8, sparse_layers=(True,))
FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}


def test_experts_drawn_for_a_graph_live_as_long_as_their_router() -> None:
    norm, router = RMSNorm(8, 1e-6, torch.float32, Ops(), Alone(0, 1)), Router(8, MOE, Ops())
    norm.replace("weight", torch.ones(8))
    router.replace("weight", torch.ones(16, 8))
    with uniform_routing():
        _, ids = router(norm(Residual(torch.ones(64, 8))))
    assert len(ids.unique()) == 16, "its own weights choose the same experts for all"
    drawn: torch.Tensor = vars(router)["drawn"]
    assert drawn.untyped_storage().data_ptr() == ids.untyped_storage().data_ptr()


def test_one_rank_has_its_part_of_the_weights() -> None:
    config = EngineConfig(device="cpu", load_format="dummy", max_model_len=64, max_num_seqs=2, kv_cache_memory=1 << 20)
    weights = {}
    for size in (1, 4):
        with one_rank(size):
            _, info = ranks.build_ranks(config, MODEL, "tiny")
        assert info.tensor_parallel_size == size
        weights[size] = info.traffic.weights if info.traffic is not None else 0
    assert 0 < weights[4] < weights[1] / 2


@pytest.mark.parametrize("changed", [{}, FP8])
@pytest.mark.parametrize("flags", [[], ["--enable-expert-parallel"]])
def test_one_of_eight_ranks_is_measured_beside_its_floor(
    changed: dict[str, Any],
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | changed))
    found = tmp_path / "found.json"
    command = ["decode", "--model", str(tmp_path), "--rank-of", "8", "--uniform-routing", "--json", str(found), *flags]
    sizes = ["--batch", "1,3", "--input-len", "9", "--output-len", "12"]
    monkeypatch.setattr(sys, "argv", [*command, *sizes])
    decode.main()
    printed = capsys.readouterr().out
    results = json.loads(found.read_text())["results"]
    assert [each["batch"] for each in results] == [1, 3]
    assert all(f" x the floor of {1e3 * each['floor_s']:.3f} ms" in printed for each in results)
    assert "weights" in printed and "sums" not in printed
