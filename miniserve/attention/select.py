"""Chooses the attention path and the KV layout: a pure function of what is needed, where, and what was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from miniserve.attention.backends.base import BackendOptions
from miniserve.attention.contracts import CONTRACTS
from miniserve.attention.layouts import LAYOUTS, KVLayout
from miniserve.attention.platform import Platform
from miniserve.attention.spec import AttentionSpec
from miniserve.attention.terms import BackendContract, LayerRoute
from miniserve.core import UserError


@dataclass(frozen=True, slots=True)
class Choice:
    """The backend and layout that serve every layer, each layer's kernels, and why each pair preferred to them cannot.

    specs, routes: of each layer. rejected: (backend, layout, reason), a sentence each; the layout is "" where no layout
    would help.
    """

    backend: str
    layout: str
    block_size: int
    platform: Platform
    specs: tuple[AttentionSpec, ...]
    routes: tuple[LayerRoute, ...]
    rejected: tuple[tuple[str, str, str], ...]
    reason: str

    @property
    def kv_layout(self) -> KVLayout:
        return LAYOUTS[self.layout](self.block_size)

    def options(self, device: torch.device, max_rows: int, max_seq_len: int) -> BackendOptions:
        """For a backend there; see `BackendOptions`."""
        return BackendOptions(
            specs=self.specs,
            routes=self.routes,
            platform=self.platform,
            device=device,
            max_rows=max_rows,
            max_seq_len=max_seq_len,
        )

    def explain(self) -> list[str]:
        """Sentences for people: the choice and why, then the rejections, those with the same reason together."""
        together: dict[tuple[str, str], list[str]] = {}
        for backend, layout, reason in self.rejected:
            together.setdefault((layout, reason), []).append(backend)
        lines = [f"{self.backend} over the {self.layout} KV layout: {self.reason}"]
        for (layout, reason), backends in together.items():
            lines.append(f"not {', '.join(backends)}{f' ({layout})' if layout else ''}: {reason}")
        return lines


def select(
    specs: Sequence[AttentionSpec],
    platform: Platform,
    *,
    block_size: int,
    backend: str = "auto",
    layout: str = "auto",
    preferred: Sequence[str] | None = None,
    failed: Mapping[tuple[str, str], str] = {},
    contracts: Sequence[BackendContract] = CONTRACTS,
) -> Choice:
    """The first backend of the table, in its preferred layout, that can serve all layers.

    preferred: what a measurement puts before the table's order, as "BACKEND" or "BACKEND:layout", best first. failed:
    what is wrong with (backend, layout), for those that the self-check refused. Raises `UserError` with every reason
    when what was asked for cannot be had.
    """
    names = [contract.name for contract in contracts]
    if backend != "auto" and backend not in names:
        raise UserError(f"--attention-backend {backend!r} is not known; choose one of auto, {', '.join(names)}.")
    if layout != "auto" and layout not in LAYOUTS:
        raise UserError(f"--kv-layout {layout!r} is not known; choose one of auto, {', '.join(LAYOUTS)}.")
    if layout != "auto" and (layout == "latent") != any(spec.latent is not None for spec in specs):
        others = ", ".join(name for name in LAYOUTS if name != "latent")
        raise UserError(_WRONG_KIND[layout == "latent"].format(layout=layout, others=others))
    rejected: list[tuple[str, str, str]] = []
    hopeless = {contract.name: contract.refusals(specs, platform) for contract in contracts}
    for contract, candidate, measured in _candidates(contracts, platform, layout, preferred or ()):
        if backend not in ("auto", contract.name):
            continue
        if reasons := hopeless[contract.name]:
            rejected += [told for reason in reasons if (told := (contract.name, "", reason)) not in rejected]
            continue
        routes, reasons = contract.routes(specs, platform, candidate, block_size)
        if (contract.name, candidate) in failed:
            reasons = [f"the self-check failed: {failed[contract.name, candidate]}"]
        if not reasons:
            possible = [name for name in names if not hopeless[name]]
            why = _reason(backend, layout, possible, platform.order(contract.layouts), measured)
            return Choice(contract.name, candidate, block_size, platform, tuple(specs), routes, tuple(rejected), why)
        rejected += [(contract.name, candidate, reason) for reason in reasons]
    asked = " ".join(
        f"{flag} {value}"
        for flag, value in (("--attention-backend", backend), ("--kv-layout", layout))
        if value != "auto"
    )
    listed = "; ".join(f"{name}{f' ({plan})' if plan else ''}: {reason}" for name, plan, reason in rejected)
    remedy = " Ask for another path, or none; --no-self-check would serve wrong answers." if failed else ""
    raise UserError(f"No attention path can serve this model{' with ' + asked if asked else ''}: {listed}.{remedy}")


_WRONG_KIND = {
    True: "--kv-layout {layout} holds the latents of MLA models, and this one has keys and values of each KV head; use "
    "{others} or auto.",
    False: "--kv-layout {layout} holds keys and values of each KV head, and this MLA model has one latent for all "
    "heads; use latent or auto.",
}


def _candidates(
    contracts: Sequence[BackendContract], platform: Platform, layout: str, preferred: Sequence[str]
) -> Iterator[tuple[BackendContract, str, bool]]:
    """Every backend in every layout it reads (or in the one asked for), in the order to try them; True: a measurement
    put it there."""
    pairs = [
        (contract, candidate)
        for contract in contracts
        for candidate in (platform.order(contract.layouts) if layout == "auto" else (layout,))
    ]
    measured = [p for name in preferred for p in pairs if name in (p[0].name, f"{p[0].name}:{p[1]}")]
    for contract, candidate in dict.fromkeys((*measured, *pairs)):
        yield contract, candidate, (contract, candidate) in measured


def _reason(backend: str, layout: str, names: list[str], order: tuple[str, ...], measured: bool) -> str:
    why = "asked for" if backend != "auto" else f"the first of {' > '.join(names)} that serves all layers"
    if measured and backend == "auto":
        why = "measured fastest by `miniserve tune`"
    if layout != "auto":
        return f"{why}, the layout asked for"
    return why if measured else f"{why}, in the first layout of {' > '.join(order)} that fits"
