"""The engine's own paged kernels as an object that backends are given: Triton's on a GPU, PyTorch's for tests.

What each takes and returns is said where Triton's are, in `miniserve.kernels.triton`; PyTorch's take the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.formula import attention_by_formula, visible_keys
from miniserve.attention.layouts import LAYOUTS, KVCache
from miniserve.attention.spec import AttentionSpec
from miniserve.kernels.triton.launch import cdiv, choose_splits, decode_launch

AllocateScratch = Callable[[Sequence[tuple[int, int]], int, int, torch.device], object]


@dataclass(frozen=True, slots=True)
class PagedKernels:
    """allocate_scratch(launches as (rows, num_splits), num_heads, head_dim, device): what splits leave for the merge;
    None where decode never splits a row. linearize: None where no cache is copied."""

    paged_decode: Callable[..., Tensor]
    paged_extend: Callable[..., Tensor]
    write_kv: Callable[..., None]
    linearize: Callable[..., tuple[Tensor, Tensor]] | None
    rope_and_write: Callable[..., Tensor]
    allocate_scratch: AllocateScratch | None


def triton_kernels() -> PagedKernels:
    """Needs Triton, and a GPU (or Triton's interpreter) to run them."""
    from miniserve.kernels.triton.cache_write import rope_and_write, write_kv
    from miniserve.kernels.triton.linearize import linearize
    from miniserve.kernels.triton.paged_decode import paged_decode
    from miniserve.kernels.triton.paged_extend import paged_extend
    from miniserve.kernels.triton.split_kv import DecodeScratch

    return PagedKernels(paged_decode, paged_extend, write_kv, linearize, rope_and_write, DecodeScratch.allocate)


def torch_kernels() -> PagedKernels:
    """The same in PyTorch, for a platform that is emulated on a CPU."""
    return PagedKernels(_torch_decode, _torch_extend, _torch_write, None, _torch_rope_and_write, None)


class SplitPlan:
    """How many programs share a row's keys, by the step's rows and longest row, and the scratch that takes at most."""

    def __init__(self, kernels: PagedKernels, spec: AttentionSpec, options: BackendOptions) -> None:
        self.scratch: object = None
        self._num_sms = options.platform.compute_units
        self._split = kernels.allocate_scratch is not None
        if kernels.allocate_scratch is None:
            return
        group = spec.num_heads // spec.num_kv_heads
        self._launch = decode_launch(options.platform.vendor, spec.head_dim, spec.kv_dtype.itemsize, group)
        self._head_tiles = spec.num_kv_heads * cdiv(group, self._launch.block_m)
        launches = [(rows, self.splits(rows, options.max_seq_len)) for rows in range(1, options.max_rows + 1)]
        self.scratch = kernels.allocate_scratch(launches, spec.num_heads, spec.head_dim, options.device)

    def splits(self, rows: int, max_seq_len: int) -> int:
        if not self._split:
            return 1
        return choose_splits(rows, self._head_tiles, max_seq_len, self._launch, self._num_sms)


def _torch_decode(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *,
    out: Tensor,
    num_splits: int,
    fresh: int | None,
    scratch: object,
    **terms: Any,
) -> Tensor:
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    return _torch_extend(
        q, key_cache, value_cache, block_tables, starts, seq_lens, max_query_len=1, num_splits=1, out=out, **terms
    )


def _torch_extend(
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
        k, v = layout.read(KVCache(key_cache, value_cache), blocks, torch.float32, k_scale, v_scale)
        k, v = k.flatten(0, 1)[:length], v.flatten(0, 1)[:length]
        position = torch.arange(length)
        visible = visible_keys(position[length - (span.stop - span.start) :, None] - position, window)
        out[span] = attention_by_formula(q[span], k, v, visible, scale=scale, softcap=softcap, sinks=sinks)
    return out


def _torch_write(
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


def _torch_rope_and_write(
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
    q, k = (_norm_rope(x, weight, cos_sin, eps) for x, weight in ((q, q_weight), (k, k_weight)))
    terms: dict[str, Any] = {"block_size": block_size, "shuffled": shuffled, "k_scale": k_scale, "v_scale": v_scale}
    _torch_write(k, v, key_cache, value_cache, slot_mapping, **terms)
    if k_out is not None:
        k_out.copy_(k)
    return q


def _norm_rope(x: Tensor, weight: Tensor | None, cos_sin: Tensor, eps: float) -> Tensor:
    """[T, heads, head_dim], rounded to x's dtype where the Triton kernel rounds."""
    if weight is not None:
        wide = x.float()
        x = weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
