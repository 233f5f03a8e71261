"""A few hundred requests drawn from our own OpenAPI description: no 5xx, and every answer as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from server_fakes import RunningServer, running_server

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
NUM_EXAMPLES = {
    "POST /v1/completions": 80,
    "POST /v1/chat/completions": 60,
    "POST /v1/responses": 30,
    "POST /v1/messages": 30,
    "POST /v1/messages/count_tokens": 10,
    "GET /v1/models": 1,
    "GET /v1/models/{name}": 15,
    "POST /tokenize": 40,
    "POST /detokenize": 40,
    "GET /tokenizer_info": 1,
    "GET /health": 1,
    "GET /load": 1,
    "GET /ping": 1,
    "GET /ready": 1,
    "GET /version": 1,
    "GET /metrics": 1,
    "GET /debug/steps": 20,
    "GET /debug/engine": 5,
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(enable_tokenizer_info=True) as server:
        yield server


@pytest.fixture(scope="module")
def operations(server: RunningServer) -> dict[str, Any]:
    schema = schemathesis.openapi.from_url(f"{server.root}/openapi.json")
    return {operation.ok().label: operation.ok() for operation in schema.get_all_operations()}


def test_every_endpoint_is_described(operations: dict[str, Any]) -> None:
    assert set(operations) == set(NUM_EXAMPLES)


@pytest.mark.parametrize("label", NUM_EXAMPLES)
def test_no_request_breaks_the_server(operations: dict[str, Any], label: str) -> None:
    @given(operations[label].as_strategy())
    @settings(
        max_examples=NUM_EXAMPLES[label],
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def every(case: schemathesis.Case) -> None:
        case.call_and_validate(checks=CHECKS)

    every()
