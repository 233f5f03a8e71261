"""docs/API.md says what the server does: it is what its generator writes, and that knows every route and field."""

from __future__ import annotations

from typing import Any

from server_fakes import FakeEngine

from miniserve.server.app import create_app
from miniserve.server.config import ServerConfig
from miniserve.server.fields import IGNORED
from miniserve.server.messages import MessagesRequest
from miniserve.server.protocol import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from miniserve.server.responses import ResponsesRequest
from tools.api_document import DOCUMENT, ENDPOINTS, MEANINGS, MESSAGES_MEANINGS, RESPONSES_MEANINGS, render


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == render(), "run `python -m tools.api_document`"


def test_every_route_is_listed_and_nothing_else() -> None:
    engine: Any = FakeEngine()
    paths = create_app(engine, ServerConfig(enable_tokenizer_info=True)).openapi()["paths"]
    routes = {f"{method.upper()} {path}".replace(":path", "") for path, methods in paths.items() for method in methods}
    assert routes == set(ENDPOINTS) - {"GET /", "GET /openapi.json"}


def test_every_field_is_listed_once() -> None:
    bodies = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
    taken = {name for body in bodies for name in body.model_fields}
    assert set(MEANINGS) == taken | {"include_usage", "continuous_usage_stats"}
    for body in (CompletionRequest, ChatCompletionRequest):
        assert not set(body.model_fields) & (set(body.refused) | IGNORED)
        assert not set(body.refused) & IGNORED
    for agent, meanings in ((MessagesRequest, MESSAGES_MEANINGS), (ResponsesRequest, RESPONSES_MEANINGS)):
        assert set(meanings) <= set(agent.model_fields) <= set(MEANINGS) | set(meanings)
        assert not set(agent.model_fields) & set(agent.refused)
        # Whatever changes the answer of a chat is taken or refused here, too.
        assert set(ChatCompletionRequest.model_fields) <= set(agent.model_fields) | set(agent.refused)
