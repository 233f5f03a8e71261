"""The page at `/` and what it asks for; `test_server_browser.py` looks at it with a browser."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import httpx
import pytest
from server_fakes import FakeEngine, RunningServer, running_server

from miniserve.core import StepTotals
from miniserve.server import page as page_module
from miniserve.server import steps

# As Chromium navigates.
NAVIGATION = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8"}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server(api_keys=("k",)) as server:
        yield server


def links(page: str) -> list[str]:
    return re.findall(r'(?:href|src)="([^"]+)"', page)


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html, application/json", ""])
def test_machines_get_json_at_the_root(server: RunningServer, accept: str) -> None:
    answer = httpx.get(server.root, headers={"Accept": accept})
    assert answer.json()["api"] == "/v1" and answer.headers["vary"] == "Accept"


def test_browsers_get_the_page_whole_small_and_without_a_key(server: RunningServer) -> None:
    page = httpx.get(server.root, headers=NAVIGATION)
    assert page.headers["content-type"] == "text/html; charset=utf-8" and page.headers["vary"] == "Accept"
    answers, names = [page], set(links(page.text))
    while names - {str(answer.url).removeprefix(f"{server.root}/") for answer in answers}:
        name = (names - {str(answer.url).removeprefix(f"{server.root}/") for answer in answers}).pop()
        answers.append(httpx.get(f"{server.root}/{name}"))
        names |= {f"page/{each}" for each in re.findall(r'from "\./([^"]+)"', answers[-1].text)}
    assert {name.partition(".")[2] for name in names} == {"css", "js", "svg"}
    for answer in answers:
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        # Nothing comes from elsewhere, the names of XML apart.
        assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", answer.text) == []
    assert sum(len(answer.content) for answer in answers) <= 100_000
    kinds = {answer.headers["content-type"].partition(";")[0] for answer in answers}
    assert kinds == {"text/html", "text/css", "text/javascript", "image/svg+xml"}


def test_there_are_no_other_files(server: RunningServer) -> None:
    for name in ("nothing.js", "..%2Ftiny-qwen3%2Fconfig.json", "index.html", "%2e%2e/app.py"):
        answer = httpx.get(f"{server.root}/page/{name}")
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "NotFoundError"


def test_behind_a_path_all_is_found_with_and_without_a_slash() -> None:
    with running_server(root_path="/models/small") as server:
        for url in (f"{server.root}/models/small", f"{server.root}/models/small/", server.root):
            page = httpx.get(url, headers=NAVIGATION).text
            (base, *names) = links(page)
            assert base == "/models/small/" and names
            assert {httpx.get(f"{server.root}{base}{name}").status_code for name in names} == {200}


def test_a_look_at_the_engine_needs_the_key_and_says_what_the_page_shows(server: RunningServer) -> None:
    url, engine = f"{server.root}/debug/engine", server.engine
    assert httpx.get(url).status_code == 401
    engine.totals = StepTotals(decode_rows=70, mixed_rows=30, prefill_tokens=55)
    engine.guesses = (5, 20, 8)
    engine.recent = StepTotals(decode_steps=10, decode_seconds=1.0, weight_bytes=6 * 10**11, kv_bytes=10**11)
    look = httpx.get(url, headers={"x-api-key": "k"}).json()
    assert (look["decoded_tokens"], look["prefilled_tokens"]) == (88, 55)
    assert look["bandwidth_share"] == pytest.approx(0.7) and look["steps"].startswith("step 100 ms · 70 % of 1.0 TB/s")
    assert (look["running"], look["max_running"], look["num_blocks"], look["block_size"]) == (0, 256, 64, 16)
    assert look["pool"]["owners"][:6] == [-3, -3, 0, 1, 1, -2] and len(look["pool"]["owners"]) == 64
    assert look["pool"]["num_tokens"] == {"0": 44, "1": 60}
    assert look["num_engines"] == 1
    refused = httpx.get(f"{url}?engine=1", headers={"x-api-key": "k"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "engine"


def test_many_that_watch_cost_no_more_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "_PERIOD", 600.0)
    with running_server() as server:

        async def watch() -> None:
            async with httpx.AsyncClient() as client:
                await asyncio.gather(*(client.get(f"{server.root}/debug/engine") for _ in range(20)))

        asyncio.run(watch())
        assert server.engine.num_looks == 1
        monkeypatch.setattr(page_module, "_PERIOD", 0.0)
        httpx.get(f"{server.root}/debug/engine")
        assert server.engine.num_looks == 2


def test_an_engine_that_is_dead_or_in_a_long_step_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_PATIENCE", 0.05)
    engine = FakeEngine()
    engine.pool_view = lambda max_blocks: asyncio.sleep(60)  # type: ignore[assignment, method-assign, return-value]
    engine.age = 7.0
    with running_server(engine) as server:
        answer = httpx.get(f"{server.root}/debug/engine")
        assert answer.status_code == 503 and "ended 7 s ago" in answer.json()["error"]["message"]
