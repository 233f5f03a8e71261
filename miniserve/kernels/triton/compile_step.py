"""What `compile_check` compiles of a decode step besides attention: small linears, norms, rope, experts, its ends,
the draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from miniserve.kernels.triton import (
    decode_step,
    elementwise,
    medium_linear,
    moe,
    moe_token,
    norm_router,
    routing,
    sampling,
    small_linear,
)
from miniserve.kernels.triton.small_linear import Chip

_META = torch.device("meta")
_HALF = torch.bfloat16
_ROWS = (1, 8, 16, 32, 64)  # of the buckets, those that small linears cut differently
_PAIRS = (1, 2, 64, 512, 4096)  # tokens of a step with experts, likewise


def _tensor(*shape: int, dtype: torch.dtype = _HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=_META)


def _linear(chip: Chip, m: int, n: int, k: int, gated: bool, dtype: torch.dtype = _HALF) -> Callable[[], object]:
    def launch() -> None:
        tile = small_linear.choose_tile(m, n, k, dtype.itemsize, chip, gated=gated)
        if tile is not None:
            weight = _tensor(n * (2 if gated else 1), k, dtype=dtype)
            small_linear.small_linear(_tensor(m, k), weight, None, tile, small_linear.Workspace(_META), gated=gated)

    return launch


def _medium_linear(chip: Chip, m: int, n: int, k: int, gated: bool) -> Callable[[], object]:
    def launch() -> None:
        tile = medium_linear.choose_medium_tile(m, n, k, _HALF.itemsize, chip, gated=gated)
        if tile is not None:
            weight = _tensor(n * (2 if gated else 1), k)
            medium_linear.medium_linear(_tensor(m, k), weight, None, tile, gated=gated)

    return launch


def _experts(chip: Chip, tokens: int, num_experts: int, top_k: int, middle: int) -> Callable[[], object]:
    w1, w2 = _tensor(num_experts, 2 * middle, 2048), _tensor(num_experts, 2048, middle)
    choice = _tensor(tokens, top_k, dtype=torch.float32), _tensor(tokens, top_k, dtype=torch.int32)

    def launch() -> None:
        if tokens == 1:
            moe_token.token_experts(_tensor(1, 2048), w1, w2, *choice)
            return
        tiles = moe.fitted(moe.choose_tiles(tokens * top_k, num_experts), _HALF.itemsize, chip.shared_bytes)
        moe.experts(_tensor(tokens, 2048), w1, w2, *choice, tiles=tiles)
        parts, x = _tensor(tokens * top_k, 2048, dtype=torch.float32), _tensor(tokens, 2048)
        moe.add_pairs_norm(parts, x if num_experts == 64 else None, x, _tensor(2048), 1e-6)

    return launch


def _route(
    chip: Chip, num_experts: int, top_k: int, groups: int, top_groups: int, sigmoid: bool
) -> Callable[[], object]:
    def launch() -> None:
        bias = _tensor(num_experts, dtype=torch.float32) if sigmoid else None
        choice: dict[str, Any] = {"top_k": top_k, "num_groups": groups, "top_groups": top_groups}
        choice |= {"sigmoid": sigmoid, "normalize": True, "scaling": 2.5, "workspace": small_linear.Workspace(_META)}
        routing.route(_tensor(64, num_experts, dtype=torch.float32), None, bias, **choice)
        if chip.splits:
            routing.route(_tensor(64, 2048), _tensor(num_experts, 2048, dtype=torch.float32), bias, **choice)
            for hidden in (2048, 7168):
                x, weight = _tensor(4, hidden), _tensor(num_experts, hidden, dtype=torch.float32)
                norm_router.add_norm_route(x, x, _tensor(hidden), 1e-6, weight, bias, **choice)

    return launch


def _small_operations() -> None:
    x, weight, cos_sin = _tensor(64, 4096), _tensor(4096), _tensor(64, 128, dtype=torch.float32)
    elementwise.rms_norm(x, weight, 1e-6)
    elementwise.add_rms_norm(x, x, weight, 1e-6)
    elementwise.silu_and_mul(_tensor(64, 24576))
    norm = _tensor(128)
    elementwise.norm_rope(_tensor(64, 6144), cos_sin, norm, norm, 1e-6, num_heads=32, num_kv_heads=8, head_dim=128)
    rope = _tensor(64, 64, dtype=torch.float32)
    elementwise.rope_pair(_tensor(64, 16, 192)[:, :, 128:], _tensor(64, 576)[:, 512:], rope, interleaved=True)


def _step_ends() -> None:
    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return _tensor(*shape, dtype=dtype)

    state = decode_step.RowState(integers(256, 4096, dtype=torch.int32), integers(256), integers(256), integers(256))
    tables = integers(256, 4096, dtype=torch.int32)
    rows, lens = integers(256), integers(256, dtype=torch.int32)
    step = decode_step.StepTensors(rows, integers(256), integers(256), integers(256), lens, tables)
    for explicit in (False, True):
        decode_step.apply_changes(integers(1280, dtype=torch.int32), 256, 16, step, state.tables, explicit=explicit)
        decode_step.advance(state, step, 16, explicit=explicit)
    decode_step.greedy(_tensor(256, 151936), step.rows, state, integers(256))


def _draw(vocab_size: int, dtype: torch.dtype, *, in_graph: bool) -> Callable[[], object]:
    def launch() -> None:
        rows = _tensor(256, dtype=torch.int64)
        state = decode_step.RowState(rows, rows, rows, rows)
        params = sampling.RowParams(rows, rows, _tensor(256, sampling.NUM_COLUMNS, dtype=torch.float32))
        logits = _tensor(256, vocab_size, dtype=dtype)
        if in_graph:
            sampling.sample(logits, rows, params, rows, state, left=logits)
        else:
            sampling.sample(logits, rows, params, rows, num_outputs=rows)

    return launch


def medium_launches(chip: Chip) -> Iterator[tuple[str, Callable[[], object]]]:
    """As `step_launches`, the linear layers of 9 to 256 rows alone."""
    if chip.wgmma:
        for m, n, k in ((16, 4096, 4096), (128, 1024, 2048), (256, 4096, 1024)):
            yield f"bf16 {m} rows {n} x {k}", _medium_linear(chip, m, n, k, False)
        for m, n, k in ((128, 12288, 4096), (256, 3072, 1024), (256, 12288, 4096)):
            yield f"bf16 {m} rows {n} x {k} gated", _medium_linear(chip, m, n, k, True)


def step_launches(chip: Chip) -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, what to launch) for each that differs in generated code, cut for `chip`."""
    for m in _ROWS:
        for n, k in ((6144, 4096), (4096, 12288), (1024, 2048), (151936, 4096)):
            yield f"bf16 {m} rows {n} x {k}", _linear(chip, m, n, k, False)
        for n, k in ((12288, 4096), (3072, 1024)):
            yield f"bf16 {m} rows {n} x {k} gated", _linear(chip, m, n, k, True)
    yield from medium_launches(chip)
    yield "fp32 router", _linear(chip, 16, 128, 2048, False, torch.float32)
    for tokens in _PAIRS:
        yield f"bf16 {tokens} tokens, 8 of 128", _experts(chip, tokens, 128, 8, 768)
    yield "bf16 64 tokens, 6 of 64", _experts(chip, 64, 64, 6, 1408)
    yield "6 of 64 softmax", _route(chip, 64, 6, 1, 1, False)
    yield "8 of 256 sigmoid, 4 of 8 groups", _route(chip, 256, 8, 8, 4, True)
    yield "bf16", _small_operations
    yield "256 rows", _step_ends
    yield "bf16 of 151936", _draw(151936, _HALF, in_graph=True)
    yield "bf16 of 262144", _draw(262144, _HALF, in_graph=True)
    yield "fp32 of 151936", _draw(151936, torch.float32, in_graph=False)
