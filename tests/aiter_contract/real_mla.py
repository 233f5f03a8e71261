"""Run as a program: latent decode over the real Triton `mla_decode_fwd` of a checkout of aiter (AITER_SRC), in Triton's
interpreter on a CPU, against attention in float64 and TORCH_MLA. Prints a line for each step that agreed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from attention_reference import relative_error
from latent_steps import TOLERANCE, make_latent_step
from real_aiter import make_importable

from miniserve.attention.backends.torch_mla import TorchLatentBackend
from miniserve.attention.layouts import KVCache, KVLayout
from miniserve.attention.metadata import QueryRows
from miniserve.attention.spec import AttentionSpec, LatentDims, LatentLayer

DEEPSEEK, SMALL = LatentDims(512, 64, 128, 128), LatentDims(64, 16, 24, 20)
# (latents, heads, block size, tokens in the cache of each row); aiter splits a row's blocks among 8 programs or more.
CASES = (
    (DEEPSEEK, 16, 16, (0, 15, 16, 130)),
    (DEEPSEEK, 128, 64, (200,)),
    (SMALL, 1, 16, (0, 1, 14, 15, 16, 17, 127, 128)),
    (SMALL, 8, 64, (63, 64, 700)),
    (SMALL, 24, 16, (33, 300)),
    (SMALL, 128, 16, (5, 90)),
)


class RealDecode(TorchLatentBackend):
    """The engine's order of a step, latents, block tables and absorbed queries, given to aiter as they are."""

    def __init__(self, layout: KVLayout, mla_decode_fwd: Callable[..., Any]) -> None:
        super().__init__(layout)
        self._mla_decode_fwd = mla_decode_fwd

    def decode(
        self, layer: LatentLayer, q: torch.Tensor, q_pe: torch.Tensor, cache: KVCache, meta: QueryRows
    ) -> torch.Tensor:
        rows, out = q.shape[0], torch.full(q.shape, torch.nan, dtype=q.dtype)
        self._mla_decode_fwd(
            torch.cat([q, q_pe], -1),
            cache.key[:, :, None],  # one KV head
            out,
            torch.arange(rows + 1, dtype=torch.int32),
            meta.seq_lens,
            int(meta.seq_lens.max()),
            meta.block_tables,
            layer.spec.scale,
            kv_lora_rank=q.shape[-1],
            qk_rope_head_dim=q_pe.shape[-1],
            causal=True,
            q_descale=None,
            kv_descale=None,
        )
        return out


def main() -> None:
    make_importable("gfx942")
    from aiter.ops.triton.attention.mla import mla_decode_fwd

    for dtype in (torch.float32, torch.float16):
        for dims, heads, block_size, cached in CASES:
            spec = AttentionSpec(heads, 1, dims.kv_lora_rank + dims.rope_dim, 0.11, dtype, dtype, latent=dims)
            step = make_latent_step((spec, block_size, [(length, 1) for length in cached], len(cached)), 7)
            padded = step.padded().run(RealDecode(step.layout, mla_decode_fwd))
            got, ours = padded[: len(cached)], step.run(TorchLatentBackend(step.layout))
            to_formula, to_ours = relative_error(got, step.want), relative_error(got, ours.double())
            assert max(to_formula, to_ours) < TOLERANCE[dtype], (dtype, dims, heads, to_formula, to_ours)
            what = f"{str(dtype)[6:]}, {spec.head_dim} wide, {heads} heads, blocks of {block_size}, {cached} cached"
            print(f"agrees: {what}: {to_formula:.1e} off the formula, {to_ours:.1e} off TORCH_MLA", flush=True)


if __name__ == "__main__":
    main()
