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
    reason: str

    def explain(self) -> list[str]:
        """Sentences for people: the choice and why, then each rejection."""
        lines = [f"{self.backend} over the {self.layout} KV layout: {self.reason}"]
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
        order = platform.order(contract.layouts)
        for candidate in order if layout == "auto" else (layout,):
            reasons = list(
                dict.fromkeys(r for spec in specs for r in contract.refusals(spec, platform, candidate, block_size))
            )
            if not reasons:
                return Choice(contract.name, candidate, tuple(rejected), _reason(backend, layout, names, order))
            rejected += [(contract.name, candidate, reason) for reason in reasons]
    asked = " ".join(
        f"{flag} {value}"
        for flag, value in (("--attention-backend", backend), ("--kv-layout", layout))
        if value != "auto"
    )
    listed = "; ".join(f"{name} ({candidate}): {reason}" for name, candidate, reason in rejected)
    raise UserError(f"No attention path can serve this model{' with ' + asked if asked else ''}: {listed}.")


def _reason(backend: str, layout: str, names: Sequence[str], layouts: Sequence[str]) -> str:
    path = "asked for" if backend != "auto" else f"the first of {' > '.join(names)} that serves all layers"
    order = " > ".join(layouts)
    return f"{path}, {'the layout asked for' if layout != 'auto' else f'in the first layout of {order} that fits'}"
