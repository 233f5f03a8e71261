"""An AMD GPU on the CPU: `detect_platform` finds the one that the stand-in for aiter computes as, and the engine's
Triton kernels are twins in PyTorch. In this process `stand_in` brings both in; a server is started with `build_runner`
as its `runner_factory` (see serve_emulated.py)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from miniserve.attention import aiter
from miniserve.attention.backends.gathered import merge_into
from miniserve.attention.formula import attention_by_formula, visible_keys
from miniserve.attention.layouts import LAYOUTS, KVCache, LatentLayout, ShuffledLayout, decoded
from miniserve.attention.platform import Platform
from miniserve.attention.spec import LatentRope
from miniserve.config import EngineConfig
from miniserve.core import EngineInfo, Runner
from miniserve.kernels.triton.launch import cdiv
from miniserve.models.layers.ops import Ops
from miniserve.runner import build


def emulated_platform() -> Platform:
    """The GPU that aiter computes as."""
    known = aiter.load()
    return Platform(known.arch, known.compute_units, known.version)


@contextmanager
def emulated_gpu() -> Iterator[None]:
    """What is built inside the block for the CPU is built for that GPU, and goes on running so after it. Its steps are
    no CPU's, to be noted and replayed."""
    found = patch("miniserve.attention.platform._detect_cpu", lambda dtype: emulated_platform())
    with torch_kernels(), found, patch.object(build, "NativeGraphs", lambda *given: None):
        yield


@contextmanager
def torch_kernels() -> Iterator[None]:
    """Backends that are made inside the block get PyTorch's twins of the Triton kernels."""
    with ExitStack() as stack:
        for name, twin in TWINS.items():
            module = importlib.import_module(f"miniserve.kernels.triton.{name.partition('.')[0]}")
            stack.enter_context(patch.object(module, name.partition(".")[2], twin))
        yield


def build_runner(config: EngineConfig, source_path: Path, model_name: str, progress: Any) -> tuple[Runner, EngineInfo]:
    """A `runner_factory`."""
    with emulated_gpu():
        return build.build_runner(config, source_path, model_name, progress)


def torch_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    out: Tensor,
    num_splits: int,
    launch: object,
    fresh: int | None,
    scratch: object,
    **terms: Any,
) -> Tensor:
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    return torch_extend(
        q, key_cache, value_cache, block_tables, starts, seq_lens, max_query_len=1, num_splits=1, out=out, **terms
    )


def torch_extend(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_query_lens: Tensor,
    seq_lens: Tensor,
    *,
    max_query_len: int,
    num_splits: int,
    num_kv_heads: int,
    block_size: int,
    shuffled: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    out: Tensor,
) -> Tensor:
    layout = LAYOUTS["shuffled" if shuffled else "linear"](block_size)
    starts = cu_query_lens.tolist()
    for row, length in enumerate(seq_lens.tolist()):
        span = slice(starts[row], starts[row + 1])
        if not length:
            out[span] = 0
            continue
        blocks = block_tables[row, : cdiv(length, block_size)].long()
        k, v = decoded(layout.gather(KVCache(key_cache, value_cache), blocks), torch.float32, k_scale, v_scale)
        k, v = k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]
        position = torch.arange(length)
        visible = visible_keys(position[length - (span.stop - span.start) :, None] - position, window)
        out[span] = attention_by_formula(q[span], k, v, visible, scale=scale, softcap=softcap, sinks=sinks)
    return out


def torch_write(
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    block_size: int,
    shuffled: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    layout = LAYOUTS["shuffled" if shuffled else "linear"](block_size)
    kept = slot_mapping >= 0
    layout.write(KVCache(key_cache, value_cache), k[kept], v[kept], slot_mapping[kept], k_scale, v_scale)


def torch_rope_and_write(
    qkv: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    shuffled: bool,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    settled: bool,
    k_out: Tensor | None,
) -> Tensor:
    q, k, v = qkv.unflatten(1, (-1, head_dim)).split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    q, k = (norm_rope(x, weight, cos_sin, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    terms: dict[str, Any] = {"block_size": block_size, "shuffled": shuffled, "k_scale": k_scale, "v_scale": v_scale}
    torch_write(k, v, key_cache, value_cache, slot_mapping, **terms)
    if k_out is not None:
        k_out.copy_(k)
    return q


def norm_rope(x: Tensor, weight: Tensor | None, cos_sin: Tensor, eps: float) -> Tensor:
    """[T, heads, head_dim], rounded to x's dtype where the Triton kernel rounds."""
    if weight is not None:
        wide = x.float()
        x = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def torch_linearize(
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    cu_query_lens: Tensor,
    seq_lens: Tensor,
    *,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    layout = ShuffledLayout(key_cache.shape[-2])
    there = torch.arange(block_tables.shape[1]) * layout.block_size < seq_lens[:, None]
    blocks = torch.where(there, block_tables, 0).long().flatten()
    return layout.gather(KVCache(key_cache, value_cache), blocks)


def torch_token_indices(
    block_tables: Tensor, seq_lens: Tensor, starts: Tensor, out: Tensor, *, block_size: int, max_seq_len: int
) -> None:
    for row, length in enumerate(seq_lens.tolist()):
        blocks = block_tables[row, : cdiv(length, block_size), None]
        tokens = (blocks * block_size + torch.arange(block_size)).flatten()[:length]
        out[int(starts[row]) : int(starts[row + 1])] = tokens


def torch_write_latent(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, *, kv_scale: Tensor | None
) -> None:
    cache = KVCache(kv_cache, kv_cache[..., : kv_c.shape[1]])
    LatentLayout(kv_cache.shape[1]).write(cache, kv_c, k_pe, slot_mapping, kv_scale, kv_scale)


def torch_norm_rope_latent(
    q: Tensor,
    latent: Tensor,
    k: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    *,
    interleaved: bool,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    kv_scale: Tensor | None,
    settled: bool,
) -> None:
    found = Ops().norm_rope_latent(q, latent, k, LatentRope(weight, eps, cos_sin, interleaved))
    for tensor, value in zip((q, latent, k), found, strict=True):
        tensor.copy_(value)
    torch_write_latent(latent, k, kv_cache, slot_mapping, kv_scale=kv_scale)


def torch_mla_decode(
    q: Tensor,
    q_pe: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    kv_scale: Tensor | None,
    num_splits: int,
    fresh: int | None,
    scratch: object,
) -> Tensor:
    layout, cache = LatentLayout(kv_cache.shape[1]), KVCache(kv_cache, kv_cache[..., : q.shape[-1]])
    out = torch.zeros_like(q)
    for row, length in enumerate(seq_lens.tolist()):
        blocks = block_tables[row, : cdiv(length, layout.block_size)].long()
        kv_c, k_pe = decoded(layout.gather(cache, blocks), torch.float32, kv_scale, kv_scale)
        kv_c, k_pe = kv_c.flatten(0, 1)[:length], k_pe.flatten(0, 1)[:length]
        weights = ((q[row].float() @ kv_c.T + q_pe[row].float() @ k_pe.T) * scale).softmax(-1)
        out[row] = weights @ kv_c
    return out


TWINS = {
    "paged_decode.paged_decode": torch_decode,
    "paged_extend.paged_extend": torch_extend,
    "cache_write.write_kv": torch_write,
    "cache_write.rope_and_write": torch_rope_and_write,
    "cache_write.write_latent": torch_write_latent,
    "cache_write.norm_rope_latent": torch_norm_rope_latent,
    "elementwise.merge_lse": merge_into,
    "linearize.linearize": torch_linearize,
    "token_indices.token_indices": torch_token_indices,
    "mla_decode.mla_decode": torch_mla_decode,
}
