"""The FastAPI app: routes and what stands before them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.middleware.cors import CORSMiddleware

from miniserve import __version__
from miniserve.engine.client import AsyncEngine
from miniserve.server import chat, completions, debug, errors, health, responses, tokenize
from miniserve.server.body import body_route
from miniserve.server.config import ServerConfig
from miniserve.server.errors import json_response
from miniserve.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware, HostMiddleware, PathMiddleware
from miniserve.server.protocol import ChatCompletionRequest, CompletionRequest
from miniserve.server.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": responses.ErrorEnvelope},
    "5XX": {"model": responses.ErrorEnvelope},
}

_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def create_app(engine: AsyncEngine, config: ServerConfig, hosts: Collection[str] | None = None) -> FastAPI:
    """The OpenAI-compatible app over a started engine. `hosts`: the names it may be called by; None: any."""
    service = Service(engine, config)
    app = FastAPI(title="miniserve", version=__version__, responses=_ERRORS, redirect_slashes=False)
    app.router.route_class = body_route(engine.info.max_model_len)
    errors.install(app)
    _openai_routes(app, service)
    tokenize.install(app, service)
    health.install(app, service)
    debug.install(app, service)
    # The last one added is the outermost: browsers need CORS headers on refusals, too.
    app.add_middleware(PathMiddleware)
    app.add_middleware(BodyLimitMiddleware, max_bytes=config.max_body_bytes)
    if config.api_keys:
        app.add_middleware(ApiKeyMiddleware, api_keys=config.api_keys)
    if hosts is not None:
        app.add_middleware(HostMiddleware, hosts=hosts)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _openai_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=responses.Completion, responses=_EVENTS)
    async def create_completion(body: CompletionRequest) -> Response:
        return await completions.respond(service, body)

    @app.post("/v1/chat/completions", response_model=responses.ChatCompletion, responses=_EVENTS)
    async def create_chat_completion(body: ChatCompletionRequest) -> Response:
        return await chat.respond(service, body)

    @app.get("/v1/models", response_model=responses.ModelList)
    async def list_models() -> Response:
        models = [_model(service, name) for name in service.model_names]
        return json_response({"object": "list", "data": models})

    @app.get("/v1/models/{name:path}", response_model=responses.Model)
    async def get_model(name: str) -> Response:
        service.check_model(name)
        return json_response(_model(service, name))

    @app.get("/", include_in_schema=False)
    async def root(request: Request) -> Response:
        links = {"api": "/v1", "models": "/v1/models", "health": "/health", "metrics": "/metrics", "docs": "/docs"}
        return json_response({"name": "miniserve", "version": __version__, **links})


def _model(service: Service, name: str) -> responses.Model:
    info = service.engine.info
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "miniserve",
        "root": info.model,
        "parent": None,
        "max_model_len": info.max_model_len,
        "permission": [],
    }
