"""The one importer of AMD's aiter library: lazily, and with one sentence where it cannot be used.

Signatures are those of v0.1.20.post1, https://github.com/ROCm/aiter.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from miniserve.core import summary

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
    """What linear layers and routed experts call of it. QuantType: the enumeration of the ways in which weights have
    fewer bits."""

    fused_moe: Callable[..., Tensor]
    shuffle_weight: Callable[[Tensor], Tensor]
    gemm_a8w8_blockscale: Callable[..., Tensor]
    QuantType: Any


# Where these names are; others are in `aiter` itself.
_MODULES = {
    "unified_attention": "aiter.ops.triton.attention.unified_attention",
    "fused_qk_rope_reshape_and_cache": "aiter.ops.triton.fusions.fused_kv_cache",
    "pa_decode_gluon": "aiter.ops.triton.gluon.pa_decode_gluon",
    "mla_decode_fwd": "aiter.mla",
    "fused_moe": "aiter.fused_moe",
    "shuffle_weight": "aiter.ops.shuffle",
    "QuantType": "aiter.ops.enum",
}
Found = TypeVar("Found", Aiter, AiterLatent, AiterProducts)


@functools.cache
def load() -> Aiter:
    """Import aiter. Raises `Unavailable`."""
    spec = importlib.util.find_spec("aiter")
    if spec is None:
        raise Unavailable(f"aiter is not installed; {INSTALL}")
    if not any((Path(place) / "ops").is_dir() for place in spec.submodule_search_locations or ()):
        raise Unavailable(f"the installed `aiter` is an unrelated package of that name; uninstall it: {INSTALL}")
    with _importing("aiter"):  # without ROCm it raises RuntimeError, and others from deep within
        importlib.import_module("aiter")
        version = _version()
        chip = importlib.import_module("aiter.jit.utils.chip_info")
        known = {"version": version, "arch": chip.get_gfx(), "compute_units": chip.get_cu_num()}
    return _find(Aiter, known)


def load_latent() -> AiterLatent:
    """The same for latent attention. Raises `Unavailable`."""
    return _find(AiterLatent, {"compute_units": load().compute_units})


def load_gluon() -> Callable[..., None]:
    """aiter's `pa_decode_gluon`. Raises `Unavailable`."""
    load()
    gluon: Callable[..., None] = _named("pa_decode_gluon")
    return gluon


def load_products() -> AiterProducts:
    """The same for linear layers and routed experts. Raises `Unavailable`."""
    load()
    return _find(AiterProducts, {})


def _find(kind: type[Found], known: dict[str, Any]) -> Found:
    """known: fields that are no functions of aiter's."""
    return kind(**known, **{field.name: _named(field.name) for field in fields(kind) if field.name not in known})


def _named(name: str) -> Any:
    place = _MODULES.get(name, "aiter")
    with _importing(place):
        module = importlib.import_module(place)
    if not hasattr(module, name):
        raise Unavailable(f"aiter lacks what it should have ({place}.{name}): is AITER_TRITON_ONLY set?")
    return getattr(module, name)


@contextmanager
def _importing(name: str) -> Iterator[None]:
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(f"{name} cannot be imported: {summary(error)}") from error


def _version() -> tuple[int, ...]:
    text = _stated_version()
    match = re.match(r"(\d+)\.(\d+)\.(\d+)(\.?(?:dev|rc))?", text)
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


def _stated_version() -> str:
    with suppress(ImportError, AttributeError):  # what its build writes
        return str(importlib.import_module("aiter._version").__version__)
    with suppress(ImportError):
        return importlib.metadata.version("amd-aiter")
    return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
