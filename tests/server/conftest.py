"""A server over the real engine for all modules that need nothing of their own: to start one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server_fakes import REAL, TINY, RunningServer, running_server

from miniserve.engine.client import AsyncEngine


@pytest.fixture(scope="session")
def real_server() -> Iterator[RunningServer]:
    engine = AsyncEngine(REAL, TINY, "tiny-qwen3")
    with running_server(engine, trust_request_chat_template=True, log_interval=0.5) as server:
        yield server
