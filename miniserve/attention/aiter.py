"""The one importer of AMD's aiter library: lazily, and with one sentence where it cannot be used.

Signatures are those of v0.1.20.post1, https://github.com/ROCm/aiter.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# Older ones let the ASM kernel read other blocks than asked for where a plane is 2 GiB or larger (aiter #3062).
MINIMUM_VERSION = (0, 1, 17)
INSTALL = "docs/ROCM.md says how to install it"


class Unavailable(Exception):
    """aiter cannot be used here; `str(error)` says why and what helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Aiter:
    """What miniserve calls of aiter. arch, compute_units: of the GPU as aiter sees it."""

    version: tuple[int, ...]
    arch: str
    compute_units: int
    paged_attention_v1: Callable[..., Tensor]
    paged_attention_rocm: Callable[..., Tensor]
    paged_attention_common: Callable[..., Tensor]
    flash_attn_varlen_func: Callable[..., tuple[Tensor, Tensor]]
    unified_attention: Callable[..., None]
    fused_qk_rope_reshape_and_cache: Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AiterLatent:
    """What latent (MLA) attention calls of it."""

    compute_units: int
    mla_decode_fwd: Callable[..., object]
    get_mla_metadata_info_v1: Callable[..., tuple[tuple[int | tuple[int, ...], torch.dtype], ...]]
    get_mla_metadata_v1: Callable[..., None]
    flash_attn_varlen_func: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class AiterProducts:
    """What linear layers and routed experts call of it. quant_type: the enumeration of the ways in which weights have
    fewer bits."""

    fused_moe: Callable[..., Tensor]
    shuffle_weight: Callable[[Tensor], Tensor]
    gemm_a8w8_blockscale: Callable[..., Tensor]
    quant_type: Any


@functools.cache
def load() -> Aiter:
    """Import aiter. Raises `Unavailable`."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        raise Unavailable(f"aiter is not installed; {INSTALL}")
    if not any((Path(place) / "ops").is_dir() for place in spec.submodule_search_locations or ()):
        raise Unavailable(f"the installed `aiter` is an unrelated package of that name; uninstall it: {INSTALL}")
    try:
        aiter = importlib.import_module("aiter")
        version = _version()
        unified = importlib.import_module("aiter.ops.triton.attention.unified_attention")
        fused = importlib.import_module("aiter.ops.triton.fusions.fused_kv_cache")
        chip = importlib.import_module("aiter.jit.utils.chip_info")
        arch, compute_units = chip.get_gfx(), chip.get_cu_num()
    except Unavailable:
        raise
    except Exception as error:  # without ROCm it raises RuntimeError, and others from deep within
        raise Unavailable(f"aiter cannot be imported: {type(error).__name__}: {_first_line(error)}") from error
    try:
        return Aiter(
            version=version,
            arch=arch,
            compute_units=compute_units,
            unified_attention=unified.unified_attention,
            fused_qk_rope_reshape_and_cache=fused.fused_qk_rope_reshape_and_cache,
            **{name: getattr(aiter, name) for name in _TOP_LEVEL},
        )
    except AttributeError as error:
        raise Unavailable(f"aiter lacks what it should have ({error}): is AITER_TRITON_ONLY set?") from error


def load_latent() -> AiterLatent:
    """The same for latent attention. Raises `Unavailable`."""
    known = load()
    aiter, mla = _module("aiter"), _module("aiter.mla")
    return AiterLatent(
        compute_units=known.compute_units,
        mla_decode_fwd=mla.mla_decode_fwd,
        get_mla_metadata_info_v1=aiter.get_mla_metadata_info_v1,
        get_mla_metadata_v1=aiter.get_mla_metadata_v1,
        flash_attn_varlen_func=known.flash_attn_varlen_func,
    )


def load_gluon() -> Callable[..., None]:
    """aiter's `pa_decode_gluon`. Raises `Unavailable`."""
    load()
    gluon: Callable[..., None] = _module("aiter.ops.triton.gluon.pa_decode_gluon").pa_decode_gluon
    return gluon


def load_products() -> AiterProducts:
    """The same for linear layers and routed experts. Raises `Unavailable`."""
    load()
    try:
        return AiterProducts(
            fused_moe=_module("aiter.fused_moe").fused_moe,
            shuffle_weight=_module("aiter.ops.shuffle").shuffle_weight,
            gemm_a8w8_blockscale=_module("aiter").gemm_a8w8_blockscale,
            quant_type=_module("aiter.ops.enum").QuantType,
        )
    except AttributeError as error:
        raise Unavailable(f"aiter lacks what it should have ({error})") from error


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise Unavailable(f"{name} cannot be imported: {type(error).__name__}: {_first_line(error)}") from error


_TOP_LEVEL = (
    "paged_attention_v1",
    "paged_attention_rocm",
    "paged_attention_common",
    "flash_attn_varlen_func",
)


def _version() -> tuple[int, ...]:
    text = None
    for source in (
        lambda: importlib.import_module("aiter._version").__version__,  # what its build writes
        lambda: importlib.metadata.version("amd-aiter"),
    ):
        try:
            text = source()
            break
        except (ImportError, AttributeError):
            continue
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(\.?(?:dev|rc))?", text or "")
    if match is None:
        raise Unavailable(
            f"aiter does not say its version, and those below v{_dotted(MINIMUM_VERSION)} read wrong blocks"
        )
    major, minor, patch = (int(number) for number in match.groups()[:3])
    # What is on its way to a release may be any commit since the one before.
    version = (major, minor, patch - 1 if match[4] else patch)
    if version < MINIMUM_VERSION:
        raise Unavailable(
            f"aiter {text} is too old: v{_dotted(MINIMUM_VERSION)} is the first that can be used; {INSTALL}"
        )
    return version


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
