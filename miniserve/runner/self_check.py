"""Before a model is served, its attention path runs on small problems whose answers are known: a path that gets them
wrong is not served.

Every distinct kind of layer prefills, extends and decodes rows of awkward lengths over the pool it will serve from, in
its lowest and its highest blocks; float32 attention written out in PyTorch on the same device says what is right, and
where a kernel multiplies in fp8 float32 attention with its roundings. The blocks hold NaN beforehand, as a broken
request may leave them, and zeros afterwards. A kernel that lets such NaN through is tried over noise: passes it that,
it is served blocks that are zeroed as they are taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from miniserve.attention.backends.base import QKV, Backend, BackendOptions, LatentTokens
from miniserve.attention.backends.build import build_backend
from miniserve.attention.contracts import KERNELS
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import StepBatch
from miniserve.attention.routes import ASM_WRONG_LENGTHS, WRONG_LENGTHS, least_asm_rows
from miniserve.attention.select import Choice
from miniserve.attention.spec import AttentionLayer, AttentionSpec, LatentLayer, LatentRope, QKRope
from miniserve.attention.terms import KernelContract
from miniserve.core import summary
from miniserve.runner.check_problem import STALE_NAN, STALE_NOISE, CheckRow, CheckStep, Problem

# How far from float32's answer a row may be, relative to its norm; more where a kernel's contract says so.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One step of one kind of layer, the first of which is `layer`. error: of the worst row, relative, NaN where that
    row has NaN, infinite where something was raised; detail: that row, or what was raised."""

    backend: str
    layout: str
    layer: int
    case: str
    error: float
    tolerance: float
    detail: str

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance  # not NaN

    def sentence(self) -> str:
        """For people."""
        what = f"{self.backend} over the {self.layout} KV layout, layer {self.layer}, {self.case}"
        if not math.isfinite(self.error):
            return f"{what}: {self.detail}"
        return f"{what}: {self.error:.2%} off in {self.detail} ({self.tolerance:.0%} allowed)"


@dataclass(frozen=True, slots=True)
class Checked:
    """A backend and what was found of it. asm_lengths: whether the ASM kernel is right for the lengths it is kept from;
    None where it is not reached. needs_zeros: it spreads NaN that a block's last owner left in it."""

    backend: Backend[Any]
    results: list[CheckResult]
    asm_lengths: bool | None
    needs_zeros: bool

    @property
    def failure(self) -> str | None:
        """What is wrong, a sentence; None where nothing is."""
        failed = [result for result in self.results if not result.ok]
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        return f"{failed[0].sentence()}{more}" if failed else None

    def sentences(self) -> list[str]:
        """For people, of a backend that is served."""
        found = []
        if self.asm_lengths is not None:
            which = "right here for lengths {} too" if self.asm_lengths else "wrong here for lengths {}"
            found.append(f"self-check: passed; the ASM kernel is {which.format(WRONG_LENGTHS)}")
        if self.needs_zeros:
            found.append("self-check: passed; a kernel spreads NaN from unused slots, so blocks are zeroed before use")
        return found


def check_backend(
    choice: Choice,
    options: BackendOptions,
    layers: Sequence[AttentionLayer | LatentLayer],
    caches: Sequence[KVCache],
) -> Checked:
    """As `build_backend`, checked: in the first way to serve it that is right, or as it failed in the last."""
    asm, stale = asm_is_reached(options), STALE_NAN

    def attempt(*, trusting: bool) -> tuple[Backend[Any], list[CheckResult]]:
        way = dataclasses.replace(options, trust_asm_lengths=trusting)
        backend = build_backend(choice, way)
        return backend, self_check(choice.backend, backend, way, layers, caches, stale)

    backend, results = attempt(trusting=asm)
    if any(math.isnan(result.error) for result in results):
        stale = STALE_NOISE
        backend, results = attempt(trusting=asm)
    trusted = asm and all(result.ok for result in results)
    if asm and not trusted:
        backend, results = attempt(trusting=False)
    return Checked(backend, results, trusted if asm else None, stale == STALE_NOISE)


def self_check(
    name: str,
    backend: Backend[Any],
    options: BackendOptions,
    layers: Sequence[AttentionLayer | LatentLayer],
    caches: Sequence[KVCache],
    stale: str = STALE_NAN,
) -> list[CheckResult]:
    """Check the backend called `name`, made of `options`, at one layer of each kind. layers, caches: all the model has;
    stale: what is in blocks before they are used.

    The caches must not be in use; they are zeroed where they were written.
    """
    first: dict[AttentionSpec, int] = {}
    for index, layer in enumerate(layers):
        first.setdefault(layer.spec, index)
    results = []
    with torch.inference_mode():
        for index in first.values():
            layer, layout, route = layers[index], backend.layout, options.routes[index]
            decode, chunks = KERNELS[route.decode], KERNELS[route.chunks]
            problem = Problem(layout, layer, caches[index], options.max_seq_len, stale, decode.fp8_products)
            for step in _steps(problem, backend, options):
                if not step.work:  # rows too short for it
                    continue
                error, detail = _attempt(problem, backend, step)
                tolerance = _tolerance(decode if step.decodes else chunks, layer.spec)
                results.append(CheckResult(name, layout.name, index, step.name, error, tolerance, detail))
            problem.clear()
    return results


def _tolerance(kernel: KernelContract, spec: AttentionSpec) -> float:
    if spec.fp8_kv and kernel.fp8_tolerance is not None:
        return kernel.fp8_tolerance
    return TOLERANCE[spec.dtype]


def asm_is_reached(options: BackendOptions) -> bool:
    """Whether every layer that the ASM kernel may decode has it in some batch that there can be."""
    rows = [
        least_asm_rows(spec, options.platform.compute_units)
        for spec, route in zip(options.specs, options.routes, strict=True)
        if route.decode == "paged_attention_common"
    ]
    return bool(rows) and all(least is not None and least <= options.max_rows for least in rows)


def _steps(problem: Problem, backend: Backend[Any], options: BackendOptions) -> Iterator[CheckStep]:
    """Each needs those before it. So many rows that the ASM kernel takes them, where it can, have no length that it is
    not trusted with."""
    groups = [problem.rows[at : at + options.max_rows] for at in range(0, len(problem.rows), options.max_rows)]
    for group in groups:
        halves = [(row, (row.length - 1) // 2, row.length - 1) for row in group]  # the last token is left to decode
        yield CheckStep("prefill", [(row, (0, half)) for row, half, _ in halves if half])
        # In a step chunks with context come first.
        extends = [(row, (half, end)) for row, half, end in halves if half < end]
        yield CheckStep("extend", sorted(extends, key=lambda item: item[1][0] == 0))
        yield _decodes("decode", group)
        if backend.graphs and len(group) < options.max_rows:
            yield _decodes("decode with padding", group, padded=True)
    least = least_asm_rows(problem.layer.spec, options.platform.compute_units)
    if options.routes[problem.layer.layer_index].decode == "paged_attention_common" and least is not None:
        low, high = ASM_WRONG_LENGTHS
        fit = [row for row in problem.rows if options.trust_asm_lengths or not low <= row.length <= high]
        if least <= options.max_rows:
            yield _decodes(f"decode of {least} rows", [fit[index % len(fit)] for index in range(least)])


def _decodes(name: str, rows: Sequence[CheckRow], *, padded: bool = False) -> CheckStep:
    return CheckStep(name, [(row, (row.length - 1, row.length)) for row in rows], decodes=True, padded=padded)


def _attempt(problem: Problem, backend: Backend[Any], step: CheckStep) -> tuple[float, str]:
    """The worst row's relative error, and which that is."""
    try:
        got = _attend(problem, backend, problem.tokens(step), problem.batch(step)).float()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
    except Exception as error:  # what a kernel raises is a failed check, whatever it is
        return math.inf, summary(error)
    worst, place, at = 0.0, "no row", 0
    for row, (start, end) in step.work:
        found = got[at : at + end - start]
        off = distance(found, row.want[start:end])
        if step.decodes and row.in_fp8 is not None:
            off = min(off, distance(found, row.in_fp8))
        at += end - start
        if math.isnan(off):
            return math.nan, f"NaN in a row of {row.length} tokens"
        if off >= worst:
            worst, place = off, f"a row of {row.length} tokens"
    return worst, place


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative to the norm of `want`."""
    return float((got - want).norm() / want.norm())


def _attend(
    problem: Problem, backend: Backend[Any], tokens: tuple[torch.Tensor, ...], batch: StepBatch
) -> torch.Tensor:
    """As the model calls the backend: with rope, where the backend does it, that turns nothing."""
    meta, cache = backend.build(batch), problem.cache
    if (latent := problem.layer.spec.latent) is not None:
        how = None
        if backend.fuses_rope:
            # A norm that changes nothing: beside such an eps the values do not count.
            weight = torch.full((latent.kv_lora_rank,), 2.0**10, dtype=tokens[0].dtype, device=problem.device)
            how = LatentRope(weight, 2.0**20, _no_turn(len(tokens[0]), latent.rope_dim, problem.device), True)
        return backend.attend_latent(cast(LatentLayer, problem.layer), cast(LatentTokens, tokens), cache, meta, how)
    layer = cast(AttentionLayer, problem.layer)
    if not backend.fuses_rope:
        return backend.attend(layer, cast(QKV, tokens), cache, meta)
    rope = QKRope(_no_turn(len(tokens[0]), layer.spec.head_dim, problem.device), None, None, 0.0)
    return backend.attend_qkv(layer, torch.cat(tokens, dim=1).flatten(1), rope, cache, meta)


def _no_turn(tokens: int, dim: int, device: torch.device) -> torch.Tensor:
    cosines = torch.ones(tokens, dim // 2, device=device)
    return torch.cat([cosines, torch.zeros_like(cosines)], dim=1)
