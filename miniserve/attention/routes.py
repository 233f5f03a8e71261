"""aiter's own routing mirrored, so that it can be told beforehand and corrected where it would give wrong numbers.

`paged_attention_common` runs one of two kernels: the HIP one, or from some batch on the hand-written ASM one
(aiter `ops/attention.py`, `_should_use_asm_kernel`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from miniserve.attention.contracts import MLA_HEADS
from miniserve.attention.metadata import QueryRows
from miniserve.attention.platform import Platform
from miniserve.attention.select import Choice
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import LayerRoute, name_of

# Kernels that rotate q and k, and norm them first where the model does, and store k and v.
ROPE_WRITES = ("fused_qk_rope_reshape_and_cache", "triton rope_and_write")

# Context lengths whose last tile the ASM kernel counts twice: its first loop takes 16 blocks or more for a full tile
# of 256 keys, of which lengths that round up to 16 blocks have fewer.
ASM_WRONG_LENGTHS = (241, 255)
WRONG_LENGTHS = "{}…{}".format(*ASM_WRONG_LENGTHS)  # for people


def least_asm_rows(spec: AttentionSpec, compute_units: int) -> int | None:
    """From how many rows on `paged_attention_common` runs the ASM kernel, for a 16-bit or fp8 cache with its default
    precision; None where there is no ASM kernel whose result can be trusted.

    Over an fp8 cache there are three precisions, of which the lowest loses contexts of a single block, and for more
    than 8 query heads per KV head there is only it.
    """
    most = 8 if spec.fp8_kv else 16
    if spec.head_dim != 128 or spec.num_heads // spec.num_kv_heads > most:
        return None
    return 2 * compute_units // spec.num_heads + 1


def has_wrong_length(rows: QueryRows) -> bool:
    """Whether a row's length (its own token counted) is one the ASM kernel gets wrong, or may be in a captured step."""
    first, last = ASM_WRONG_LENGTHS
    lens = rows.host_seq_lens
    return rows.max_seq_len >= first if lens is None else bool(((lens >= first) & (lens <= last)).any())


def fuses_rope(routes: Sequence[LayerRoute]) -> bool:
    """Whether every layer's write takes q, k and v as they were projected."""
    return all(route.write in ROPE_WRITES for route in routes)


def padded_heads(num_heads: int) -> int:
    """The query heads that aiter's MLA decode is given for a layer's."""
    return next(heads for heads in MLA_HEADS if heads >= num_heads)


def describe_decode(kernel: str, spec: AttentionSpec, platform: Platform) -> str:
    """Which decode kernel at which batch, for people."""
    if kernel == "paged_attention_rocm":
        return "paged_attention_rocm: HIP at any batch"
    if kernel == "mla_decode_fwd":
        heads = padded_heads(spec.num_heads)
        padded = "" if heads == spec.num_heads else f", {spec.num_heads} heads padded to {heads}"
        return f"{kernel}: persistent ASM at any batch{padded}"
    if kernel != "paged_attention_common":
        return kernel
    first = least_asm_rows(spec, platform.compute_units)
    if first is None:
        return f"{kernel}: HIP at any batch, as no ASM kernel can be trusted with this many heads over an fp8 cache"
    return (
        f"{kernel}: from batch {first} ({first} x {spec.num_heads} heads > {2 * platform.compute_units}) ASM, below "
        f"HIP; HIP too where a length is in {WRONG_LENGTHS} or, captured in a graph, may be"
    )


def describe_route(route: LayerRoute, spec: AttentionSpec, platform: Platform) -> str:
    """Which kernels decode, take chunks of prompts and write to the cache, for people."""
    told = f"decode by {describe_decode(route.decode, spec, platform)}; prefill by {route.chunks}"
    if not route.write:
        return told
    what = "rope with cache write" if route.write in ROPE_WRITES else "cache write"
    return f"{told}; {what} by {route.write}"


def describe_routes(choice: Choice) -> list[str]:
    """A sentence for each kind of layer: which kernels run, where these are not the backend's only ones."""
    kinds = Counter(zip(choice.specs, choice.routes, strict=True))
    lines = []
    for (spec, route), count in kinds.items():
        if route.decode in (choice.backend, "triton paged_decode") and len(kinds) == 1:
            continue
        which = "" if len(kinds) == 1 else f"{count} layer{'s' if count > 1 else ''} {_kind(spec)}: "
        lines.append(which + describe_route(route, spec, choice.platform))
    if any(spec.fp8_kv for spec in choice.specs):
        lines.append(f"fp8 KV cache: {name_of(choice.specs[0].kv_dtype)}")
    return lines


def _kind(spec: AttentionSpec) -> str:
    parts = [f"of {spec.num_heads}/{spec.num_kv_heads} heads of {spec.head_dim}"]
    parts += [f"window {spec.sliding_window}"] if spec.sliding_window is not None else []
    parts += ["softcap"] if spec.softcap is not None else []
    parts += ["sinks"] if spec.sinks else []
    return ", ".join(parts)


def window_pair(window: int | None) -> tuple[int, int]:
    """A sliding window of W keys, the query's own among them, as flash and unified attention take it."""
    return (-1, -1) if window is None else (window - 1, 0)


def kv_cache_dtype(kv_dtype: torch.dtype) -> str:
    """The argument of that name of aiter's paged kernels."""
    return "fp8" if kv_dtype.itemsize == 1 else "auto"
