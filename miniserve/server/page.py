"""The page at `/`, a chat and a view of the engine: its files, and what the view asks for while somebody looks."""

from __future__ import annotations

import asyncio
import time
from importlib.resources import files
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Response

from miniserve import __version__
from miniserve.core import PoolView
from miniserve.engine.client import AsyncEngine
from miniserve.engine.roofline import describe, share_of_bandwidth
from miniserve.server.errors import APIError, json_response
from miniserve.server.service import Service
from miniserve.server.steps import between_steps, decoded_tokens, numbered

_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # What a model writes can neither run nor send anything anywhere, even if the page's own code had a hole.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_MAX_BLOCKS = 2048  # of the pool that are shown
_PERIOD = 0.5  # seconds for which one look at the engine serves all that watch


class _Watch:
    """A look at an engine, at most every `_PERIOD` seconds however many watch, and none where nobody does."""

    def __init__(self, service: Service, engine: AsyncEngine) -> None:
        self._service, self._engine = service, engine
        self._begun = -_PERIOD
        self._look: asyncio.Task[dict[str, Any]] | None = None

    async def look(self) -> dict[str, Any]:
        now = time.monotonic()
        if self._look is None or (self._look.done() and now - self._begun >= _PERIOD):
            self._begun = now
            self._look = asyncio.create_task(self._ask())
        return await asyncio.shield(self._look)  # who leaves does not take it from the others

    async def _ask(self) -> dict[str, Any]:
        view = await between_steps(self._engine, self._engine.pool_view(_MAX_BLOCKS))
        return report(self._service, self._engine, view)


def report(service: Service, engine: AsyncEngine, view: PoolView) -> dict[str, Any]:
    """Counters are since the engine started, `time` in seconds of a clock to compare with earlier reports; `steps` and
    `bandwidth_share` are of the last second, None where nothing decoded."""
    stats, info = engine.stats, engine.info
    return {
        "time": time.monotonic(),
        "num_engines": len(service.engine.engines),
        "running": stats.num_running,
        "waiting": stats.num_waiting + service.turns.waiting,
        "max_running": info.max_num_seqs,
        "preemptions": stats.num_preemptions,
        "decoded_tokens": decoded_tokens(engine.totals, stats),
        "prefilled_tokens": engine.totals.prefill_tokens,
        "bandwidth_share": share_of_bandwidth(engine.recent, info.bandwidth),
        "steps": describe(engine.recent, info.bandwidth),
        "num_blocks": info.num_blocks,
        "block_size": info.block_size,
        "kv_cache_usage": stats.kv_cache_usage,
        "prefix_cache_queries": stats.prefix_cache_queries,
        "prefix_cache_hits": stats.prefix_cache_hits,
        "pool": msgspec.to_builtins(view, str_keys=True),
    }


def install(app: FastAPI, service: Service) -> None:
    sources = {each.name: each.read_bytes() for each in (files("miniserve") / "assets" / "page").iterdir()}
    # Behind a proxy that puts a path before ours, addresses are relative to that path, with or without a slash.
    root = service.config.root_path
    index = sources.pop("index.html")
    if root:
        index = index.replace(b"<head>", f'<head>\n  <base href="{root}/">'.encode())
    watches: dict[int, _Watch] = {}

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        """The page for browsers, which ask for HTML by that name; JSON for all others."""
        accept = request.headers.get("accept", "").lower()
        if "text/html" in accept and "application/json" not in accept:
            answer = Response(index, headers=_HEADERS, media_type="text/html")
        else:
            links = {"models": "/v1/models", "health": "/health", "metrics": "/metrics", "schema": "/openapi.json"}
            answer = json_response({"name": "miniserve", "version": __version__, "api": "/v1", **links})
        answer.headers["Vary"] = "Accept"
        return answer

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in sources:
            raise APIError(404, f"There is nothing at GET /page/{name[:200]}.")
        return Response(sources[name], headers=_HEADERS, media_type=_TYPES[name[name.rindex(".") :]])

    @app.get("/debug/engine", response_model=dict[str, Any])
    async def engine(number: Annotated[int, Query(alias="engine", ge=0)] = 0) -> Response:
        if number not in watches:
            watches[number] = _Watch(service, numbered(service, number))
        return json_response(await watches[number].look())
