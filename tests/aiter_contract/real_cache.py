"""Run as a program: the real Triton kernels of a checkout of aiter (AITER_SRC) that rotate queries and keys and write
the KV cache, in Triton's interpreter on a CPU, against the engine's rope and layouts. Prints a line for each that
agreed.

The interpreter cuts to bfloat16 and rounds to fp8 otherwise than a GPU does. So the planes are compared exactly, where
nothing needs rounding: small integers, turned by cosines and sines that are multiples of a power of two. Turns by a
model's own table are compared in float32, as the kernel hands them out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from attention_reference import Layer
from real_aiter import make_importable

from miniserve.attention.aiter import Aiter
from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.backends.rocm_unified import UnifiedBackend
from miniserve.attention.layouts import LAYOUTS, KVCache, KVLayout
from miniserve.attention.metadata import StepBatch
from miniserve.attention.platform import NAMED_PLATFORMS
from miniserve.attention.spec import AttentionSpec, LatentDims, QKRope
from miniserve.attention.terms import LayerRoute
from miniserve.models.description import RopeConfig
from miniserve.models.layers.ops import rope, rope_interleaved
from miniserve.models.layers.rotary import RotaryEmbedding

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

# KV dtype -> (largest integer, denominator of cosines and sines, scale of an fp8 cache): rotated values have few enough
# bits for the dtype.
EXACT = {torch.bfloat16: (4, 8, None), torch.float8_e4m3fn: (2, 2, (0.5, 2.0))}
ROPES: dict[str, Rotate] = {"halves": rope, "neighbours": rope_interleaved}
MAX_POSITIONS = 512
MANY_TOKENS = 8  # of which on aiter gives a program several heads: its default of 128 takes the interpreter minutes
# heads, KV heads, head_dim, block size, tokens
SHAPES = ((4, 2, 32, 16, 4), (2, 1, 128, 16, 3), (8, 4, 16, 32, MANY_TOKENS))


class Inputs:
    """Of one seed; the integers are in [-largest, largest], cosines and sines in [-1, 1]."""

    def __init__(self, largest: int, denominator: int) -> None:
        self._random = torch.Generator().manual_seed(7)
        self._largest, self._denominator = largest, denominator

    def _integers(self, largest: int, *shape: int) -> torch.Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=self._random).float()

    def tensor(self, *shape: int) -> torch.Tensor:
        return self._integers(self._largest, *shape)

    def table(self, dim: int) -> torch.Tensor:
        """As `RotaryEmbedding.table` is laid out."""
        return self._integers(self._denominator, MAX_POSITIONS, dim) / self._denominator

    def positions(self, tokens: int) -> torch.Tensor:
        return torch.randint(MAX_POSITIONS, (tokens,), generator=self._random)

    def slots(self, tokens: int, num_blocks: int, block_size: int) -> torch.Tensor:
        """Different ones; the second token is not to be written, the first has the last slot."""
        slots = torch.randperm(num_blocks * block_size - 1, generator=self._random)[:tokens]
        slots[0], slots[1] = num_blocks * block_size - 1, -1
        return slots


def check_written(layout: KVLayout, cache: KVCache, want: KVCache) -> None:
    for name in ("key", "value"):
        got_plane, want_plane = getattr(cache, name).float(), getattr(want, name).float()
        assert want_plane.any(), name
        assert torch.equal(got_plane, want_plane), (layout.name, name, int((got_plane != want_plane).sum()))


def check_kv(write: Callable[..., Any], layout_name: str, dtype: torch.dtype, how: str, shape: tuple[int, ...]) -> None:
    """`fused_qk_rope_reshape_and_cache`: q and k as our rope has them, and our `KVLayout.write` of that k and v."""
    heads, kv_heads, head_dim, block_size, tokens = shape
    largest, denominator, scales = EXACT[dtype]
    inputs = Inputs(largest, denominator)
    spec = AttentionSpec(heads, kv_heads, head_dim, 1.0, torch.float32, dtype)
    layout = LAYOUTS[layout_name](block_size)
    num_blocks = tokens // block_size + 3
    cache, want = (layout.allocate(spec, num_blocks, torch.device("cpu")) for _ in range(2))
    q, k, v = inputs.tensor(tokens, heads + 2 * kv_heads, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    slots, positions = inputs.slots(tokens, num_blocks, block_size), inputs.positions(tokens)
    k_scale, v_scale = (None, None) if scales is None else (torch.tensor([scale]) for scale in scales)
    table = inputs.table(head_dim)
    flags = {"is_neox": how == "halves", "flash_layout": layout_name == "linear", "output_zeros": False}
    q_out, k_out, *_ = write(
        q, k, v, cache.key, cache.value, slots, positions, *table.chunk(2, dim=-1), k_scale, v_scale, **flags
    )
    turned_q, turned_k = (ROPES[how](x, table[positions]) for x in (q, k))
    kept = slots >= 0
    assert torch.equal(q_out, turned_q)
    assert torch.equal(k_out[kept], turned_k[kept])
    layout.write(want, turned_k[kept], v[kept], slots[kept], k_scale, v_scale)
    check_written(layout, cache, want)


def check_call(write: Callable[..., Any], layout_name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As the backends call it: q, k and v views of one qkv, angles of the step's tokens, a padding token among them."""
    heads, kv_heads, head_dim, block_size, tokens = shape
    largest, denominator, scales = EXACT[dtype]
    inputs = Inputs(largest, denominator)
    spec = AttentionSpec(heads, kv_heads, head_dim, 1.0, torch.bfloat16, dtype)
    layout = LAYOUTS[layout_name](block_size)
    num_blocks = tokens // block_size + 3
    cache, want = (layout.allocate(spec, num_blocks, torch.device("cpu")) for _ in range(2))
    layer = Layer(spec, None, 0, *(torch.tensor([scale]) for scale in scales or (1.0, 1.0)))
    routes = (LayerRoute("", "", "fused_qk_rope_reshape_and_cache"),)
    options = BackendOptions(
        specs=(spec,),
        routes=routes,
        platform=NAMED_PLATFORMS["mi355x"],
        device=torch.device("cpu"),
        max_rows=2,
        max_seq_len=64,
    )
    aiter = Aiter(**dict.fromkeys(Aiter.__dataclass_fields__) | {"fused_qk_rope_reshape_and_cache": write})
    with patch("miniserve.attention.aiter.load", lambda: aiter):
        backend = UnifiedBackend(layout, options)
    qkv, slots = inputs.tensor(tokens, heads + 2 * kv_heads, head_dim), inputs.slots(tokens, num_blocks, block_size)
    cos_sin = inputs.table(head_dim)[:tokens]
    q, k, v = backend.rope_and_write(
        layer, qkv.flatten(1), QKRope(cos_sin, None, None, 0.0), cache, backend.build(StepBatch(slots))
    )
    kept, (raw_q, raw_k, raw_v) = slots >= 0, qkv.split((heads, kv_heads, kv_heads), dim=1)
    assert torch.equal(q, rope(raw_q, cos_sin))
    assert torch.equal(k[kept], rope(raw_k, cos_sin)[kept])
    assert torch.equal(v, raw_v)
    layout.write(want, k[kept], v[kept], slots[kept], layer.k_scale, layer.v_scale)
    check_written(layout, cache, want)


def check_turns(write: Callable[..., Any], how: str) -> None:
    """By the table that a model with the default rope has."""
    heads, kv_heads, head_dim, block_size, tokens = SHAPES[0]
    layout = LAYOUTS["linear"](block_size)
    spec = AttentionSpec(heads, kv_heads, head_dim, 1.0, torch.float32, torch.bfloat16)
    cache = layout.allocate(spec, 1, torch.device("cpu"))
    x = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=torch.Generator().manual_seed(7))
    q, k, v = x.split((heads, kv_heads, kv_heads), dim=1)
    positions = torch.tensor([0, 1, 130, MAX_POSITIONS - 1])
    table = RotaryEmbedding(RopeConfig(), head_dim, max_positions=MAX_POSITIONS, device=torch.device("cpu")).table
    angles = (positions, *table.chunk(2, dim=-1))
    flags = {"is_neox": how == "halves", "flash_layout": True, "output_zeros": False}
    got = write(q, k, v, cache.key, cache.value, torch.arange(tokens), *angles, None, None, **flags)
    for turned, given in zip(got, (q, k), strict=False):
        torch.testing.assert_close(turned, ROPES[how](given, table[positions]), rtol=1e-6, atol=1e-6)


def check_latent(write: Callable[..., Any], dtype: torch.dtype, how: str, dims: LatentDims) -> None:
    """`fused_qk_rope_cat_and_cache_mla`: absorbed queries with our rope, and our `LatentLayout.write`."""
    heads, block_size, tokens = 4, 16, 3
    largest, denominator, scales = EXACT[dtype]
    inputs = Inputs(largest, denominator)
    rank, width = dims.kv_lora_rank, dims.kv_lora_rank + dims.rope_dim
    spec = AttentionSpec(heads, 1, width, 1.0, torch.float32, dtype, latent=dims)
    layout = LAYOUTS["latent"](block_size)
    cache, want = (layout.allocate(spec, 4, torch.device("cpu")) for _ in range(2))
    q_c, q_pe = inputs.tensor(tokens, heads, width).split((rank, dims.rope_dim), dim=-1)
    kv_c, k_pe = inputs.tensor(tokens, 1, width).split((rank, dims.rope_dim), dim=-1)
    slots, positions, table = inputs.slots(tokens, 4, block_size), inputs.positions(tokens), inputs.table(dims.rope_dim)
    scale = torch.tensor([1.0 if scales is None else scales[0]])
    plane = cache.key.view(-1, 1, width)
    q_out, *_ = write(
        q_c, q_pe, kv_c, k_pe, plane, slots, positions, *table.chunk(2, dim=-1), scale, is_neox=how == "halves"
    )
    turned_q, turned_k = (ROPES[how](x, table[positions]) for x in (q_pe, k_pe))
    assert torch.equal(q_out, torch.cat([q_c, turned_q], dim=-1))
    layout.write(want, kv_c[:, 0], turned_k[:, 0], slots, scale, scale)
    check_written(layout, cache, want)


def main() -> None:
    os.environ["AITER_FUSED_KV_CACHE_MIN_TOKENS"] = str(MANY_TOKENS)
    make_importable("gfx950")  # whose fp8, unlike gfx942's, the interpreter knows
    from aiter.ops.triton.fusions.fused_kv_cache import (
        fused_qk_rope_cat_and_cache_mla,
        fused_qk_rope_reshape_and_cache,
    )

    for dtype in EXACT:
        for layout_name in ("linear", "shuffled"):
            for shape in SHAPES:
                check_call(fused_qk_rope_reshape_and_cache, layout_name, dtype, shape)
                print("agrees: as a backend calls it,", layout_name, dtype, shape, flush=True)
    for how in ROPES:
        check_turns(fused_qk_rope_reshape_and_cache, how)
        print("agrees: the table's turns,", how, flush=True)
        for dtype in EXACT:
            for layout_name in ("linear", "shuffled"):
                for shape in SHAPES:
                    check_kv(fused_qk_rope_reshape_and_cache, layout_name, dtype, how, shape)
                    print("agrees:", layout_name, dtype, how, shape, flush=True)
            for dims in (LatentDims(512, 64, 128, 128), LatentDims(64, 16, 24, 20)):
                check_latent(fused_qk_rope_cat_and_cache_mla, dtype, how, dims)
                print("agrees: latent", dtype, how, dims, flush=True)


if __name__ == "__main__":
    main()
