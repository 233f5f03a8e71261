"""Whether the server lives, is ready, and how it fares."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from starlette.responses import PlainTextResponse

from miniserve import __version__
from miniserve.server import responses
from miniserve.server.errors import json_response
from miniserve.server.service import Service


def install(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        return json_response(check(service))

    async def version() -> Response:
        return json_response({"version": __version__})

    async def metrics(request: Request) -> Response:
        body, content_type = service.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    for path in ("/health", "/ping", "/ready"):
        app.add_api_route(path, health, response_model=responses.Health)
    app.add_api_route("/version", version, response_model=responses.Version)
    app.add_api_route("/metrics", metrics, response_class=PlainTextResponse)
    app.add_api_route("/ping", health, methods=["POST"], include_in_schema=False)  # as SageMaker does


def check(service: Service) -> responses.Health:
    """Raises `APIError` 503 where the engine is dead. One that gives no sign of life counts as dead after a while."""
    service.check_alive()
    stats, age = service.engine.stats, service.engine.last_step_age()
    return {
        "status": "ok",
        "running": stats.num_running,
        "waiting": stats.num_waiting + service.turns.waiting,
        "last_step_age": None if age is None else round(age, 3),
    }
