"""Clients of other projects, unmodified, against a server whose answers are scripted in a tool dialect."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dialect_texts import WRITERS
from server_scripted import Scripted, scripted


@pytest.fixture(scope="session", params=WRITERS)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """A server of each dialect."""
    yield from scripted(request.param, tmp_path_factory.mktemp("clients") / request.param)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripted]:
    """Whose model also reasons."""
    yield from scripted("hermes", tmp_path_factory.mktemp("clients") / "qwen")
