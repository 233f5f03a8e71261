"""The kernels of a decode step that `compile_check` compiles besides attention: small linears, norms, rope, experts,
the step's begin and end, the draw."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from miniserve.kernels.sampling import NUM_COLUMNS, RowMasks, RowParams
from miniserve.kernels.step_tensors import RowState, StepTensors
from miniserve.kernels.triton import (
    cache_write,
    decode_step,
    elementwise,
    head_linear,
    large_linear,
    medium_linear,
    moe,
    moe_token,
    norm_router,
    reduce_norm,
    rounded_linear,
    routing,
    sampling,
    small_linear,
    widen,
    zero_blocks,
)
from miniserve.kernels.triton.small_linear import Chip

Block = tuple[int, int] | None
Case = tuple[str, Callable[[], object]]  # a name, and a function that launches kernels

META = torch.device("meta")
_HALF = torch.bfloat16
_ROWS = (1, 8, 16, 32, 64)  # the buckets for which small linears have different cuts
_TOKENS = (1, 2, 64, 512, 4096)  # tokens of a step with experts, likewise


def tensor(*shape: int, dtype: torch.dtype = _HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def int32(*shape: int) -> torch.Tensor:
    return tensor(*shape, dtype=torch.int32)


def _linear(chip: Chip, m: int, n: int, k: int, gated: bool, dtype: torch.dtype = _HALF) -> None:
    tile = small_linear.choose_tile(m, n, k, dtype.itemsize, chip, gated=gated)
    if tile is not None:
        weight = tensor(n * (2 if gated else 1), k, dtype=dtype)
        small_linear.small_linear(tensor(m, k), weight, None, tile, small_linear.Workspace(META), gated=gated)


def _medium_linear(chip: Chip, m: int, n: int, k: int, gated: bool) -> None:
    tile = medium_linear.choose_medium_tile(m, n, k, _HALF.itemsize, chip, gated=gated)
    if tile is not None:
        weight = tensor(n * (2 if gated else 1), k)
        medium_linear.medium_linear(tensor(m, k), weight, None, tile, gated=gated)


def _linear_parts(chip: Chip, m: int, n: int, k: int) -> None:
    tile = medium_linear.choose_parts_tile(m, n, k, _HALF.itemsize, chip)
    if tile is not None:
        medium_linear.linear_parts(tensor(m, k), tensor(n, k), tile)


def _experts(chip: Chip, tokens: int, num_experts: int, top_k: int, middle: int) -> None:
    x, w1, w2 = tensor(tokens, 2048), tensor(num_experts, 2 * middle, 2048), tensor(num_experts, 2048, middle)
    choice = tensor(tokens, top_k, dtype=torch.float32), int32(tokens, top_k)
    if tokens == 1:
        moe_token.token_experts(x, w1, w2, *choice)
        return
    tiles = moe.fitted(moe.choose_tiles(tokens * top_k, num_experts, middle), _HALF.itemsize, chip.shared_bytes)
    parts = moe.experts(x, w1, w2, *choice, tiles=tiles)
    if tokens == 4096:
        parts = parts.to(_HALF)  # as `large_experts` gives them
    moe.add_pairs_norm(parts, x if num_experts == 64 else None, x, tensor(2048), 1e-6)


def _scaled_linear(chip: Chip, codes: torch.dtype, m: int, n: int, k: int, block: Block, gated: bool) -> None:
    rows = n * (2 if gated else 1)
    weight = tensor(rows, k, dtype=codes)
    given: dict[str, Any] = {"gated": gated, "scale": _scale(rows, k, block), "block": block}
    medium = medium_linear.choose_scaled_tile(m, n, k, block, chip, gated=gated)
    tile = small_linear.choose_scaled_tile(m, n, k, block, chip, gated=gated)
    if medium is not None:
        medium_linear.medium_linear(tensor(m, k), weight, None, medium, **given)
    if tile is not None:
        small_linear.small_linear(tensor(m, k), weight, None, tile, small_linear.Workspace(META), **given)
    if m == 1:
        widen.widen(weight, given["scale"], block, _HALF)


def _scaled_experts(
    chip: Chip, codes: torch.dtype, tokens: int, middle: int, blocks: tuple[Block, Block], *, rounds: bool = False
) -> None:
    x, shapes = tensor(tokens, 4096), ((128, 2 * middle, 4096), (128, 4096, middle))
    w1, w2 = (tensor(*shape, dtype=codes) for shape in shapes)
    choice = tensor(tokens, 8, dtype=torch.float32), int32(tokens, 8)
    scales = tuple(_scale(*shape, block) for shape, block in zip(shapes, blocks, strict=True))
    given: dict[str, Any] = {"scales": scales, "blocks": blocks}
    if tokens == 1:
        moe_token.token_experts(x, w1, w2, *choice, **given)
        return
    tiles = moe.choose_scaled_tiles(tokens * 8, 128, middle, blocks, splits=chip.wgmma, rounded=rounds)
    tiles = moe.fitted(tiles, 1 if rounds else _HALF.itemsize, chip.shared_bytes)
    moe.experts(x, w1, w2, *choice, tiles=tiles, rounds=rounds, **given)


def _scale(*shape_and_block: Any) -> torch.Tensor:
    *lead, n, k, block = shape_and_block
    shape = (n,) if block is None else (-(-n // block[0]), -(-k // block[1]))
    return tensor(*lead, *shape, dtype=torch.float32)


def _route(chip: Chip, num_experts: int, top_k: int, groups: int, top_groups: int, sigmoid: bool) -> None:
    bias = tensor(num_experts, dtype=torch.float32) if sigmoid else None
    choice: dict[str, Any] = {"top_k": top_k, "num_groups": groups, "top_groups": top_groups}
    choice |= {"sigmoid": sigmoid, "normalize": True, "scaling": 2.5}
    routing.route(tensor(1, 64, num_experts, dtype=torch.float32), bias, **choice)
    weight = tensor(num_experts, 2048, dtype=torch.float32)
    for tokens in (64, 4096):
        routing.route(routing.logit_parts(tensor(tokens, 2048), weight), bias, **choice)
    if chip.splits:
        choice["workspace"] = small_linear.Workspace(META)
        for hidden in (2048, 7168):
            x, weight = tensor(4, hidden), tensor(num_experts, hidden, dtype=torch.float32)
            norm_router.add_norm_route(x, x, tensor(hidden), 1e-6, weight, bias, **choice)


def _small_operations() -> None:
    x, weight, cos_sin = tensor(64, 4096), tensor(4096), tensor(64, 128, dtype=torch.float32)
    elementwise.rms_norm(x, weight, 1e-6)
    elementwise.add_rms_norm(x, x, weight, 1e-6)
    elementwise.silu_and_mul(tensor(64, 24576))
    norm = tensor(128)
    elementwise.norm_rope(tensor(64, 6144), cos_sin, norm, norm, 1e-6, num_heads=32, num_kv_heads=8, head_dim=128)
    rope = tensor(64, 64, dtype=torch.float32)
    heads, kv, latent = tensor(64, 16, 192), tensor(64, 576), (tensor(512), 1e-6)
    cache_write.norm_rope_latent(heads[:, :, 128:], kv[:, :512], kv[:, 512:], *latent, rope, interleaved=True)
    lse = tensor(16, 4096, dtype=torch.float32)
    elementwise.merge_lse(tensor(4096, 16, 128), lse, tensor(4096, 16, 128), lse)
    elementwise.merge_lse(tensor(4096, 16, 128, dtype=torch.float32), lse, tensor(4096, 16, 128), lse)
    for tokens in (1, 16, 64):
        head_linear.head_linear(heads[:tokens, :, :128], tensor(16, 256, 512)[:, :128])
        head_linear.head_linear(tensor(tokens, 16, 512), tensor(16, 256, 512)[:, 128:].mT)


def _reduce_norm(ranks: int, tokens: int, hidden: int, k: int) -> None:
    inboxes = reduce_norm.Inboxes(tensor(ranks, dtype=torch.int64), int32(4), rank=1)
    x, parts = tensor(tokens, hidden), tensor(tokens * k, hidden, dtype=torch.float32)
    inboxes.reduce_norm(x if k == 1 else parts, None if k == 1 else x, x, tensor(hidden), 1e-6)
    inboxes.gather(int32(2, tokens, 37))


def _step_ends() -> None:
    ids, lens, tables = tensor(256, dtype=torch.int64), int32(256), int32(256, 4096)
    state = RowState(tables, ids, ids, ids)
    step = StepTensors(ids, ids, ids, ids, lens, tables)
    for explicit in (False, True):
        decode_step.apply_changes(int32(1280), 256, 16, step, tables, explicit=explicit)
        decode_step.advance(state, step, 16, explicit=explicit)
    decode_step.hand_over(decode_step.best_words(tensor(256, 151936), 0, 151936)[None], ids, state, ids)
    zero_blocks.zero_blocks(tensor(160, 2, dtype=torch.int64), ids, 16)


def _draw(vocab_size: int, dtype: torch.dtype, *, in_graph: bool) -> None:
    rows = tensor(256, dtype=torch.int64)
    state = RowState(rows, rows, rows, rows)
    params = RowParams(rows, rows, tensor(256, NUM_COLUMNS, dtype=torch.float32))
    logits = tensor(256, vocab_size, dtype=dtype)
    masks = RowMasks(int32(256, -(-vocab_size // 32)), int32(256))
    if in_graph:
        sampling.sample(logits, rows, params, rows, state, undrawn=logits)
        sampling.sample(logits, rows, params, rows, state, left_only=True, masks=masks)
    else:
        for given in (None, masks):
            sampling.sample(logits, rows, params, rows, num_outputs=rows, masks=given)


def medium_launches(chip: Chip) -> Iterator[Case]:
    """As `step_launches`, the linear layers of 2 to 256 rows alone."""
    if chip.wgmma:
        for m, n, k in ((16, 4096, 4096), (128, 1024, 2048), (256, 4096, 1024)):
            yield f"bf16 {m} rows {n} x {k}", partial(_medium_linear, chip, m, n, k, False)
        for m, n, k in ((128, 12288, 4096), (256, 3072, 1024), (256, 12288, 4096)):
            yield f"bf16 {m} rows {n} x {k} gated", partial(_medium_linear, chip, m, n, k, True)
        yield "bf16 64 rows 4096 x 12288 in parts", partial(_linear_parts, chip, 64, 4096, 12288)


def scaled_launches(chip: Chip, codes: torch.dtype) -> Iterator[Case]:
    """As `step_launches`, products with weights in 8 bits. codes: as which the hardware reads them."""
    for block in ((128, 128), None):
        for m in (1, 16, 64, 128):
            for n, k, gated in ((6144, 4096, False), (4096, 12288, False), (12288, 4096, True)):
                name = f"fp8 {m} rows {n} x {k}, {'blocks' if block else 'rows'}{' gated' if gated else ''}"
                yield name, partial(_scaled_linear, chip, codes, m, n, k, block, gated)
    square = 128, 128
    for middle, blocks in ((1536, (square, square)), (192, ((64, 128), (128, 64))), (768, (None, None))):
        for tokens in _TOKENS:
            name = f"fp8 {tokens} tokens, 8 of 128 of {middle}"
            yield name, partial(_scaled_experts, chip, codes, tokens, middle, blocks)
        for tokens in (512, 2048, 4096) if chip.wgmma else ():
            name = f"fp8 {tokens} tokens, 8 of 128 of {middle}, rounded"
            yield name, partial(_scaled_experts, chip, codes, tokens, middle, blocks, rounds=True)


def large_launches(chip: Chip) -> Iterator[Case]:
    """As `step_launches`, the products of many rows alone."""
    if chip.wgmma:
        tokens, num_experts, k, middle = 4096, 128, 8, 768
        weights = tensor(num_experts, 2 * middle, 2048), tensor(num_experts, 2048, middle)
        routed = tensor(tokens, k, dtype=torch.float32), int32(tokens, k)
        x = tensor(4096, 12288)
        launch = partial(large_linear.large_experts, tensor(tokens, 2048), *weights, *routed, chip)
        yield "bf16 4096 tokens, 8 of 128", launch
        yield (
            "bf16 4096 rows 12288 x 4096",
            partial(large_linear.large_gated, tensor(4096, 4096), tensor(24576, 4096), chip),
        )
        for group in (rounded_linear.GROUP, None):
            yield f"4096 rows of 12288, groups of {group}", partial(rounded_linear.rounded, x, group, 4096)


def step_launches(chip: Chip) -> Iterator[Case]:
    """Each that differs in generated code, cut for `chip`."""
    for m in _ROWS:
        for n, k in ((6144, 4096), (4096, 12288), (1024, 2048), (151936, 4096)):
            yield f"bf16 {m} rows {n} x {k}", partial(_linear, chip, m, n, k, False)
        for n, k in ((12288, 4096), (3072, 1024)):
            yield f"bf16 {m} rows {n} x {k} gated", partial(_linear, chip, m, n, k, True)
    yield from medium_launches(chip)
    yield from large_launches(chip)
    yield "fp32 router", partial(_linear, chip, 16, 128, 2048, False, torch.float32)
    for tokens in _TOKENS:
        yield f"bf16 {tokens} tokens, 8 of 128", partial(_experts, chip, tokens, 128, 8, 768)
        yield f"bf16 {tokens} tokens, 8 of 128 of 192", partial(_experts, chip, tokens, 128, 8, 192)
    yield "bf16 64 tokens, 6 of 64", partial(_experts, chip, 64, 64, 6, 1408)
    yield "6 of 64 softmax", partial(_route, chip, 64, 6, 1, 1, False)
    yield "8 of 256 sigmoid, 4 of 8 groups", partial(_route, chip, 256, 8, 8, 4, True)
    yield "bf16", _small_operations
    for ranks, tokens, hidden, k in ((2, 256, 4096, 1), (2, 64, 2048, 6), (8, 64, 4096, 8), (8, 1, 7168, 1)):
        yield (
            f"bf16 {tokens} rows of {hidden}, {ranks} ranks, {k} parts",
            partial(_reduce_norm, ranks, tokens, hidden, k),
        )
    yield "256 rows", _step_ends
    for vocab_size in (151936, 262144):
        yield f"bf16 of {vocab_size}", partial(_draw, vocab_size, _HALF, in_graph=True)
    yield "fp32 of 151936", partial(_draw, 151936, torch.float32, in_graph=False)
