"""Before a model is served, its attention path runs on small problems whose answers are known: a path that gets them
wrong is not served.

Every distinct kind of layer prefills, extends and decodes rows of awkward lengths over the pool it will serve from, in
its lowest and its highest blocks; float32 attention written out in PyTorch on the same device says what is right. The
blocks hold noise beforehand, so that a kernel that reads past a row's end shows, and zeros afterwards, as before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from miniserve.attention.backends.base import Backend
from miniserve.attention.backends.build import build_backend
from miniserve.attention.backends.options import BackendOptions
from miniserve.attention.layouts import KVCache
from miniserve.attention.metadata import StepBatch
from miniserve.attention.routes import ASM_WRONG_LENGTHS, WRONG_LENGTHS, least_asm_rows
from miniserve.attention.select import Choice
from miniserve.attention.spec import AttentionLayer, AttentionSpec, LatentLayer, QKRope
from miniserve.core import UserError
from miniserve.runner.check_problem import CheckRow, Problem, Work

# How far from float32's answer a row may be, relative to its norm.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 2e-2}
FP8_TOLERANCE = 6e-2  # a kernel over an fp8 cache may round queries or weights to fp8 too


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One step of one kind of layer, the first of which is `layer`. error: of the worst row, relative; detail: that
    row, or what was raised."""

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
        if math.isinf(self.error):
            return f"{what}: {self.detail}"
        return f"{what}: {self.error:.2%} off in {self.detail} ({self.tolerance:.0%} allowed)"


def self_check(
    name: str,
    backend: Backend[Any],
    options: BackendOptions,
    layers: Sequence[AttentionLayer | LatentLayer],
    caches: Sequence[KVCache],
) -> list[CheckResult]:
    """Check the backend called `name`, made of `options`, at one layer of each kind. layers, caches: all the model has.

    The caches must not be in use; they are zeroed where they were written.
    """
    first: dict[AttentionSpec, int] = {}
    for index, layer in enumerate(layers):
        first.setdefault(layer.spec, index)
    results = []
    with torch.inference_mode():
        for index in first.values():
            layer, layout = layers[index], backend.layout
            tolerance = FP8_TOLERANCE if layer.spec.kv_dtype.itemsize == 1 else TOLERANCE[layer.spec.dtype]
            problem = Problem(layout, layer, caches[index], options.max_seq_len)
            for case, work, padded in _cases(problem, backend, options):
                if not work:  # rows too short for it
                    continue
                error, detail = _attempt(problem, backend, case, work, padded)
                results.append(CheckResult(name, layout.name, index, case, error, tolerance, detail))
            problem.clear()
    return results


def checked_backend(
    choice: Choice,
    block_size: int,
    options: BackendOptions,
    layers: Sequence[AttentionLayer | LatentLayer],
    caches: Sequence[KVCache],
) -> tuple[Backend[Any], list[str]]:
    """As `build_backend`, with sentences on what the self-check found. Raises `UserError` where an answer was wrong.

    Where the ASM kernel gets the lengths right that it is feared for, it is trusted with them.
    """
    if asm_is_reached(options):
        trusting = dataclasses.replace(options, trust_asm_lengths=True)
        backend = build_backend(choice, block_size, trusting)
        if all(result.ok for result in self_check(choice.backend, backend, trusting, layers, caches)):
            return backend, [f"self-check: passed; the ASM kernel is right here for lengths {WRONG_LENGTHS} too"]
    backend = build_backend(choice, block_size, options)
    results = self_check(choice.backend, backend, options, layers, caches)
    require(results)
    kept = [f"self-check: the ASM kernel is wrong here for lengths {WRONG_LENGTHS}"] if asm_is_reached(options) else []
    return backend, kept


def asm_is_reached(options: BackendOptions) -> bool:
    """Whether every layer that the ASM kernel may decode has it in some batch that there can be."""
    rows = [
        least_asm_rows(spec, options.platform.compute_units)
        for spec, route in zip(options.specs, options.routes, strict=True)
        if route.decode == "paged_attention_common"
    ]
    return bool(rows) and all(least is not None and least <= options.max_rows for least in rows)


def require(results: Sequence[CheckResult]) -> None:
    """Raise `UserError` that names what failed, if anything did."""
    failed = [result for result in results if not result.ok]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise UserError(
            f"The self-check failed: {failed[0].sentence()}{more}. Choose another path with --attention-backend or "
            "--kv-layout; --no-self-check would serve wrong answers."
        )


def _cases(problem: Problem, backend: Backend[Any], options: BackendOptions) -> Iterator[tuple[str, Work, bool]]:
    """The steps, each of which needs those before it; padded: with a row of padding, as a graph would run it.

    So many rows that the ASM kernel takes them, where it can, have no length that it is not trusted with.
    """
    groups = [problem.rows[at : at + options.max_rows] for at in range(0, len(problem.rows), options.max_rows)]
    for group in groups:
        halves = [(row, (row.length - 1) // 2, row.length - 1) for row in group]  # the last token is left to decode
        yield "prefill", [(row, (0, half)) for row, half, _ in halves if half], False
        yield "extend", [(row, (half, end)) for row, half, end in halves if half < end], False
        yield "decode", _last(group), False
        if backend.graphs and len(group) < options.max_rows:
            yield "decode with padding", _last(group), True
    least = least_asm_rows(problem.layer.spec, options.platform.compute_units)
    if options.routes[problem.layer.layer_index].decode == "paged_attention_common" and least is not None:
        low, high = ASM_WRONG_LENGTHS
        fit = [row for row in problem.rows if options.trust_asm_lengths or not low <= row.length <= high]
        if least <= options.max_rows:
            yield f"decode of {least} rows", _last([fit[index % len(fit)] for index in range(least)]), False


def _last(rows: Sequence[CheckRow]) -> Work:
    return [(row, (row.length - 1, row.length)) for row in rows]


def _attempt(problem: Problem, backend: Backend[Any], case: str, work: Work, padded: bool) -> tuple[float, str]:
    """The worst row's relative error, and which that is."""
    work = sorted(work, key=lambda item: item[1][0] == 0)  # in a step chunks with context come first
    try:
        batch = problem.decode_batch(work, padded) if case.startswith("decode") else problem.chunk_batch(work)
        got = _attend(problem, backend, problem.tokens(work, padded), batch).float()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
    except Exception as error:  # what a kernel raises is a failed check, whatever it is
        return math.inf, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    worst, place, at = 0.0, "no row", 0
    for row, (start, end) in work:
        want = row.want[start:end]
        distance = float((got[at : at + end - start] - want).norm() / want.norm())
        at += end - start
        if math.isnan(distance):
            return math.inf, f"NaN in a row of {row.length} tokens"
        if distance >= worst:
            worst, place = distance, f"a row of {row.length} tokens"
    return worst, place


def _attend(problem: Problem, backend: Backend[Any], tokens: list[torch.Tensor], batch: StepBatch) -> torch.Tensor:
    """As the model calls the backend: with rope, where the backend does it, that turns nothing."""
    meta, cache = backend.build(batch), problem.cache
    if problem.layer.spec.latent is not None:
        q_nope, q_pe, kv_c, k_pe = tokens
        return backend.attend_latent(cast(LatentLayer, problem.layer), q_nope, q_pe, kv_c, k_pe, cache, meta)
    layer, (q, k, v) = cast(AttentionLayer, problem.layer), tokens
    if not backend.fuses_rope:
        return backend.attend(layer, q, k, v, cache, meta)
    cosines = torch.ones(len(q), layer.spec.head_dim // 2, device=problem.device)
    rope = QKRope(torch.cat([cosines, torch.zeros_like(cosines)], dim=1), None, None, 0.0)
    return backend.attend_qkv(layer, torch.cat([q, k, v], dim=1).flatten(1), rope, cache, meta)
