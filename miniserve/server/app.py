"""The FastAPI app: routes and what stands before them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from miniserve import __version__
from miniserve.core import InvalidRequest, UserError
from miniserve.engine.replicas import Engine
from miniserve.scheduler.limits import check_vocabulary
from miniserve.server import chat, completions, errors, messages, page, protocol, responses, steps
from miniserve.server.body import body_route
from miniserve.server.chat import render
from miniserve.server.config import ServerConfig
from miniserve.server.errors import json_response
from miniserve.server.gate import Gate, PathMiddleware
from miniserve.server.messages import CountTokensRequest, MessagesRequest
from miniserve.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    RenderOptions,
    TokenizeRequest,
)
from miniserve.server.responses import ResponsesRequest
from miniserve.server.service import Service

_MAX_IDS = 262_144
_OF_CONVERSATIONS = RenderOptions.model_fields.keys() - {"add_special_tokens", "add_generation_prompt"}
_Responses = dict[int | str, dict[str, Any]]
_ERRORS: _Responses = {key: {"model": protocol.ErrorEnvelope} for key in ("4XX", "5XX")}
_ANTHROPIC_ERRORS: _Responses = {key: {"model": messages.AnthropicError} for key in ("4XX", "5XX")}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": {"type": "string"}}}
_EVENTS: _Responses = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


def create_app(engine: Engine, config: ServerConfig, hosts: Collection[str] | None = None) -> FastAPI:
    """The OpenAI-compatible app over a started engine. `hosts`: the names it may be called by; None: any."""
    service = Service(engine, config)
    # FastAPI's pages load their scripts from other servers.
    app = FastAPI(
        title="miniserve", version=__version__, responses=_ERRORS, redirect_slashes=False, docs_url=None, redoc_url=None
    )
    app.router.route_class = body_route(engine.info.max_model_len, service.admit)
    errors.install(app)
    _openai_routes(app, service)
    _anthropic_routes(app, service)
    _tokenizer_routes(app, service)
    _health_routes(app, service)
    steps.install(app, service)
    page.install(app, service)
    _check_root_path(app, config.root_path)
    # The last one added is the outermost: browsers need CORS headers on refusals, too.
    app.add_middleware(Gate, hosts=hosts, api_keys=config.api_keys, max_body_bytes=config.max_body_bytes)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(PathMiddleware, root_path=config.root_path)
    return app


def _check_root_path(app: FastAPI, root_path: str) -> None:
    """Raises `UserError` where a path of ours would be taken for one that a proxy has put something before."""
    for path in [route.path for route in app.routes if isinstance(route, Route | APIRoute)]:
        if root_path and f"{path}/".startswith(f"{root_path}/"):
            raise UserError(f"--root-path {root_path} is where {path} begins; choose another.")


def _openai_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", response_model=protocol.Completion, responses=_EVENTS)
    async def create_completion(body: CompletionRequest) -> Response:
        return await completions.respond(service, body)

    @app.post("/v1/chat/completions", response_model=protocol.ChatCompletion, responses=_EVENTS)
    async def create_chat_completion(body: ChatCompletionRequest) -> Response:
        return await chat.respond(service, body)

    @app.post("/v1/responses", response_model=responses.ResponseOut, responses=_EVENTS)
    async def create_response(body: ResponsesRequest) -> Response:
        return await responses.respond(service, body)

    @app.get("/v1/models", response_model=protocol.ModelList)
    async def list_models() -> Response:
        models = [_model(service, name) for name in service.model_names]
        return json_response({"object": "list", "data": models})

    @app.get("/v1/models/{name:path}", response_model=protocol.Model)
    async def get_model(name: str) -> Response:
        service.check_model(name)
        return json_response(_model(service, name))


def _anthropic_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages", response_model=messages.MessageOut, responses=_EVENTS | _ANTHROPIC_ERRORS)
    async def create_message(body: MessagesRequest) -> Response:
        return await messages.respond(service, body)

    @app.post("/v1/messages/count_tokens", response_model=messages.TokenCount, responses=_ANTHROPIC_ERRORS)
    async def count_tokens(body: CountTokensRequest) -> Response:
        return await messages.count_tokens(service, body)


def _model(service: Service, name: str) -> protocol.Model:
    info = service.engine.info
    return protocol.Model(id=name, created=service.started, root=info.model, max_model_len=info.max_model_len)


def _health_routes(app: FastAPI, service: Service) -> None:
    async def health() -> Response:
        service.check_alive()
        stats, age = service.engine.stats, service.engine.last_step_age()
        answer: protocol.Health = {
            "status": "ok",
            "running": stats.num_running,
            "waiting": stats.num_waiting + service.turns.waiting,
            "last_step_age": None if age is None else round(age, 3),
        }
        return json_response(answer)

    async def load() -> Response:
        return json_response({"server_load": service.turns.num_requests})

    async def version() -> Response:
        return json_response({"version": __version__})

    async def metrics(request: Request) -> Response:
        body, content_type = service.metrics.render(request.headers.get("accept", ""))
        return Response(body, headers={"content-type": content_type})

    for path in ("/health", "/ping", "/ready"):
        app.add_api_route(path, health, response_model=protocol.Health)
    app.add_api_route("/load", load, response_model=protocol.Load)
    app.add_api_route("/version", version, response_model=protocol.Version)
    app.add_api_route("/metrics", metrics, response_class=PlainTextResponse)
    app.add_api_route("/ping", health, methods=["POST"], include_in_schema=False)  # as SageMaker does


def _tokenizer_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", response_model=protocol.Tokenized)
    async def tokenize(body: TokenizeRequest) -> Response:
        ids = await _ids(service, body)
        if body.return_token_strs and len(ids) > _MAX_IDS:  # to write more of them as JSON would stop all streams
            raise InvalidRequest(
                f"return_token_strs is for at most {_MAX_IDS} tokens, and the text has {len(ids)}.", "return_token_strs"
            )
        piece = service.engine.tokenizer.token_piece
        pieces = await service.off_loop(len(ids), lambda: list(map(piece, ids))) if body.return_token_strs else None
        answer: protocol.Tokenized = {
            "count": len(ids),
            "max_model_len": service.engine.info.max_model_len,
            "tokens": ids,
            "token_strs": pieces,
        }
        return json_response(answer)

    @app.post("/detokenize", response_model=protocol.Detokenized)
    async def detokenize(body: DetokenizeRequest) -> Response:
        if len(body.tokens) > _MAX_IDS:
            raise InvalidRequest(f"tokens holds {len(body.tokens)} ids; at most {_MAX_IDS} are taken.", "tokens")
        check_vocabulary(body.tokens, "tokens", service.engine.info.vocab_size)
        decode = service.engine.tokenizer.decode
        text = await service.off_loop(len(body.tokens), lambda: decode(body.tokens, False))
        return json_response({"prompt": text})

    if service.config.enable_tokenizer_info:

        @app.get("/tokenizer_info", response_model=protocol.TokenizerInfo)
        async def tokenizer_info() -> Response:
            return json_response(service.engine.tokenizer.info())


async def _ids(service: Service, body: TokenizeRequest) -> list[int]:
    if body.messages is None and body.prompt is not None:
        for name in _OF_CONVERSATIONS:
            if getattr(body, name):
                raise InvalidRequest(f"{name} goes with messages, not with a prompt.", name)
        (ids,) = await service.encode([body.prompt], body.add_special_tokens is not False, any_length=True)
        return ids
    if body.messages is None or body.prompt is not None:
        raise InvalidRequest("Exactly one of prompt and messages is needed.", "prompt")
    text = await render(service, body.messages, body, body.tools or [])
    (ids,) = await service.encode([text], bool(body.add_special_tokens), any_length=True)
    return ids
