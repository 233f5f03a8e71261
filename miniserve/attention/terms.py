"""The terms on which kernels and backends serve a layer, and the sentences with which they refuse one."""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from miniserve.attention.aiter import MINIMUM_VERSION
from miniserve.attention.layouts import LAYOUTS
from miniserve.attention.platform import Platform, Version
from miniserve.attention.spec import AttentionSpec

NARROW_PLANE = 4 << 30  # bytes that offsets of 32 bits reach: of keys or of values of one layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The numbers from `least` to `most` that are multiples of one and, with pow2, powers of two; or, with `only`,
    these."""

    only: tuple[int, ...] = ()
    least: int = 1
    most: int | None = None
    multiple: int = 1
    pow2: bool = False

    def __contains__(self, size: int) -> bool:
        if self.only:
            return size in self.only
        large = self.most is not None and size > self.most
        odd = size % self.multiple or (self.pow2 and size & (size - 1))
        return size >= self.least and not large and not odd


ANY = Sizes()


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelContract:
    """One kernel's terms. An empty tuple or None means anything goes."""

    name: str
    layouts: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    fp8_kv: bool = False  # it reads a cache of the platform's fp8, beside one of the compute dtype
    any_kv: bool = False  # it reads a cache of any dtype
    head_dim: Sizes = ANY
    max_group: int | None = None  # query heads per KV head
    block_size: Sizes = ANY
    min_window: int | None = 1  # the shortest sliding window, None where it has none
    softcap: bool = True
    sinks: bool = True
    any_scale: bool = True  # False: the softmax scale is head_dim ** -0.5 whatever it is told
    one_query: bool = False  # it is right for rows of one query token alone, so not for chunks
    qk_norm: bool = True  # of kernels that rotate and write to the cache: they norm q and k, too
    partial_rope: bool = True  # of the same: they may rotate a part of each head only
    crashes: tuple[tuple[str, str], ...] = ()  # (arch, version of Triton) where compiling it kills the process
    fp8_products: bool = False  # over an fp8 cache it multiplies in fp8 (`attention_by_formula`'s `fp8`)
    # How far a row may be from float32's over an fp8 cache, relative, where its arithmetic is not known; None: as far
    # as over any cache.
    fp8_tolerance: float | None = None
    narrow_offsets: tuple[tuple[str, int], ...] = ()  # (arch, bytes of an element): misreads above `NARROW_PLANE`
    # Of latent attention: query heads, a layer's being padded to the next; kv_lora_rank and rope_dim; the largest
    # head_dim of keys and of values, expanded.
    heads: tuple[int, ...] = ()
    latent_parts: tuple[int, int] | None = None
    max_dense_dim: int | None = None

    def refusals(self, spec: AttentionSpec, block_size: int) -> Iterator[str]:
        """Every reason, each as a sentence without its subject, why this kernel cannot serve the layer."""
        if spec.dtype not in self.dtypes:
            yield f"does not compute in {name_of(spec.dtype)}"
        yield from self._refused_cache(spec)
        yield from self._refused_sizes(spec, block_size)
        yield from self._refused_latent(spec)
        if spec.sliding_window is not None and (self.min_window is None or spec.sliding_window < self.min_window):
            short = "" if self.min_window is None else f" of {spec.sliding_window}"
            yield f"has no sliding window{short}"
        if spec.softcap is not None and not self.softcap:
            yield "has no softcap"
        if spec.sinks and not self.sinks:
            yield "has no sinks"
        if not self.any_scale and not math.isclose(spec.scale, spec.head_dim**-0.5, rel_tol=1e-6):
            yield f"always scales by head_dim ** -0.5, not by {spec.scale:.6g}"
        if spec.qk_norm and not self.qk_norm:
            yield "has no norm of q and k"
        if spec.rotary_dim is not None and not self.partial_rope:
            yield f"turns whole heads, not {spec.rotary_dim} elements of {spec.head_dim}"

    def has_narrow_offsets(self, spec: AttentionSpec, arch: str) -> bool:
        """Whether it reaches no more than `NARROW_PLANE` bytes of the layer's planes there."""
        return any(is_arch(arch, pattern) and size == spec.kv_dtype.itemsize for pattern, size in self.narrow_offsets)

    def platform_refusals(self, platform: Platform) -> Iterator[str]:
        """As `refusals`, whatever the layer."""
        for arch, version in self.crashes:
            if is_arch(platform.arch, arch) and fnmatch.fnmatchcase(platform.triton_version, version):
                yield f"crashes the compiler of Triton {platform.triton_version} on {platform.arch}"

    def _refused_cache(self, spec: AttentionSpec) -> Iterator[str]:
        if spec.fp8_kv and not (self.fp8_kv or self.any_kv):
            yield "does not read an fp8 KV cache"
        elif not spec.fp8_kv and spec.kv_dtype != spec.dtype and not self.any_kv:
            yield f"needs the KV cache in {name_of(spec.dtype)}, not {name_of(spec.kv_dtype)}"

    def _refused_sizes(self, spec: AttentionSpec, block_size: int) -> Iterator[str]:
        if spec.head_dim not in self.head_dim:
            yield f"does not take head_dim {spec.head_dim}"
        group = spec.num_heads // spec.num_kv_heads
        if self.max_group is not None and group > self.max_group:
            yield f"takes at most {self.max_group} query heads per KV head, not {group}"
        if block_size not in self.block_size:
            yield f"does not take block size {block_size}"

    def _refused_latent(self, spec: AttentionSpec) -> Iterator[str]:
        if self.heads and spec.num_heads > max(self.heads):
            yield f"takes at most {max(self.heads)} query heads, not {spec.num_heads}"
        if (dims := spec.latent) is None:
            return
        parts = (dims.kv_lora_rank, dims.rope_dim)
        if self.latent_parts is not None and parts != self.latent_parts:
            yield "takes a latent of {} + {}, not of {} + {}".format(*self.latent_parts, *parts)
        largest = max(dims.nope_dim + dims.rope_dim, dims.v_head_dim)
        if self.max_dense_dim is not None and largest > self.max_dense_dim:
            yield f"takes keys and values of at most {self.max_dense_dim}, not of {largest}"


@dataclass(frozen=True, slots=True)
class LayerRoute:
    """Which kernel serves each part of a layer's step, by its contract's name. chunks: of prompts, with cached context
    or without; write: of keys and values to the cache, "" where the backend leaves no choice."""

    decode: str
    chunks: str
    write: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendContract:
    """A backend: where it runs, its KV layouts in the order it prefers them, and its kernels in order of preference.

    A layer that no kernel of `decode` serves is decoded by one of `rerouted_decode`; a model that has no other layers
    is left to the backends whose own kernels those are. fp8_archs: where it reads an fp8 cache, if not everywhere.
    requires: what must be there, of "native", "aiter", "triton". implementation: "module:class" of the backend in
    `attention/backends`, imported when it is chosen.
    """

    name: str
    implementation: str
    layouts: tuple[str, ...]
    decode: tuple[KernelContract, ...]
    chunks: tuple[KernelContract, ...]
    write: tuple[KernelContract, ...] = ()
    rerouted_decode: tuple[KernelContract, ...] = ()
    archs: tuple[str, ...] = ()
    fp8_archs: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    min_aiter: Version = MINIMUM_VERSION

    @property
    def latent(self) -> bool:
        """It is for latent (MLA) attention, and for nothing else."""
        return "latent" in self.layouts

    def platform_refusals(self, platform: Platform) -> Iterator[str]:
        """Why this backend cannot run there whatever the model."""
        if self.archs and not any(is_arch(platform.arch, pattern) for pattern in self.archs):
            yield f"it runs on {' or '.join(self.archs)}, not on {platform.arch}"
            return
        missing = {
            "native": platform.native_unavailable,
            "aiter": platform.aiter_unavailable,
            "triton": platform.triton_unavailable,
        }
        for what in self.requires:
            if reason := missing[what]:
                yield reason
        version = platform.aiter_version
        if "aiter" in self.requires and version is not None and version < self.min_aiter:
            needed, found = (".".join(map(str, v)) for v in (self.min_aiter, version))
            yield f"it needs aiter v{needed} or newer, not v{found}"

    def refusals(self, specs: Sequence[AttentionSpec], platform: Platform) -> list[str]:
        """Why this backend cannot serve the model there, whatever the layout."""
        reasons = [*self.platform_refusals(platform)]
        if any(self.latent != (spec.latent is not None) for spec in specs):
            reasons.append("it is for latent (MLA) layers" if self.latent else "it has no latent (MLA) attention")
        return reasons

    def routes(
        self, specs: Sequence[AttentionSpec], platform: Platform, layout: str, block_size: int
    ) -> tuple[tuple[LayerRoute, ...], list[str]]:
        """Each layer's route, or the reasons (sentences, each once) why some layer has none."""
        if layout not in self.layouts:
            return (), [f"it does not read the {layout} layout"]
        decode = (*self.decode, *self.rerouted_decode)
        roles = [options for options in (decode, self.chunks, self.write) if options]
        routes: dict[AttentionSpec, LayerRoute] = {}
        reasons: dict[str, None] = {}
        passed_over: dict[str, None] = {}  # why kernels of `decode` were
        own = False
        for spec in dict.fromkeys(specs):
            if refusal := self._cache_refusal(spec, platform, layout, block_size):
                reasons[refusal] = None
                continue
            found = [self._first(options, spec, platform, layout, block_size) for options in roles]
            if missing := [why for kernel, why in found if kernel is None]:
                reasons |= dict.fromkeys(itertools.chain(*missing))
                continue
            kernels = [kernel for kernel, _ in found if kernel is not None]
            routes[spec] = LayerRoute(*(kernel.name for kernel in kernels))
            own = own or kernels[0] in self.decode
            passed_over |= dict.fromkeys(found[0][1])
        if not own:
            reasons = reasons or passed_over
        return ((), list(reasons)) if reasons else (tuple(routes[spec] for spec in specs), [])

    def _cache_refusal(self, spec: AttentionSpec, platform: Platform, layout: str, block_size: int) -> str | None:
        if spec.fp8_kv:
            if spec.kv_dtype != platform.fp8_dtype:
                return f"fp8 on {platform.arch} is {name_of(platform.fp8_dtype)}, not {name_of(spec.kv_dtype)}"
            if self.fp8_archs and not any(is_arch(platform.arch, pattern) for pattern in self.fp8_archs):
                return f"it reads an fp8 KV cache on {' or '.join(self.fp8_archs)}, not on {platform.arch}"
        return LAYOUTS[layout].refusal(spec, block_size)

    def _first(
        self,
        options: tuple[KernelContract, ...],
        spec: AttentionSpec,
        platform: Platform,
        layout: str,
        block_size: int,
    ) -> tuple[KernelContract | None, list[str]]:
        """The first kernel that serves the layer, and what the ones before it refused."""
        refused: list[str] = []
        for kernel in options:
            if layout not in kernel.layouts:
                continue
            found = [*kernel.platform_refusals(platform), *kernel.refusals(spec, block_size)]
            if kernel.one_query and options is self.chunks:
                found.append("takes one query token a row")
            if not found:
                return kernel, refused
            subject = "it" if kernel.name == self.name else kernel.name
            refused += [f"{subject} {reason}" for reason in found]
        return None, refused


def name_of(dtype: torch.dtype) -> str:
    """The dtype's name as flags and configs have it."""
    return str(dtype).removeprefix("torch.")


def is_arch(arch: str, pattern: str) -> bool:
    """Patterns: "gfx942"; "gfx*": any AMD GPU; "sm_80+": an NVIDIA GPU of compute capability 8.0 or later."""
    if pattern.endswith("+"):
        family, _, least = pattern[:-1].partition("_")
        name, _, number = arch.partition("_")
        return name == family and int(number) >= int(least)
    return fnmatch.fnmatchcase(arch, pattern)
