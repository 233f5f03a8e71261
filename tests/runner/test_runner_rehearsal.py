from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_real import CPU, MAX_LEN, Setup, make_backend, small_model

from miniserve.attention.metadata import StepBatch
from miniserve.runner.rehearsal import rehearse
from miniserve.runner.served import ServedModel

TOKENS, ROWS, BLOCK_SIZE = 96, 12, 16


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "Qwen3MoeForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"]
)
def test_steps_of_all_sizes_run_and_only_the_first_block_is_written(architecture: str, tmp_path: Path) -> None:
    model = small_model(tmp_path, architecture, 1)
    backend = make_backend(model, Setup(block_size=BLOCK_SIZE))
    caches = [backend.layout.allocate(spec, 4, CPU) for spec in model.attention_specs]
    seen: list[StepBatch] = []
    build = backend.build

    def noting(batch: StepBatch) -> Any:
        seen.append(batch)
        return build(batch)

    backend.build = noting  # type: ignore[method-assign]
    layers = list(model.model.layers)
    rehearse(
        ServedModel(model, backend, caches),
        block_size=BLOCK_SIZE,
        max_num_seqs=ROWS,
        max_tokens=TOKENS,
        max_seq_len=MAX_LEN,
    )
    assert list(model.model.layers) == layers
    for cache in caches:
        assert not cache.key[1:].any() and not cache.value[1:].any()
    decodes = [batch.decode for batch in seen if batch.decode is not None]
    assert {1, 2, 3, 4, 6, 8, ROWS} <= {len(rows.seq_lens) for rows in decodes}
    assert {1 + 1, MAX_LEN} <= {rows.max_seq_len for rows in decodes}
    chunks = [group for batch in seen for group in batch.chunks]
    assert max(group.end for group in chunks) == TOKENS
    assert max(group.max_seq_len for group in chunks) == MAX_LEN
    assert {1, 4} <= {len(group.query_lens) for group in chunks}
    assert {False, True} <= {any(group.context_lens) for group in chunks}


@pytest.mark.parametrize(("rows", "tokens", "longest"), [(1, 1, 1), (1, 64, 2), (3, 16, 17)])
def test_it_makes_do_with_little_room(rows: int, tokens: int, longest: int, tmp_path: Path) -> None:
    model = small_model(tmp_path, "Qwen3ForCausalLM", 0)
    backend = make_backend(model, Setup())
    caches = [backend.layout.allocate(spec, 1, CPU) for spec in model.attention_specs]
    rehearse(
        ServedModel(model, backend, caches), block_size=16, max_num_seqs=rows, max_tokens=tokens, max_seq_len=longest
    )
