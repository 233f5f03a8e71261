"""Where a measurement's time went, and how close decode came to the memory's bandwidth, as counted by the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from miniserve.core import StepTotals
from miniserve.engine.roofline import describe, hidden_share, share_of_bandwidth


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """`totals` of a period; `bandwidth` in bytes a second as measured when the engine started, None if it was not. Of
    a server's first engine, where it has several."""

    totals: StepTotals
    bandwidth: float | None

    def since(self, earlier: DecodeSteps) -> DecodeSteps:
        return DecodeSteps(self.totals.since(earlier.totals), self.bandwidth)

    @property
    def line(self) -> str | None:
        """None if no step had decode rows alone."""
        return describe(self.totals, self.bandwidth)

    def shares(self, duration: float) -> dict[str, float]:
        """Shares of `duration` seconds: steps of decode rows alone, mixed steps, prefill steps, and waiting for
        requests or the host. The largest is what to improve first."""
        totals = self.totals
        spent = {"decode": totals.decode_seconds, "mixed": totals.mixed_seconds, "prefill": totals.prefill_seconds}
        shares = {name: seconds / duration for name, seconds in spent.items()}
        return shares | {"waiting": max(0.0, 1.0 - sum(shares.values()))}

    def to_json(self) -> dict[str, Any]:
        """Times in seconds."""
        return {
            **msgspec.structs.asdict(self.totals),
            "bandwidth": self.bandwidth,
            "share_of_bandwidth": share_of_bandwidth(self.totals, self.bandwidth),
            "cpu_hidden": hidden_share(self.totals),
        }


async def ask_server(client: httpx.AsyncClient) -> DecodeSteps | None:
    """What a server has counted since its start; None if it is not a miniserve server, or does not report it."""
    try:
        answer = (await client.get("/debug/steps", params={"limit": 0})).json()
        return DecodeSteps(StepTotals(**answer["totals"]), (answer["traffic"] or {}).get("bandwidth"))
    except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError):
        return None
