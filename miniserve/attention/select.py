"""Chooses the attention path and the KV layout: a pure function of what is needed, where, and what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from miniserve.attention.contracts import CONTRACTS, KernelContract, Platform
from miniserve.attention.layouts import LAYOUTS
from miniserve.attention.spec import AttentionSpec
from miniserve.core import UserError


@dataclass(frozen=True, slots=True)
class Choice:
    """The path and layout that serve every layer, and why each one preferred to them cannot: (path, layout, reason)."""

    backend: str
    layout: str
    rejected: tuple[tuple[str, str, str], ...]

    def explain(self) -> list[str]:
        """Sentences for people: the choice, then each rejection."""
        lines = [f"{self.backend}, {self.layout} KV layout"]
        lines += [f"not {backend} ({layout}): {reason}" for backend, layout, reason in self.rejected]
        return lines


def select(
    specs: Sequence[AttentionSpec],
    platform: Platform,
    *,
    block_size: int,
    backend: str = "auto",
    layout: str = "auto",
    contracts: Sequence[KernelContract] = CONTRACTS,
) -> Choice:
    """The first path of the table, in its preferred layout, that can serve all layers. Raises `UserError` with every
    reason when what was asked for cannot be had."""
    names = [contract.name for contract in contracts]
    if backend != "auto" and backend not in names:
        raise UserError(f"--attention-backend {backend!r} is not known; choose one of auto, {', '.join(names)}.")
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"--kv-layout {layout!r} is not known; choose one of auto, {', '.join(LAYOUTS)}.")
    rejected: list[tuple[str, str, str]] = []
    for contract in contracts:
        if backend not in ("auto", contract.name):
            continue
        for candidate in contract.layouts if layout == "auto" else (layout,):
            reasons = list(
                dict.fromkeys(r for spec in specs for r in contract.refusals(spec, platform, candidate, block_size))
            )
            if not reasons:
                return Choice(contract.name, candidate, tuple(rejected))
            rejected += [(contract.name, candidate, reason) for reason in reasons]
    asked = " ".join(
        f"{flag} {value}"
        for flag, value in (("--attention-backend", backend), ("--kv-layout", layout))
        if value != "auto"
    )
    listed = "; ".join(f"{name} ({candidate}): {reason}" for name, candidate, reason in rejected)
    raise UserError(f"No attention path can serve this model{' with ' + asked if asked else ''}: {listed}.")
