"""One rank of many in the benchmark of decode steps."""

from __future__ import annotations

from pathlib import Path

import miniserve
from benchmarks.decode import one_rank
from miniserve.config import EngineConfig
from miniserve.runner import ranks

MODEL = Path(miniserve.__file__).parent / "assets" / "tiny-qwen3"


def test_one_rank_has_its_part_of_the_weights() -> None:
    config = EngineConfig(device="cpu", load_format="dummy", max_model_len=64, max_num_seqs=2, kv_cache_memory=1 << 20)
    weights = {}
    for size in (1, 4):
        with one_rank(size):
            _, info = ranks.build_ranks(config, MODEL, "tiny")
        assert info.tensor_parallel_size == size
        weights[size] = info.traffic.weights if info.traffic is not None else 0
    assert 0 < weights[4] < weights[1] / 2
